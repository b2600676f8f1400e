"""One run: an experiment in, a folder with numbers, adapter and report out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from fedmllm.algorithms import Algorithm, AlgorithmConfig, Client, Holdings, ServerState, build_algorithm, remarks
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.strategies import Composed
from fedmllm.algorithms.strategies.label_calibration import Calibration, LabelCalibration
from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset
from fedmllm.data.federated import FederatedData
from fedmllm.data.test_copies import own_kind, reduced_copy
from fedmllm.engine.base import Scorer, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import compression
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.schedules import SYNCHRONOUS, build_schedule
from fedmllm.engine.scores import evaluate_state, personal_models
from fedmllm.engine.stages import Stage
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.evaluation.metrics import require_scorable
from fedmllm.evaluation.predictions import Answered, to_record
from fedmllm.files import write_atomically, write_json
from fedmllm.flower.facts import VALIDATION
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights, write_base, write_weights
from fedmllm.models.parts import Part
from fedmllm.models.processors import needs_torchvision
from fedmllm.models.saved import save_adapter
from fedmllm.run.card import adapter_card
from fedmllm.run.encodable import encodable, usable
from fedmllm.run.federation import Federation, federation
from fedmllm.run.folders import check_folder, known_model, open_folder, unfinished_folder
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.summary import summarize
from fedmllm.run.tracking import require_trackers, tracked
from fedmllm.training.batches import Encoder
from fedmllm.training.terms import LossTerm, of_kind
from fedmllm.types import Metrics, Sample, Weights


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
) -> RunResult:
    """Run an experiment: zero-shot, the federation, the baselines asked for; then adapter and result. Arguments are those of ``fedmllm.train``.

    Nothing is written before settings, data and model have been found good.

    Raises:
        FedMLLMError: see the kinds in ``fedmllm.errors``.
    """
    chosen = Path(output) if output else unfinished_folder(name) if resume else None
    check_folder(chosen, experiment, resume)
    require_trackers(track)
    held, told = resident or Resident(), observer or UNOBSERVED
    _copies(experiment, held.dataset(experiment))  # bad data are an error before a model is downloaded or the run waits for sites
    experiment = known_model(chosen if resume else None, experiment, force)
    with federation(experiment, held, told) as found, held.model(experiment) as (vlm, trainable):
        vlm.family.require(found.data.dataset.modalities)
        start, encoder = _start(experiment, vlm), held.encoder(experiment)
        clients = replace(found, data=encodable(found.data, encoder, experiment.data.on_bad_sample, told.encoded))
        copies = {
            spec: usable(copy, encoder, experiment.data.on_bad_sample) for spec, copy in _copies(experiment, clients.data.dataset).items()
        }
        folder = open_folder(chosen, name, experiment, clients.data, resume)
        told.opened(folder)
        with tracked(track, folder, experiment, name) as tell:
            return _Run(experiment, folder, name, clients, copies, vlm, trainable, encoder, start, told.beside(tell)).finish()


def _copies(experiment: Experiment, dataset: Dataset) -> dict[str, tuple[Sample, ...]]:
    """The copies of the test split that are asked too.

    Raises:
        DataError: if one holds nothing, or the metric is not defined on it or the split itself.
    """
    require_scorable(dataset.metric, dataset.test, "the test split")
    if experiment.evaluation.every and dataset.validation:
        require_scorable(dataset.metric, dataset.validation, "the validation part (data.validation_share, evaluation.every)")
    copies = {spec: reduced_copy(dataset.test, spec, experiment.seed) for spec in experiment.evaluation.tested}
    for spec, copy in copies.items():
        require_scorable(dataset.metric, copy, f"evaluation.tested: {spec}")
    return copies


def _start(experiment: Experiment, vlm: VisionLanguageModel) -> ServerState:
    """The method's state before the first round. Its rule for clients is made once, so that what does not suit the model shows now."""
    algorithm = build_algorithm(experiment.algorithm)
    state = algorithm.init(read_weights(vlm.model), frozen_weights(vlm))
    algorithm.local_rule(algorithm.broadcast(state), Client())
    return state


def _sent(store: RunStore, stage: Stage) -> int:
    """Bytes, up and down, of a stage's rounds that are not trained again."""
    state = store.load_state(stage.name)
    kept = [row for row in store.records(stage.name) if state is not None and row["round"] <= state.round_num]
    return sum(int(row["bytes_up"]) + int(row["bytes_down"]) for row in kept)


