"""The in-process engine trains clients in parallel when their answers are requested, and one by one where a client fails."""

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
from fedmllm.errors import DataError, RunError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.privacy.noise import Noise
from fedmllm.training.batches import Encoder
from fedmllm.training.private import PrivateSteps
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import Answer, ClientFailure, ClientUpdate
from scripted import answers


def build(vlm: VisionLanguageModel, together: int = 16, seconds: float | None = None) -> tuple[InProcessEngine, Assignment]:
    method = build_algorithm(AlgorithmConfig())
    broadcast = method.broadcast(ServerState(read_weights(vlm.model)))
    training = TrainingConfig(batch_size=8)
    assignment = Assignment(broadcast, method, 1e-3, 0, RunStore(Path("unused")).client_states("federated"), deadline=seconds)
    return InProcessEngine(vlm, Encoder(vlm, "agnostic"), training, together), assignment


@dataclass(frozen=True)
class Raises(LossTerm):
    """A loss term that always raises."""

    error: Exception

    def value(self, now: Parameters, received: Parameters, progress: float) -> torch.Tensor:
        raise self.error


@dataclass(frozen=True)
class Breaks:
    """A method whose client rule raises for one client during training."""

    method: object
    client: str
    error: Exception

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def local_rule(self, broadcast: object, client: object) -> object:
        rule = self.method.local_rule(broadcast, client)  # type: ignore[attr-defined]
        return rule.with_term(Raises(self.error)) if client.name == self.client else rule  # type: ignore[attr-defined]


@pytest.mark.parametrize("together", [1, 16])
def test_a_client_that_raises_does_not_affect_others(
    vlm: VisionLanguageModel, federation: FederatedData, together: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine, assignment = build(vlm, together)
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


def test_an_error_in_settings_or_data_is_not_a_client_failure(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = build(vlm)
    name = min(federation.clients)
    broken = replace(assignment, algorithm=Breaks(assignment.algorithm, name, DataError("row 3 is bad")))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 3 is bad"):
        list(answers(engine, broken, federation.clients))


def test_clients_that_have_not_started_by_the_deadline_fail(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = build(vlm, together=1, seconds=1e-9)
    found = list(answers(engine, assignment, federation.clients))
    assert found == [ClientFailure(name, "did not start within the deadline of 1e-09 s") for name in federation.clients]


def updates(found: Iterator[Answer]) -> list[str]:
    every = list(found)
    assert all(isinstance(answer, ClientUpdate) for answer in every)
    return [answer.client for answer in every]


def test_answers_do_not_depend_on_their_order(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """Answers of a wave that are requested later are kept."""
    engine, assignment = build(vlm)
    names = sorted(federation.clients)
    first = {answer.client: answer for answer in answers(engine, assignment, federation.clients)}
    engine.submit(assignment, federation.clients)
    for answer in engine.completed([names[0], *names[:0:-1]]):
        assert isinstance(answer, ClientUpdate)
        expected = first[answer.client]
        assert isinstance(expected, ClientUpdate)
        assert all(torch.equal(answer.update[name], tensor) for name, tensor in expected.update.items())


def test_clients_whose_answers_were_not_taken_stay_outstanding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = build(vlm)
    names = sorted(federation.clients)
    engine.submit(assignment, federation.clients)
    assert next(engine.completed()).client == names[0]
    engine.submit(assignment, {"late": federation.clients[names[0]]})
    assert updates(engine.completed()) == [*names[1:], "late"]
    assert list(engine.completed()) == []


def test_only_outstanding_clients_can_be_requested(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = build(vlm)
    engine.submit(assignment, federation.clients)
    with pytest.raises(LookupError, match="'nobody' is not outstanding"):
        next(engine.completed(["nobody"]))
    engine.cancel()
    assert list(engine.completed()) == []


def test_an_error_in_settings_or_data_leaves_no_client_outstanding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """The same clients can be submitted again."""
    engine, assignment = build(vlm)
    name = min(federation.clients)
    broken = replace(assignment, algorithm=Breaks(assignment.algorithm, name, DataError("row 3 is bad")))  # type: ignore[arg-type]
    engine.submit(broken, federation.clients)
    with pytest.raises(DataError):
        next(engine.completed())
    assert updates(answers(engine, assignment, federation.clients)) == list(federation.clients)


def test_client_models_are_scored_in_this_process(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    engine, assignment = build(vlm)
    split = Split(lambda weights, base: {"score": float(len(weights)), "base": float(len(base))})
    count = float(len(assignment.broadcast.weights))
    assert engine.scores(assignment, ["a", "b"], split) == {name: {"score": count, "base": 0.0} for name in ("a", "b")}
    assert not engine.remote


def recording(fails: int = 0) -> tuple[PrivateSteps, list[str]]:
    """Private steps that record whose training is about to begin. The first ``fails`` calls after that run out of memory."""
    spent: list[str] = []

    def spend(client: str, steps: int, rate: float) -> None:
        spent.append(client)
        if len(spent) <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return PrivateSteps(1.0, 1.0, Noise(1), spend), spent


@pytest.mark.parametrize("together", [1, 16])
def test_private_steps_spend_for_the_update_and_for_the_personalized_model(
    together: int, vlm: VisionLanguageModel, federation: FederatedData, tmp_path: Path
) -> None:
    engine, assignment = build(vlm, together)
    names = sorted(federation.clients)
    private, spent = recording()
    ditto = build_algorithm(AlgorithmConfig(name="ditto"))
    assignment = replace(assignment, algorithm=ditto, states=RunStore(tmp_path).client_states("federated"))
    for answer in answers(replace(engine, private=private), assignment, federation.clients):
        assert isinstance(answer, ClientUpdate)
        assert answer.metrics.keys() == {"steps"}
    assert spent == ([name for name in names for _ in range(2)] if together == 1 else names * 2)


def test_a_retried_wave_spends_again(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """It is not known how far a failed training came."""
    engine, assignment = build(vlm)
    first, second, third = sorted(federation.clients)
    private, spent = recording(fails=1)
    found = list(answers(replace(engine, private=private), assignment, federation.clients))
    assert updates(iter(found)) == [first, second, third]
    assert spent == [first, first, second, third]


def test_a_refused_expense_stops_the_round_and_another_error_is_the_clients_failure(
    vlm: VisionLanguageModel, federation: FederatedData
) -> None:
    engine, assignment = build(vlm)
    errors: list[Exception] = [RunError("the budget is spent"), OSError("disk full")]

    def refuse(client: str, steps: int, rate: float) -> None:
        raise errors[0]

    private = replace(engine, private=PrivateSteps(1.0, 1.0, Noise(1), refuse))
    with pytest.raises(RunError, match="the budget is spent"):
        list(answers(private, assignment, federation.clients))
    errors.pop(0)
    assert list(answers(private, assignment, federation.clients)) == [
        ClientFailure(name, "OSError: disk full") for name in sorted(federation.clients)
    ]
