"""A pass that does not fit into memory is repeated in halves, and nothing of the failed pass stays in memory."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.algorithms import AlgorithmConfig, ServerState, build_algorithm
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.intake import Intake
from fedmllm.models import encoding
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights, trainable
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import ClientFailure, ClientUpdate
from private_steps import Scripted, steps_with
from scripted import answers

CONFIG = TrainingConfig(batch_size=8, max_batch_tokens=600)
Limit = Callable[[int], list[int]]


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Passes with more tokens fail after computing their activations. Returns the sizes of all passes tried."""

    def limit(tokens: int) -> list[int]:
        sizes: list[int] = []
        failed: list[weakref.ref[torch.Tensor]] = []

        def passed(vlm: VisionLanguageModel, batch: encoding.Batch) -> torch.Tensor:
            assert all(activations() is None for activations in failed), "a failed pass's activations are still alive"
            sizes.append(batch.inputs["input_ids"].numel())
            nll = encoding.answer_nll(vlm, batch)
            if sizes[-1] > tokens:
                failed.append(weakref.ref(nll))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nof which")
            return nll

        monkeypatch.setattr("fedmllm.training.local.answer_nll", passed)
        return sizes

    return limit


@pytest.fixture
def tasks(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> list[tuple[LocalTask, LocalRule]]:
    start = read_weights(vlm.model)
    held = {name: [encoder(sample) for sample in samples[:6]] for name, samples in federation.clients.items()}
    return [(LocalTask(name, 0, 0, samples, start, 1e-3), LocalRule(records_gradient=True)) for name, samples in held.items()]


def test_a_clients_failed_pass_is_repeated_in_halves(
    vlm: VisionLanguageModel, tasks: list[tuple[LocalTask, LocalRule]], memory_for: Limit, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train_locally(vlm, *tasks[0], CONFIG)
    sizes = memory_for(150)
    with caplog.at_level(logging.WARNING):
        found = train_locally(vlm, *tasks[0], CONFIG)
    failed = [size for size in sizes if size > 150]
    assert found.metrics == {**plain.metrics, "loss": pytest.approx(plain.metrics["loss"], rel=1e-5), "halvings": len(failed)}
    assert failed
    assert caplog.text.count("did not fit into memory (CUDA out of memory. Tried to allocate 20 GiB)") == len(failed)
    for name, gradient in plain.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, atol=1e-6, rtol=1e-3)


def test_parallel_clients_repeat_a_failed_pass_in_halves(
    vlm: VisionLanguageModel, tasks: list[tuple[LocalTask, LocalRule]], memory_for: Limit
) -> None:
    plain = train_in_parallel(vlm, tasks, CONFIG)
    sizes = memory_for(300)
    for one, other in zip(train_in_parallel(vlm, tasks, CONFIG), plain, strict=True):
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
        assert one.metrics["halvings"] == sum(size > 300 for size in sizes) > 0
        for name, gradient in other.gradient.items():
            torch.testing.assert_close(one.gradient[name], gradient, atol=1e-6, rtol=1e-3)


def test_a_single_sample_that_does_not_fit_is_an_error_without_gradients(
    vlm: VisionLanguageModel, tasks: list[tuple[LocalTask, LocalRule]], memory_for: Limit
) -> None:
    memory_for(10)
    with pytest.raises(torch.OutOfMemoryError, match=r"a pass of one sample with \d+ tokens does not fit into memory: CUDA out of memory"):
        train_locally(vlm, *tasks[0], CONFIG)
    assert all(parameter.grad is None for _, parameter in trainable(vlm.model))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_repeated_private_step_has_the_same_draw_and_one_noise(
    parallel: bool, vlm: VisionLanguageModel, tasks: list[tuple[LocalTask, LocalRule]], memory_for: Limit
) -> None:
    """The first pass of a step fits and the second does not. Nothing of either stays in the sum that gets the noise, and nothing reports that
    the draw was too large."""
    some = [(replace(task, learning_rate=0.0), LocalRule()) for task, _ in (tasks if parallel else tasks[:1])]
    draws = [[0, 1, 2, 3, 4, 5], [1, 4], [0, 2, 3, 5], [], [0, 1, 2, 4, 5], [3]][: 2 * len(some)]
    config = TrainingConfig(batch_size=8, local_epochs=2, max_batch_tokens=300)
    whole, repeated, spent = Scripted(draws), Scripted(draws), list[str]()
    train_in_parallel(vlm, some, config, None, steps_with(whole))
    sizes = memory_for(250)
    private = steps_with(repeated, spend=lambda client, *_: spent.append(client))
    found = train_in_parallel(vlm, some, config, None, private) if parallel else [train_locally(vlm, *some[0], config, None, private)]
    assert sizes[0] <= 250 < max(sizes)
    assert len(repeated.sums) == len(whole.sums) == 2 * len(some)
    for one, other in zip(repeated.sums, whole.sums, strict=True):
        for name, total in other.items():
            torch.testing.assert_close(one[name], total, atol=1e-7, rtol=1e-3)
    assert spent == [task.client for task, _ in some]
    assert all(result.metrics == {"steps": 2.0} for result in found)


def test_other_errors_are_not_retried(
    vlm: VisionLanguageModel, tasks: list[tuple[LocalTask, LocalRule]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("fedmllm.training.local.answer_nll", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_locally(vlm, *tasks[0], CONFIG)


@pytest.fixture
def engine(vlm: VisionLanguageModel) -> tuple[InProcessEngine, Assignment]:
    method = build_algorithm(AlgorithmConfig())
    states = RunStore(Path("unused")).client_states("federated")
    assignment = Assignment(method.broadcast(ServerState(read_weights(vlm.model))), method, 1e-3, 0, states)
    return InProcessEngine(vlm, Encoder(vlm, "agnostic"), CONFIG, 16), assignment


def test_a_reduced_budget_holds_for_later_rounds(
    engine: tuple[InProcessEngine, Assignment], federation: FederatedData, memory_for: Limit
) -> None:
    sizes = memory_for(400)
    first = list(answers(engine[0], engine[1], federation.clients))
    count = len(sizes)
    second = list(answers(engine[0], engine[1], federation.clients))
    assert max(sizes) > 400 >= max(sizes[count:])
    for answer, again in zip(first, second, strict=True):
        assert isinstance(answer, ClientUpdate)
        assert isinstance(again, ClientUpdate)
        assert answer.metrics["halvings"] > 0
        assert "halvings" not in again.metrics
    intake = Intake(engine[1].algorithm, ServerState(engine[1].broadcast.weights), {})
    for answer in first[:2]:
        intake.take(answer)
    assert intake.record()["halvings"] == dict.fromkeys(list(federation.clients)[:2], first[0].metrics["halvings"])


@pytest.mark.parametrize(("room", "kind"), [(2, ClientUpdate), pytest.param(0, ClientFailure, marks=pytest.mark.slow)])
def test_fewer_clients_train_in_parallel_if_they_do_not_fit(
    room: int,
    kind: type,
    engine: tuple[InProcessEngine, Assignment],
    federation: FederatedData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four clients train in halves if there is room for two clients' tensors. A client that never fits is a failure with its reason."""
    tried: list[int] = []

    def trained(*args: Any) -> Any:
        tried.append(len(args[1]))
        if len(args[1]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_in_parallel(*args)

    monkeypatch.setattr("fedmllm.engine.in_process.train_in_parallel", trained)
    monkeypatch.setattr("fedmllm.engine.in_process.train_locally", lambda vlm, task, rule, *rest: trained(vlm, [(task, rule)], *rest)[0])
    first = min(federation.clients)
    four = {**federation.clients, "client-99": federation.clients[first]}
    found = list(answers(engine[0], engine[1], four))
    assert tried == ([4, 2, 2] if room else [4, 2, 1, 1, 2, 1, 1])
    assert {type(answer) for answer in found} == {kind}
    assert "Training 4 clients in parallel failed (OutOfMemoryError: CUDA out of memory); retrying with 2 at a time" in caplog.text
    if not room:
        assert found[0] == ClientFailure(first, "OutOfMemoryError: CUDA out of memory")