@dataclass(frozen=True)
class _Run:
    """The stages of a run and what they add up to."""

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
    asked: list[Answered] = field(default_factory=list)
    """Answers to the test split, as they were scored."""

    @property
    def data(self) -> FederatedData:
        """Of the federation."""
        return self.federation.data

    def finish(self) -> RunResult:
        """Train what is not trained yet, and write the rest."""
        initial = read_weights(self.vlm.model)
        loop = self._loop()
        stages = self.stages()
        self.observer.started(stages)
        self.observer.resumed(sum(_sent(loop.store, stage) for stage in stages))
        remarked = remarks(self.experiment.algorithm, self._holdings())
        self.observer.remarked(remarked)
        if "zero_shot" in self.experiment.evaluation.baselines:
            self._zero_shot(loop, initial)
        # The baselines ask what plain training would give, whatever the method under test adds to it.
        plain = replace(loop, algorithm=FedAvg(), transforms=(), schedule=SYNCHRONOUS)
        calibrated = replace(plain, algorithm=self._calibrated())
        federated, *baselines = stages
        self.asked.clear()
        with self.federation.engine(federated, self.folder, loop.engine) as engine:
            loop = replace(loop, engine=engine)
            watched = loop if loop.algorithm.personalized else self._keeping(loop)
            trained = run_stage(watched, federated, self.start)
            # Whatever comes of the scores that follow, the adapter is there.
            models = personal_models(loop, federated, trained)
            self._save_adapters(trained, models if loop.algorithm.personalized else {})
            self._write_predictions(loop, federated, trained)
            tested = self._tested(loop, federated, trained)
        ended = {f"fine_tuned-{client}": ServerState(weights, slots={"base": trained.base}) for client, weights in models.items()}
        for stage in baselines:
            own = calibrated if stage.name.startswith("calibrated_") else plain
            run_stage(own, stage, ended[stage.name] if stage.name in ended else ServerState(initial))
        result = replace(
            summarize(self.experiment, self.name, self.data, loop.store, stages, self.parts),
            tested=tested,
            clients=self._by_client(loop.store, models, trained.base),
            remarks={name: remark.text for name, remark in remarked.items()},
            idle=[name for name, remark in remarked.items() if remark.idle],
        )
        self._write_cards(result)
        write_json(self.folder / "result.json", result.to_record())
        return result

    def stages(self) -> list[Stage]:
        """The federation, then centralized training, each client alone, both with calibration, and each client from where the federation ended."""
        federation, evaluation = self.experiment.federation, self.experiment.evaluation
        ranks = {client: self.experiment.lora.rank_of(i) for i, client in enumerate(sorted(self.data.clients))}
        own = {client: rank for client, rank in ranks.items() if rank is not None} | dict(self.federation.ranks)
        rounds, cohort, told = federation.num_rounds, federation.clients_per_round, self.data.told
        stages = [Stage("federated", self.data.clients, rounds, cohort, evaluation.every, own, told)]
        for name in ("centralized", "calibrated_centralized"):
            if name in evaluation.baselines:
                stages.append(Stage(name, pooled(self.data.clients), self._solo_rounds(), 1))
        for name in ("local", "calibrated_local"):
            if name in evaluation.baselines:
                stages += [Stage(f"{name}-{client}", {client: held}, self._solo_rounds(), 1) for client, held in self.data.clients.items()]
        if "fine_tuned" in evaluation.baselines:
            stages += [Stage(f"fine_tuned-{client}", {client: samples}, 1, 1) for client, samples in self.data.clients.items()]
        return stages

    def _calibrated(self) -> Algorithm:
        """Plain training with the calibration that the method under test has; at its neutral strength where that has none."""
        own = of_kind(self._terms(self.experiment.algorithm), Calibration)
        return cast(Algorithm, Composed(FedAvg(), (LabelCalibration(own.strength) if own else LabelCalibration(),)))

    def _holdings(self) -> Holdings:
        """What strategies meet."""
        samples = [sample for held in self.data.clients.values() for sample in held]
        options = None if self.data.told else any(sample.options for sample in samples)
        config = self.experiment.algorithm
        own = self._terms(config.model_copy(update={"name": config.method, "strategies": ()}))
        return Holdings(self.data.profiles, options, tuple(self.start.weights), own)

    def _terms(self, config: AlgorithmConfig) -> tuple[LossTerm, ...]:
        """What a method adds to its clients' loss."""
        method = build_algorithm(config)
        return method.local_rule(method.broadcast(self.start), Client()).all_terms

    def _solo_rounds(self) -> int:
        """As many rounds as a client takes part in on average, so that every baseline sees each sample as often."""
        federation = self.experiment.federation
        return max(1, round(federation.num_rounds * federation.clients_per_round / federation.num_clients))

    def _loop(self) -> Loop:
        e, dataset = self.experiment, self.data.dataset
        return Loop(
            build_algorithm(e.algorithm),
            InProcessEngine(self.vlm, self.encoder, e.training, e.engine.together),
            e.training,
            self._split(dataset.test, kept=self.asked),
            RunStore(self.folder),
            e.seed,
            compression(e.compression),
            e.failures,
            self.observer,
            self._split(dataset.validation, VALIDATION) if dataset.validation else None,
            build_schedule(e.schedule),
        )

    def _split(self, samples: Sequence[Sample], name: str = "", kept: list[Answered] | None = None) -> Split:
        """Samples, scored by the experiment's metric."""
        metric = self.data.dataset.metric
        return Split(self._scorer(samples, metric, kept), name, metric)

    def _scorer(self, samples: Sequence[Sample], metric: str, kept: list[Answered] | None = None) -> Scorer:
        """Scores given weights, and what was merged into the frozen ones, on some samples."""

        def score(weights: Weights, base: Weights) -> Metrics:
            write_base(self.vlm, base)
            write_weights(self.vlm.model, weights)
            return evaluate(self.vlm, samples, self.encoder, metric, self.experiment.evaluation, self.experiment.seed, kept)

        return score

    def _keeping(self, loop: Loop) -> Loop:
        """The same loop; where its scores fail, the adapter that was to be scored is kept."""

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
        """What the final model answered to the test split, or each of a personalized method's; asked again if it was in an earlier sitting.
        What was answered elsewhere nobody knows here."""
        if loop.algorithm.personalized and loop.engine.remote:
            return
        if not self.asked:
            evaluate_state(loop, stage, trained)
        count = len(stage.clients) if loop.algorithm.personalized else 1
        ids = [sample.id for sample in self.data.dataset.test]
        write_json(self.folder / "predictions.json", {"ids": ids, **to_record(self.asked[-count:])})

    def _tested(self, loop: Loop, stage: Stage, trained: ServerState) -> dict[str, Metrics]:
        """The trained model on the copies of the test split."""
        splits = {spec: self._split(copy, spec) for spec, copy in self.copies.items()}
        return {spec: evaluate_state(loop, stage, trained, split) for spec, split in splits.items()}

    def _by_client(self, store: RunStore, models: Mapping[str, Weights], trained_base: Weights) -> dict[str, dict[str, float]]:
        """Accuracy of each client's models on test samples of its own kind, by model and client."""
        count, seed = self.experiment.evaluation.client_samples, self.experiment.seed
        scores: dict[str, dict[str, float]] = {}
        for client, held in self.data.clients.items() if count else ():
            asked = own_kind(self.data.dataset.test, held, client, count, seed)
            if not asked:
                continue
            score = self._scorer(asked, "accuracy")
            scores.setdefault("federated", {})[client] = score(models[client], trained_base)["score"]
            for kind, base in (("local", {}), ("fine_tuned", trained_base)):
                state = store.load_state(f"{kind}-{client}")
                if state is not None:
                    scores.setdefault(kind, {})[client] = score(state.weights, base)["score"]
        return scores

    def _save_adapters(self, trained: ServerState, own: Mapping[str, Weights]) -> None:
        """The global adapter and, of a personalized method, each client's own."""
        save_adapter(self.vlm, trained.weights, self.folder / "adapter", trained.base)
        for client, weights in own.items():
            (self.folder / "adapters").mkdir(exist_ok=True)
            save_adapter(self.vlm, weights, self.folder / "adapters" / client, trained.base)

    def _write_cards(self, result: RunResult) -> None:
        """A model card beside each adapter."""
        folders = {"": self.folder / "adapter", **{path.name: path for path in sorted(self.folder.glob("adapters/*"))}}
        for client, folder in folders.items():
            card = adapter_card(result, self.experiment, client, needs_torchvision(self.vlm.processor))
            write_atomically(folder / "README.md", card.encode())

    def _zero_shot(self, loop: Loop, initial: Weights) -> None:
        """The model before training, as a stage of no rounds."""
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


def pooled(clients: Mapping[str, Sequence[Sample]]) -> dict[str, tuple[Sample, ...]]:
    """All samples at one client, in the order of their ids, under the first client's name.

    With a single client this is the federation itself, name and order included, so that it trains bit for bit alike.
    """
    everything = sorted((sample for samples in clients.values() for sample in samples), key=lambda sample: sample.id)
    return {min(clients): tuple(everything)}
