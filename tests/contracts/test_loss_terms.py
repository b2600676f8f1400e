"""The guarantees for loss terms, and a user's strategy that adds its own term in one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, Client
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.algorithms.strategies import Composed, Strategy
from fedmllm.algorithms.strategies.feature_alignment import Alignment, FeatureAlignment
from fedmllm.algorithms.strategies.label_calibration import Calibration
from fedmllm.data.federated import FederatedData
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import Assignment, InProcessEngine
from fedmllm.models.encoding import Encoded, answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import LossTerm, Parameters, TermStep, of_kind
from fedmllm.types import Broadcast, ClientUpdate, Sample
from scripted import answers

ONE_STEP = TrainingConfig(clip_norm=None)


@dataclass(frozen=True)
class Twice(Strategy, LossTerm):
    """Adds the loss of a step's answers a second time, from companion samples, and a pull towards the received weights."""

    pull: float = 0.0

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        return rule.with_term(self)

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        return [replace(own, companions={self.name: (encoder(sample),)}) for sample, own in zip(samples, encoded, strict=True)]

    def backward(self, step: TermStep) -> None:
        again = [copy for sample in step.samples for copy in sample.companions[self.name]]
        loss = answer_nll(step.vlm, collate(step.vlm, again)).sum() / sum(copy.answer_length for copy in again)
        loss.backward()  # type: ignore[no-untyped-call]

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor | None:
        return Proximal(self.pull).value(now, received, progress) if self.pull else None


@dataclass(frozen=True)
class Sum(LossTerm):
    """The sum of two penalties."""

    first: LossTerm
    second: LossTerm

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor:
        a, b = (term.value(now, received, progress) for term in (self.first, self.second))
        assert a is not None
        assert b is not None
        return a + b


@dataclass(frozen=True, eq=False)
class Draws(LossTerm):
    """Records the random numbers that it receives."""

    drawn: list[float]

    def backward(self, step: TermStep) -> None:
        self.drawn.append(step.rng.random())


class DrawsElse(Draws):
    """The same term under another name."""


@pytest.fixture
def samples(federation: FederatedData) -> list[Sample]:
    """Four samples of one client, which make one step."""
    return list(next(iter(federation.clients.values()))[:4])


@pytest.fixture
def task(vlm: VisionLanguageModel, encoder: Encoder, samples: list[Sample]) -> LocalTask:
    return LocalTask("a", 0, 0, [encoder(sample) for sample in samples], read_weights(vlm.model), 1e-3)


@pytest.mark.parametrize("together", [1, 3])
def test_a_strategy_trains_with_its_own_term(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, together: int, tmp_path: Path
) -> None:
    """All clients answer, and the strong pull keeps them near the received weights."""
    engine, start = InProcessEngine(vlm, encoder, TrainingConfig(), together), Broadcast(0, read_weights(vlm.model))
    moved = []
    for strategies in ((), (Twice(pull=1e6),)):
        method = cast(Algorithm, Composed(FedAvg(), strategies))
        assignment = Assignment(start, method, 1e-3, 0, RunStore(tmp_path).client_states("federated"))
        found = [answer for answer in answers(engine, assignment, federation.clients) if isinstance(answer, ClientUpdate)]
        assert [update.client for update in found] == list(federation.clients)
        moved.append(sum(W.norm(update.update) for update in found))
    assert 0 < moved[1] < 0.8 * moved[0]


def test_a_terms_gradient_is_added_to_the_loss_gradient(
    vlm: VisionLanguageModel, encoder: Encoder, samples: list[Sample], task: LocalTask
) -> None:
    """The loss of the same answers, added a second time, doubles the gradient, for a single client and for parallel clients."""
    prepared = replace(task, samples=Twice().prepare(vlm, encoder, samples, list(task.samples)))
    plain = LocalRule(records_gradient=True)
    doubled = plain.with_term(Twice())
    once = train_locally(vlm, task, plain, ONE_STEP).gradient
    beside = train_in_parallel(vlm, [(task, plain), (replace(prepared, client="b"), doubled)], ONE_STEP)
    for result in (train_locally(vlm, prepared, doubled, ONE_STEP), beside[1]):
        assert W.norm(W.subtract(result.gradient, {name: 2 * tensor for name, tensor in once.items()})) < 1e-3 * W.norm(once)
    assert W.norm(W.subtract(beside[0].gradient, once)) < 1e-3 * W.norm(once)


