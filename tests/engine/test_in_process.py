"""Clients in this process: submitted, trained side by side when their answers are asked for, each by itself where one breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import AlgorithmConfig, ServerState, build_algorithm
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Assignment, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.errors import DataError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import Answer, ClientFailure, ClientUpdate
from scripted import answers


def real(vlm: VisionLanguageModel, together: int = 16, seconds: float | None = None) -> tuple[InProcessEngine, Assignment]:
    method = build_algorithm(AlgorithmConfig())
    broadcast = method.broadcast(ServerState(read_weights(vlm.model)))
    training = TrainingConfig(batch_size=8)
    assignment = Assignment(broadcast, method, 1e-3, 0, RunStore(Path("unused")).client_states("federated"), deadline=seconds)
    return InProcessEngine(vlm, Encoder(vlm, "agnostic"), training, together), assignment


@dataclass(frozen=True)
class Raises(LossTerm):
    """A loss term that raises when it is asked."""

    error: Exception

    def value(self, now: Parameters, received: Parameters, progress: float) -> torch.Tensor:
        raise self.error


@dataclass(frozen=True)
class Breaks:
    """A method's client rule that raises at one client while it trains."""

    method: object
    client: str
    error: Exception

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def local_rule(self, broadcast: object, client: object) -> object:
        rule = self.method.local_rule(broadcast, client)  # type: ignore[attr-defined]
        return rule.with_term(Raises(self.error)) if client.name == self.client else rule  # type: ignore[attr-defined]


@pytest.mark.parametrize("together", [1, 16])
def test_a_client_that_raises_takes_no_other_with_it(
    vlm: VisionLanguageModel, federation: FederatedData, together: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine, assignment = real(vlm, together)
    names = sorted(federation.clients)[:3]
    clients = {name: federation.clients[name] for name in names}
    alone = list(answers(engine, assignment, {name: clients[name] for name in (names[0], names[2])}))
    broken = replace(assignment, algorithm=Breaks(assignment.algorithm, names[1], RuntimeError("CUDA out of memory")))  # type: ignore[arg-type]
    first, second, third = answers(engine, broken, clients)
    assert second == ClientFailure(names[1], "RuntimeError: CUDA out of memory")
    assert "test_in_process" in caplog.text
    for expected, found in zip(alone, (first, third), strict=True):
        assert isinstance(expected, ClientUpdate)
        assert isinstance(found, ClientUpdate)
        for name, tensor in expected.update.items():
            torch.testing.assert_close(found.update[name], tensor, atol=2e-5, rtol=0)


def test_what_is_wrong_with_settings_or_data_is_no_failure_of_a_client(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = real(vlm)
    name = min(federation.clients)
    broken = replace(assignment, algorithm=Breaks(assignment.algorithm, name, DataError("row 3 is bad")))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 3 is bad"):
        list(answers(engine, broken, federation.clients))


def test_clients_that_have_not_begun_by_the_deadline_are_left_out(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = real(vlm, together=1, seconds=1e-9)
    found = list(answers(engine, assignment, federation.clients))
    assert found == [ClientFailure(name, "did not start within the deadline of 1e-09 s") for name in federation.clients]


def updates(found: Iterator[Answer]) -> list[str]:
    every = list(found)
    assert all(isinstance(answer, ClientUpdate) for answer in every)
    return [answer.client for answer in every]


def test_answers_come_in_any_order_and_are_the_same(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """Those of a wave that are asked for later wait."""
    engine, assignment = real(vlm)
    names = sorted(federation.clients)
    first = {answer.client: answer for answer in answers(engine, assignment, federation.clients)}
    engine.submit(assignment, federation.clients)
    for answer in engine.completed([names[0], *names[:0:-1]]):
        assert isinstance(answer, ClientUpdate)
        expected = first[answer.client]
        assert isinstance(expected, ClientUpdate)
        assert all(torch.equal(answer.update[name], tensor) for name, tensor in expected.update.items())


def test_what_was_not_taken_stays_outstanding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = real(vlm)
    names = sorted(federation.clients)
    engine.submit(assignment, federation.clients)
    assert next(engine.completed()).client == names[0]
    engine.submit(assignment, {"late": federation.clients[names[0]]})
    assert updates(engine.completed()) == [*names[1:], "late"]
    assert list(engine.completed()) == []


def test_nobody_answers_who_is_not_outstanding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = real(vlm)
    engine.submit(assignment, federation.clients)
    with pytest.raises(LookupError, match="'nobody' is not outstanding"):
        next(engine.completed(["nobody"]))
    engine.cancel()
    assert list(engine.completed()) == []


def test_an_error_of_settings_or_data_leaves_nobody_outstanding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """So that the same clients can be submitted again."""
    engine, assignment = real(vlm)
    name = min(federation.clients)
    broken = replace(assignment, algorithm=Breaks(assignment.algorithm, name, DataError("row 3 is bad")))  # type: ignore[arg-type]
    engine.submit(broken, federation.clients)
    with pytest.raises(DataError):
        next(engine.completed())
    assert updates(answers(engine, assignment, federation.clients)) == list(federation.clients)


def test_models_of_clients_are_scored_here(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = real(vlm)
    split = Split(lambda weights, base: {"score": float(len(weights)), "base": float(len(base))})
    count = float(len(assignment.broadcast.weights))
    assert engine.scores(assignment, ["a", "b"], split) == {name: {"score": count, "base": 0.0} for name in ("a", "b")}
    assert not engine.remote
