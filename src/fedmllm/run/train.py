"""One run: trains an experiment and writes its metrics, adapter and result to a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from fedmllm.algorithms import Algorithm, AlgorithmConfig, Client, Holdings, Remark, ServerState, build_algorithm, remarks
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.strategies import Composed
from fedmllm.algorithms.strategies.label_calibration import Calibration, LabelCalibration
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.data.test_copies import own_kind
from fedmllm.engine.base import Scorer, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import compression
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.schedules import SYNCHRONOUS, build_schedule
from fedmllm.engine.scores import evaluate_state, personal_models
from fedmllm.engine.stages import Stage
from fedmllm.evaluation.predictions import Answered, to_record
from fedmllm.files import write_json
from fedmllm.flower.facts import VALIDATION
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.models.parts import Part
from fedmllm.models.processors import needs_torchvision
from fedmllm.models.saved import save_adapter
from fedmllm.run.encodable import encodable, usable
from fedmllm.run.federation import Federation, federation, run_id
from fedmllm.run.folders import check_folder, known_model, open_folder, unfinished_folder
from fedmllm.run.outputs import save_adapters, write_cards
from fedmllm.run.preparation import copies_of_test, initial_state, protected_samples, sent_before
from fedmllm.run.privacy import PrivacyPlan, announcement, privacy_plan
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.sample_privacy import SamplePlan
from fedmllm.run.secure import SecurePlan, secure_plan
from fedmllm.run.splits import Splits
from fedmllm.run.stages import stages_of
from fedmllm.run.summary import summarize
from fedmllm.run.tracking import require_trackers, tracked
from fedmllm.training.batches import Encoder
from fedmllm.training.private import PrivateSteps
from fedmllm.training.terms import LossTerm, of_kind
from fedmllm.types import BASE, Metrics, Sample, Weights


def train(
    experiment: Experiment,
    output: str | Path | None = None,
    *,
    name: str = "experiment",
    resume: bool = False,
    observer: Observer | None = None,
    resident: Resident | None = None,
    track: Sequence[str] = (),
    force: bool = False,
    narrow: Callable[[FederatedData], FederatedData] = lambda data: data,
) -> RunResult:
    """Run an experiment: zero-shot, the federation and the baselines; then write adapter and result. The arguments are those of ``fedmllm.train``.

    ``narrow`` removes samples of clients in this process before training, for audits.

    The run writes nothing before it has checked settings, data and model.

    Raises:
        FedMLLMError: see the subclasses in ``fedmllm.errors``.
    """
    chosen = Path(output) if output else unfinished_folder(name) if resume else None
    check_folder(chosen, experiment, resume)
    privacy = privacy_plan(experiment)
    secure = secure_plan(experiment, privacy.noise_multiplier if privacy else None)
    require_trackers(track)
    held, told = resident or Resident(), observer or UNOBSERVED
    copies_of_test(experiment, held.dataset(experiment))  # reports bad data before the run downloads a model or waits for sites
    experiment = known_model(chosen if resume else None, experiment, force)
    with federation(experiment, held, told) as found, held.model(experiment) as (vlm, trainable):
        vlm.family.require(found.data.dataset.modalities)
        start, encoder = initial_state(experiment, vlm), held.encoder(experiment)
        clients = replace(found, data=narrow(encodable(found.data, encoder, experiment.data.on_bad_sample, told.encoded)))
        copies = {
            spec: usable(copy, encoder, experiment.data.on_bad_sample)
            for spec, copy in copies_of_test(experiment, clients.data.dataset).items()
        }
        plan = privacy or protected_samples(experiment, clients, start)
        folder = open_folder(chosen, name, experiment, clients.data, resume)
        told.opened(folder)
        with tracked(track, folder, experiment, name) as tell:
            return _Run(experiment, folder, name, clients, copies, vlm, trainable, encoder, start, told.beside(tell), plan, secure).finish()


@dataclass(frozen=True)
class _Run:
    """Trains the stages of a run and writes their results."""

    experiment: Experiment
    folder: Path
    name: str
    federation: Federation
    copies: Mapping[str, Sequence[Sample]]
    vlm: VisionLanguageModel
    parts: Sequence[Part]
    encoder: Encoder
    start: ServerState
    observer: Observer
    privacy: PrivacyPlan | SamplePlan | None = None
    secure: SecurePlan | None = None
    asked: list[Answered] = field(default_factory=list)
    """Answers to the test split, kept while models are scored."""

    @property
    def data(self) -> FederatedData:
        """The federation's data."""
        return self.federation.data

    def finish(self) -> RunResult:
        """Train the stages that are not finished, then write adapters, cards and result."""
        initial = read_weights(self.vlm.model)
        loop = self._loop()
        limited = self._limited(loop.store)
        stages = stages_of(limited, self.federation)
        self.observer.started(stages)
        self.observer.resumed(sum(sent_before(loop.store, stage) for stage in stages))
        remarked = remarks(self.experiment.algorithm, self._holdings())
        self.observer.remarked(remarked)
        if self.privacy:
            self.observer.remarked({"privacy": Remark(announcement(self.privacy.noise_multiplier, self.experiment, limited), False)})
        if self.secure:
            self.observer.remarked({"secure aggregation": Remark(self.secure.announcement, False)})
        if "zero_shot" in self.experiment.evaluation.baselines:
            self._zero_shot(loop, initial)
        # Baselines measure plain training, without what the method under test adds.
        plain = replace(loop, algorithm=FedAvg(), transforms=(), schedule=SYNCHRONOUS, privacy=None, withholds=False)
        calibrated = replace(plain, algorithm=self._calibrated())
        federated, *baselines = stages
        self.asked.clear()
        with self.federation.engine(federated, self.folder, self._trainer(self._steps())) as engine:
            loop = self._secured(replace(loop, engine=engine), federated)
            watched = loop if loop.algorithm.personalized else self._keeping(loop)
            trained = run_stage(watched, federated, self.start)
            if self.secure:
                self.secure.require_sum(loop.store.records(federated.name))
            # Save the adapter before scoring, so that it exists even if scoring fails.
            models = personal_models(loop, federated, trained)
            save_adapters(self.vlm, self.folder, trained, models if loop.algorithm.personalized else {})
            self._write_predictions(loop, federated, trained)
            tested = self._tested(loop, federated, trained)
        ended = {f"fine_tuned-{client}": ServerState(weights, slots={BASE: trained.base}) for client, weights in models.items()}
        for stage in baselines:
            own = calibrated if stage.name.startswith("calibrated_") else plain
            run_stage(own, stage, ended[stage.name] if stage.name in ended else ServerState(initial))
        result = replace(
            summarize(limited, self.name, self.data, loop.store, stages, self.parts),
            tested=tested,
            clients=self._by_client(loop.store, models, trained.base),
            remarks={name: remark.text for name, remark in remarked.items()},
            idle=[name for name, remark in remarked.items() if remark.idle],
            privacy=self.privacy.statement(self.folder) if self.privacy else None,
            secure=self.secure.statement(loop.store.records(federated.name)) if self.secure else None,
        )
        write_cards(self.folder, result, self.experiment, needs_torchvision(self.vlm.processor))
        write_json(self.folder / "result.json", result.to_record())
        return result

    def _secured(self, loop: Loop, stage: Stage) -> Loop:
        """Return the loop of the federation, with secure aggregation if it is on."""
        if self.secure is None:
            return loop
        run = run_id(self.folder)
        if isinstance(loop.engine, InProcessEngine):
            return self.secure.simulated(loop, loop.engine, run, self.folder, sorted(stage.clients))
        return self.secure.among_sites(loop, run, self.folder, self.federation.keys)

    def _limited(self, store: RunStore) -> Experiment:
        """Return the experiment with the rounds that its privacy budget affords."""
        if self.privacy is None:
            return self.experiment
        stage = stages_of(self.experiment, self.federation)[0]
        state = store.load_state(stage.name)
        return self.privacy.limited(stage, self.folder, state.round_num if state else 0)

    def _calibrated(self) -> Algorithm:
        """Return plain training with the label calibration of the method under test, or with the default strength if it has none."""
        own = of_kind(self._terms(self.experiment.algorithm), Calibration)
        return cast(Algorithm, Composed(FedAvg(), (LabelCalibration(own.strength) if own else LabelCalibration(),)))

    def _holdings(self) -> Holdings:
        """Return the facts about the data and the method by which strategies know whether they have an effect."""
        samples = [sample for held in self.data.clients.values() for sample in held]
        options = None if self.data.reported else any(sample.options for sample in samples)
        config = self.experiment.algorithm
        own = self._terms(config.model_copy(update={"name": config.method, "strategies": ()}))
        return Holdings(self.data.profiles, options, tuple(self.start.weights), own)

    def _terms(self, config: AlgorithmConfig) -> tuple[LossTerm, ...]:
        """Return the terms that a method adds to its clients' loss."""
        method = build_algorithm(config)
        return method.local_rule(method.broadcast(self.start), Client()).all_terms

    def _splits(self) -> Splits:
        return Splits(self.vlm, self.encoder, self.experiment, self.data.dataset.metric)

    def _loop(self) -> Loop:
        e, dataset, splits = self.experiment, self.data.dataset, self._splits()
        return Loop(
            build_algorithm(e.algorithm),
            self._trainer(),
            e.training,
            splits.split(dataset.test, kept=self.asked),
            RunStore(self.folder),
            e.seed,
            compression(e.compression),
            e.failures,
            self.observer,
            splits.split(dataset.validation, VALIDATION) if dataset.validation else None,
            build_schedule(e.schedule),
            self.privacy.mechanism(self.folder) if self.privacy else None,
            self.privacy is not None,
        )

    def _trainer(self, private: PrivateSteps | None = None) -> InProcessEngine:
        """Return an engine that trains clients in this process."""
        e = self.experiment
        return InProcessEngine(self.vlm, self.encoder, e.training, e.engine.parallel_clients, private)

    def _steps(self) -> PrivateSteps | None:
        """Return how the federation's clients protect single samples. Baselines do not."""
        return self.privacy.steps(self.folder) if self.privacy else None

    def _keeping(self, loop: Loop) -> Loop:
        """Return the same loop, which saves the adapter if scoring it fails."""

        def kept(score: Scorer, weights: Weights, base: Weights) -> Metrics:
            try:
                return score(weights, base)
            except Exception:
                save_adapter(self.vlm, weights, self.folder / "adapter", base)
                raise

        def safe(split: Split) -> Split:
            return replace(split, score=partial(kept, split.score))

        return replace(loop, test=safe(loop.test), validation=loop.validation and safe(loop.validation))

    def _write_predictions(self, loop: Loop, stage: Stage, trained: ServerState) -> None:
        """Write the answers of the final model, or of each personalized model, to the test split.

        If they were scored in an earlier session, they are scored again. Answers of models at remote clients are not known here.
        """
        if loop.algorithm.personalized and loop.engine.remote:
            return
        if not self.asked:
            evaluate_state(loop, stage, trained)
        count = len(stage.clients) if loop.algorithm.personalized else 1
        ids = [sample.id for sample in self.data.dataset.test]
        write_json(self.folder / "predictions.json", {"ids": ids, **to_record(self.asked[-count:])})

    def _tested(self, loop: Loop, stage: Stage, trained: ServerState) -> dict[str, Metrics]:
        """Return the scores of the trained model on the copies of the test split."""
        splits = {spec: self._splits().split(copy, spec) for spec, copy in self.copies.items()}
        return {spec: evaluate_state(loop, stage, trained, split) for spec, split in splits.items()}

    def _by_client(self, store: RunStore, models: Mapping[str, Weights], trained_base: Weights) -> dict[str, dict[str, float]]:
        """Return the accuracy of each client's models on test samples drawn like the client's own, by model and client."""
        count, seed = self.experiment.evaluation.client_samples, self.experiment.seed
        scores: dict[str, dict[str, float]] = {}
        for client, held in self.data.clients.items() if count else ():
            asked = own_kind(self.data.dataset.test, held, client, count, seed)
            if not asked:
                continue
            score = self._splits().scorer(asked, "accuracy")
            scores.setdefault("federated", {})[client] = score(models[client], trained_base)["score"]
            for kind, base in (("local", {}), ("fine_tuned", trained_base)):
                state = store.load_state(f"{kind}-{client}")
                if state is not None:
                    scores.setdefault(kind, {})[client] = score(state.weights, base)["score"]
        return scores

    def _zero_shot(self, loop: Loop, initial: Weights) -> None:
        """Score the model before training, as a stage without rounds."""
        loop.store.rewind("zero_shot", 0)
        if loop.store.records("zero_shot"):
            return
        start = time.perf_counter()
        scores = loop.test.score(initial, {})
        record = {
            "stage": "zero_shot",
            "round": 0,
            "score": scores["score"],
            "scores": scores,
            "seconds": {"evaluate": time.perf_counter() - start},
        }
        loop.store.append(record)
        loop.observer.round_done(record | {"num_rounds": 0})
