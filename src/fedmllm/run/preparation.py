"""What a run works out before its first round."""

from __future__ import annotations

from fedmllm.algorithms import Client, ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset
from fedmllm.data.test_copies import reduced_copy
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.stages import Stage
from fedmllm.evaluation.metrics import require_scorable
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.run.federation import Federation
from fedmllm.run.sample_privacy import SamplePlan, sample_plan
from fedmllm.run.stages import stages_of
from fedmllm.training.private import require_separable
from fedmllm.types import Sample


def copies_of_test(experiment: Experiment, dataset: Dataset) -> dict[str, tuple[Sample, ...]]:
    """Return the copies of the test split in ``evaluation.tested``, by name.

    Raises:
        DataError: if a copy is empty, or if the metric is not defined on a copy, the test split or the validation split.
    """
    require_scorable(dataset.metric, dataset.test, "the test split")
    if experiment.evaluation.every and dataset.validation:
        require_scorable(dataset.metric, dataset.validation, "the validation split (data.validation_share, evaluation.every)")
    copies = {spec: reduced_copy(dataset.test, spec, experiment.seed) for spec in experiment.evaluation.tested}
    for spec, copy in copies.items():
        require_scorable(dataset.metric, copy, f"evaluation.tested: {spec}")
    return copies


def initial_state(experiment: Experiment, vlm: VisionLanguageModel) -> ServerState:
    """Return the method's state before the first round. Building a client rule now reveals a method that does not support the model."""
    algorithm = build_algorithm(experiment.algorithm)
    state = algorithm.init(read_weights(vlm.model), frozen_weights(vlm))
    algorithm.local_rule(algorithm.broadcast(state), Client())
    return state


def protected_samples(experiment: Experiment, found: Federation, start: ServerState) -> SamplePlan | None:
    """Return the plan for private training steps; None if samples are not protected.

    Raises:
        ConfigError: if the method's rule uses samples in another way.
    """
    if experiment.privacy.unit != "sample":
        return None
    algorithm = build_algorithm(experiment.algorithm)
    rule = algorithm.local_rule(algorithm.broadcast(start), Client())
    require_separable(rule, ())
    return sample_plan(experiment, stages_of(experiment, found)[0], 1 if rule.personal is None else 2)


def sent_before(store: RunStore, stage: Stage) -> int:
    """Return the bytes, up and down, of a stage's rounds that a resumed run does not repeat."""
    state = store.load_state(stage.name)
    kept = [row for row in store.records(stage.name) if state is not None and row["round"] <= state.round_num]
    return sum(int(row["bytes_up"]) + int(row["bytes_down"]) for row in kept)