@pytest.mark.parametrize("place", ["method's", "strategies'", "one of each"])
def test_two_penalties_train_as_their_sum_bit_for_bit(vlm: VisionLanguageModel, task: LocalTask, place: str) -> None:
    a, b = Proximal(30.0), Proximal(0.7, lambda name: "lora_B" in name)
    rules = {
        "method's": LocalRule(terms=(a, b)),
        "strategies'": LocalRule().with_term(a).with_term(b),
        "one of each": LocalRule(terms=(a,)).with_term(b),
    }

    def ended(rule: LocalRule) -> LocalResult:
        return train_locally(vlm, task, rule, TrainingConfig(local_epochs=3))

    expected, found, plain = ended(LocalRule(terms=(Sum(a, b),))), ended(rules[place]), ended(LocalRule())
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
    assert not all(torch.equal(plain.weights[name], tensor) for name, tensor in expected.weights.items())


def test_a_strategys_term_sees_shared_weights_only_and_a_methods_sees_all() -> None:
    rule = LocalRule(own=frozenset({"kept"}))
    for adds, pulled in ((rule.with_term(Proximal(2.0)), {"shared"}), (replace(rule, terms=(Proximal(2.0),)), {"shared", "kept"})):
        now = {name: torch.ones(3, requires_grad=True) for name in ("shared", "kept")}
        value = adds.penalty(now, {name: torch.zeros(3) for name in now}, 0.0)
        assert value is not None
        value.backward()  # type: ignore[no-untyped-call]
        assert {name for name, tensor in now.items() if tensor.grad is not None} == pulled
        assert float(value.detach()) == pytest.approx(0.5 * 2.0 * 3 * len(pulled))


def test_terms_without_a_value_leave_no_penalty() -> None:
    assert LocalRule().penalty({}, {}, 0.0) is None
    assert LocalRule(terms=(LossTerm(), Calibration(1.0))).with_term(Alignment(1.0)).penalty({}, {}, 0.0) is None


def test_only_terms_with_a_backward_pass_declare_passes() -> None:
    assert [term.has_passes for term in (LossTerm(), Proximal(1.0), Calibration(1.0), Alignment(1.0), Twice())] == [False] * 3 + [True] * 2


def test_a_terms_random_numbers_depend_on_its_name(vlm: VisionLanguageModel, task: LocalTask) -> None:
    """Different names draw different numbers, and a second run draws the same ones. The alignment's name does not depend on its class name."""
    kept: list[list[float]] = [[], [], []]
    for term in (Draws(kept[0]), Draws(kept[1]), DrawsElse(kept[2])):
        train_locally(vlm, task, LocalRule(terms=(term,)), TrainingConfig(batch_size=1))
    assert kept[0] == kept[1]
    assert len(set(kept[0] + kept[2])) == 8
    assert Alignment(1.0).name == "alignment"


def test_a_strategy_replaces_an_existing_term_of_its_kind() -> None:
    others = (Proximal(1.0), Calibration(1.0))
    rules = [LocalRule(terms=(*others, Alignment(0.5))), LocalRule(terms=others).with_term(Alignment(0.5))]
    for rule in rules:
        replaced, neutral = (FeatureAlignment(weight).rule(rule, Broadcast(0, {}), Client()) for weight in (0.2, 0.0))
        assert replaced.all_terms == (*others, Alignment(0.2))
        assert neutral.all_terms == others
        assert of_kind(replaced.all_terms, Alignment) == Alignment(0.2)
        assert of_kind(neutral.all_terms, Alignment) is None
