"""How the server treats facts that clients withhold, and tensors that are missing or unexpected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmllm.algorithms import Algorithm, AlgorithmConfig, ServerState, StrategyConfig, build_algorithm
from fedmllm.engine.intake import Intake, Origin, refusal
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
def test_an_update_that_withholds_a_required_fact_is_refused(algorithm: Algorithm, update: ClientUpdate, fact: str) -> None:
    """An update that withholds a required fact is refused by name; the same method accepts one that reports it."""
    server = intake(algorithm)
    server.take(update)
    server.take(replace(UPDATE, client="b"))
    assert server.record()["refused"] == [{"client": "a", "reason": f"the update does not report {fact}, which the method needs"}]
    assert set(server.accepted) == {"b"}


@pytest.mark.parametrize(
    "algorithm", [method("fedavg"), method("fedavg", adaptive_regularization={}), method("fedyogi", label_calibration={})]
)
def test_facts_that_a_method_does_not_need_may_be_withheld(algorithm: Algorithm) -> None:
    server = intake(algorithm)
    server.take(replace(UPDATE, metrics={}, profile={}))
    assert not server.record()["refused"]


def test_a_client_without_a_sample_count_weighs_as_one_sample_and_is_named() -> None:
    server = intake(method("fedavg"))
    server.take(UPDATE)
    server.take(replace(UPDATE, client="b", num_samples=None, update={"layers.0.w": torch.full((2,), 14.0)}, metrics={"loss": 14.0}))
    record = server.record()
    assert (record["num_samples"], record["withheld"], record["refused"]) == (12, ["b"], [])
    assert record["loss"] == (12 + 14) / 13
    assert server.aggregate().mean["update"]["layers.0.w"].tolist() == pytest.approx([(12 + 14) / 13] * 2)


def test_an_update_without_a_sample_count_has_no_norm_limit() -> None:
    """12 samples allow a norm of 12, one sample a norm of 1. An update without a count is checked against neither."""
    server = intake(method("fedavg"))
    sent = Origin(ServerState(START), largest=lambda kind, count: float(count))
    far = replace(UPDATE, update={"layers.0.w": torch.tensor([5.0, 0.0])})
    server.take(far, sent)
    server.take(replace(far, client="b", num_samples=1), sent)
    server.take(replace(far, client="c", num_samples=None), sent)
    assert set(server.accepted) == {"a", "c"}
    assert "the norm of the update is 5, the limit is 1" in server.record()["refused"][0]["reason"]


def test_a_client_that_withheld_its_sample_count_cannot_claim_one_later() -> None:
    reported = {"a": Holding(None), "b": Holding(12, {"image": 12})}
    stage = Stage("federated", {"a": (), "b": (), "later": ()}, 1, 1, reported=reported)
    assert (stage.claim("a"), stage.claim("b"), stage.claim("later"), stage.num_samples) == (0, 12, None, 12)
    server = intake(method("fedavg"), claim=stage.claim)
    for client, count in (("a", 5), ("b", None), ("later", 5)):
        server.take(replace(UPDATE, client=client, num_samples=count))
    assert set(server.accepted) == {"b", "later"}
    assert server.record()["refused"][0]["reason"] == "the update claims 5 training samples, the client reported 0 before the first round"


def test_a_client_without_steps_does_not_count_as_one_step_in_fednova() -> None:
    """With equal weights and 4 and 0 steps, tau = 2, and the client that moved contributes 2 / 4 / 2 of its update."""
    algorithm = method("fednova")
    server = intake(algorithm)
    server.take(replace(UPDATE, metrics={"steps": 4.0}))
    server.take(replace(UPDATE, client="b", update={"layers.0.w": torch.zeros(2)}, metrics={"steps": 0.0}))
    after = algorithm.server_step(ServerState(START), server.aggregate())
    assert after.weights["layers.0.w"].tolist() == pytest.approx([0.25, 0.25])


def test_refusal_names_missing_and_unexpected_extras() -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(3)}
    update = ClientUpdate("c", expected, 1, extras={"control": {"a": torch.ones(2)}})
    assert "control: 1 tensors are missing" in str(refusal(update, expected, ("control",)))
    assert "expected none" in str(refusal(update, expected))
