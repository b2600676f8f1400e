"""Computes the result of a run from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmllm.algorithms import STRATEGIES, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.stages import Stage
from fedmllm.evaluation.metrics import error_over_models, majority_score, over_models, question_score
from fedmllm.models.parts import Part
from fedmllm.run.results import SCORES, SOLO, RunResult, versions
from fedmllm.types import Metrics, Sample


def summarize(
    experiment: Experiment, name: str, data: FederatedData, store: RunStore, stages: Sequence[Stage], parts: Sequence[Part]
) -> RunResult:
    """Return the result of a run. All numbers come from its metrics file, so they do not depend on how often the run was interrupted."""
    e, dataset, clients = experiment, data.dataset, data.clients
    records = {name: store.records(name) for name in ["zero_shot", *(stage.name for stage in stages)]}
    final = {name: rows[-1]["scores"] for name, rows in records.items() if rows}
    alone = {key: _alone(final, prefix) for key, prefix in SOLO.items() if key != "fine_tuned_mean"}
    shared = {name: scores for name, scores in final.items() if not name.startswith(tuple(SOLO.values()))}
    seconds = {name: sum(sum(row["seconds"].values()) for row in rows) for name, rows in records.items() if rows}
    learned = [sample for samples in clients.values() for sample in samples]
    return RunResult(
        experiment=name,
        metric=dataset.metric,
        scores=_scores(shared, alone, dataset.ceilings),
        standard_errors=_errors(shared, alone),
        details=shared | {key: over_models(list(scores.values())) for key, scores in alone.items() if scores},
        local={client: scores["score"] for client, scores in alone["local_mean"].items()},
        majority=_majority(data, learned),
        question_only=None if data.reported else question_score(dataset.metric, learned, dataset.test),
        bytes_up=sum(row["bytes_up"] for row in records["federated"]),
        bytes_down=sum(row["bytes_down"] for row in records["federated"]),
        seconds=sum(seconds.values()),
        seconds_by_stage=seconds,
        seed=e.seed,
        versions=versions(),
        num_rounds=e.federation.num_rounds,
        num_clients=e.federation.num_clients,
        clients_per_round=e.updates_per_round,
        trainable_parameters=sum(part.parameters for part in parts if part.trains),
        parts={part.name: part.parameters for part in parts},
        trained=[part.name for part in parts if part.trains],
        algorithm=e.algorithm.name,
        strategies=_strategies(e),
        model=e.model.name,
        personalized=build_algorithm(e.algorithm).personalized,
        validation=records["federated"][-1].get("validation") or {},
    )


def _strategies(experiment: Experiment) -> list[str]:
    """Return the strategies that the wording of the prompts implies, then those in the settings."""
    worded = [name for name, strategy in STRATEGIES.items() if strategy.wording == experiment.data.prompt]
    return list(dict.fromkeys([*worded, *experiment.algorithm.strategy_names]))


def _majority(data: FederatedData, learned: Sequence[Sample]) -> float | None:
    """Return the score of the majority answer. With sites the training answers are unknown, but the AUC of chance is always one half."""
    if data.reported:
        return 0.5 if data.dataset.metric == "auc" else None
    return majority_score(data.dataset.metric, learned, data.dataset.test)


def _alone(final: Mapping[str, Metrics], prefix: str) -> dict[str, Metrics]:
    """Return the final metrics of the stages with a prefix, by client."""
    return {name.removeprefix(prefix): scores for name, scores in final.items() if name.startswith(prefix)}


def _scores(
    shared: Mapping[str, Metrics], alone: Mapping[str, Mapping[str, Metrics]], ceilings: Mapping[str, float]
) -> dict[str, float | None]:
    """Return the scores by the names in ``SCORES``, with means over the clients' own models."""
    single = {name: shared[name]["score"] if name in shared else None for name in SCORES}
    means = {name: sum(s["score"] for s in own.values()) / len(own) if own else None for name, own in alone.items()}
    return single | means | {"ceiling": ceilings.get("both")}


def _errors(shared: Mapping[str, Metrics], alone: Mapping[str, Mapping[str, Metrics]]) -> dict[str, float | None]:
    """Return standard errors: of one model by bootstrap over test samples, of means over clients by ``error_over_models``."""
    errors = {name: shared[name]["standard_error"] if name in shared else None for name in SCORES}
    return errors | {name: error_over_models([scores["score"] for scores in own.values()]) for name, own in alone.items()}
