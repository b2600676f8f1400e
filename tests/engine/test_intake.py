"""What the server makes of what clients do not tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmllm.algorithms import Algorithm, AlgorithmConfig, ServerState, StrategyConfig, build_algorithm
from fedmllm.engine.intake import Intake, Origin
from fedmllm.engine.stages import Stage
from fedmllm.types import ClientUpdate, Holding, Population

START = {"layers.0.w": torch.zeros(2)}
UPDATE = ClientUpdate("a", {"layers.0.w": torch.ones(2)}, 12, {"loss": 1.0, "steps": 3.0}, profile={"image": 12})


def method(name: str, **strategies: dict[str, float]) -> Algorithm:
    chosen = tuple(StrategyConfig(name=strategy, parameters=parameters) for strategy, parameters in strategies.items())
    return build_algorithm(AlgorithmConfig(name=name, strategies=chosen))


def intake(algorithm: Algorithm, **settings: object) -> Intake:
    state = replace(algorithm.init(START, {}), population=Population(2, {"image": 12, "text": 4}))
    return Intake(algorithm, state, {}, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "update", "fact"),
    [
        (method("fednova"), replace(UPDATE, metrics={}), "steps"),
        (method("fednova", modality_coverage={}), replace(UPDATE, profile={}), "profile"),
        (method("fedavg", modality_coverage={}), replace(UPDATE, profile={}), "profile"),
        (method("fedavg", adaptive_regularization={"adaptivity": 1.0}), replace(UPDATE, profile={}), "profile"),
    ],
)
def test_no_number_stands_for_what_a_method_needs(algorithm: Algorithm, update: ClientUpdate, fact: str) -> None:
    """An update that withholds it is refused and named; the same method takes one that tells."""
    taken = intake(algorithm)
    taken.take(update)
    taken.take(replace(UPDATE, client="b"))
    assert taken.record()["refused"] == [{"client": "a", "reason": f"the update does not report {fact}, which the method needs"}]
    assert set(taken.accepted) == {"b"}


@pytest.mark.parametrize(
    "algorithm", [method("fedavg"), method("fedavg", adaptive_regularization={}), method("fedyogi", label_calibration={})]
)
def test_what_a_method_does_not_need_may_be_withheld(algorithm: Algorithm) -> None:
    taken = intake(algorithm)
    taken.take(replace(UPDATE, metrics={}, profile={}))
    assert not taken.record()["refused"]


def test_a_client_that_withholds_its_samples_weighs_as_one_and_is_named() -> None:
    taken = intake(method("fedavg"))
    taken.take(UPDATE)
    taken.take(replace(UPDATE, client="b", num_samples=None, update={"layers.0.w": torch.full((2,), 14.0)}, metrics={"loss": 14.0}))
    record = taken.record()
    assert (record["num_samples"], record["withheld"], record["refused"]) == (12, ["b"], [])
    assert record["loss"] == (12 + 14) / 13
    assert taken.aggregate().mean["update"]["layers.0.w"].tolist() == pytest.approx([(12 + 14) / 13] * 2)


def test_an_update_is_not_measured_by_samples_that_are_not_known() -> None:
    """12 samples reach a norm of 12, and one sample would of 1: whoever withholds how many is refused for neither."""
    taken = intake(method("fedavg"))
    sent = Origin(ServerState(START), largest=lambda kind, count: float(count))
    far = replace(UPDATE, update={"layers.0.w": torch.tensor([5.0, 0.0])})
    taken.take(far, sent)
    taken.take(replace(far, client="b", num_samples=1), sent)
    taken.take(replace(far, client="c", num_samples=None), sent)
    assert set(taken.accepted) == {"a", "c"}
    assert "the norm of the update is 5, the limit is 1" in taken.record()["refused"][0]["reason"]


def test_who_withheld_its_samples_at_first_cannot_claim_any_later() -> None:
    reported = {"a": Holding(None), "b": Holding(12, {"image": 12})}
    stage = Stage("federated", {"a": (), "b": (), "later": ()}, 1, 1, reported=reported)
    assert (stage.claim("a"), stage.claim("b"), stage.claim("later"), stage.num_samples) == (0, 12, None, 12)
    taken = intake(method("fedavg"), claim=stage.claim)
    for client, count in (("a", 5), ("b", None), ("later", 5)):
        taken.take(replace(UPDATE, client=client, num_samples=count))
    assert set(taken.accepted) == {"b", "later"}
    assert taken.record()["refused"][0]["reason"] == "the update claims 5 training samples, the client reported 0 before the first round"


def test_a_client_that_took_no_step_does_not_count_in_fednova_as_one() -> None:
    """Of equal weights, 4 steps and none: tau = 2, and the one that moved moves the weights by 2 / 4 / 2 of its update."""
    algorithm = method("fednova")
    taken = intake(algorithm)
    taken.take(replace(UPDATE, metrics={"steps": 4.0}))
    taken.take(replace(UPDATE, client="b", update={"layers.0.w": torch.zeros(2)}, metrics={"steps": 0.0}))
    after = algorithm.server_step(ServerState(START), taken.aggregate())
    assert after.weights["layers.0.w"].tolist() == pytest.approx([0.25, 0.25])
