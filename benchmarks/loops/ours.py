"""Our engine, with switches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedmllm.algorithms import build_algorithm
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import Assignment, InProcessEngine
from fedmllm.models.features import VisionFeatures
from fedmllm.models.tail import shorten
from loops.workload import Workload


def rounds(work: Workload, features: bool = True, answers_only: bool = True, merged: bool = True, together: bool = True) -> Iterator[float]:
    """Seconds of one round after another.

    Args:
        work: what to train.
        features: compute the vision part once per picture.
        answers_only: compute the last layer where answers are; changes the workload's model for good.
        merged: run the micro-batches of a step as one batch.
        together: train the cohort side by side.
    """
    algorithm = build_algorithm(work.experiment.algorithm)
    if answers_only:
        shorten(work.vlm.model)
    vlm = replace(work.vlm, features=VisionFeatures(work.vlm, 1 << 30)) if features else work.vlm
    training = work.experiment.training if merged else work.experiment.training.model_copy(update={"max_batch_tokens": 1})
    engine = InProcessEngine(vlm, work.encoder, training, len(work.clients) if together else 1)
    with tempfile.TemporaryDirectory() as folder:
        states = RunStore(Path(folder)).client_states("federated")
        broadcast = algorithm.broadcast(algorithm.init(work.start, {}))
        while True:
            start = time.perf_counter()
            list(engine.map_clients(Assignment(broadcast, algorithm, training.learning_rate, 0, states), work.clients))
            yield time.perf_counter() - start
