"""Our engine, with switches."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fedmllm import weights as W
from fedmllm.algorithms import build_algorithm
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.models.features import VisionFeatures
from fedmllm.models.frozen_products import available, direct
from fedmllm.models.last_layer import shorten
from loops.workload import Done, Go, Workload


def run(work: Workload, go: Go, done: Done, off: str = "") -> None:
    """Run rounds through the engine. ``off`` names the optimization to turn off: ``onednn``, ``features``, ``answers_only``, ``merged`` or ``together``."""
    algorithm, training = build_algorithm(work.experiment.algorithm), work.experiment.training
    # VisionFeatures refuses a model that would not read features.
    vlm = work.vlm if off == "features" else replace(work.vlm, features=VisionFeatures(work.vlm, 1 << 30))
    if off != "answers_only":
        shorten(vlm.model)
    if off != "onednn" and available():
        direct(vlm.model)
    if off == "merged":
        training = training.model_copy(update={"max_batch_tokens": 1})
    engine = InProcessEngine(vlm, work.encoder, training, 1 if off == "together" else work.experiment.engine.parallel_clients)
    with tempfile.TemporaryDirectory() as folder:
        states = RunStore(Path(folder)).client_states("federated")
        broadcast = algorithm.broadcast(algorithm.init(work.start, {}))
        while go():
            start, mean = time.perf_counter(), work.start
            engine.submit(Assignment(broadcast, algorithm, training.learning_rate, work.experiment.seed, states), work.clients)
            for update in engine.completed():
                mean = W.add(mean, update.update, 1 / len(work.clients))
            done(time.perf_counter() - start, mean)
