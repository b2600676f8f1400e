"""Chains of update transforms: their order, what clients keep, and the methods that they do not suit."""

from __future__ import annotations

import pytest
import torch

from fedmllm.algorithms import (
    ALGORITHMS,
    Aggregate,
    AlgorithmConfig,
    Chain,
    ClientContext,
    ServerState,
    build_algorithm,
)
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.compression import CompressionConfig, compression
from fedmllm.errors import ConfigError
from fedmllm.types import Broadcast, ClientUpdate
from user_transforms import Clipped, Shifted


def test_clients_apply_a_chain_in_order_and_the_server_in_reverse() -> None:
    chain = Chain((Clipped(1.0), Shifted(10.0)))
    update = ClientUpdate("a", {"w": torch.tensor([3.0, 4.0])}, 1)
    sent, kept = chain.client(update, ClientContext("a", FedAvg(), Broadcast(0, {})))
    torch.testing.assert_close(sent.update["w"], torch.tensor([10.6, 10.8]))
    assert {name: list(slot) for name, slot in kept.items()} == {"clipped.rest": ["w"], "shifted.count": ["n"]}
    again, kept = chain.client(update, ClientContext("a", FedAvg(), Broadcast(1, {}), kept=kept | {"personal": {"w": torch.ones(1)}}))
    # (3, 4) and the residual (2.4, 3.2) have the same direction and are cut to length 1.
    torch.testing.assert_close(again.update["w"], torch.tensor([10.6, 10.8]))
    assert float(kept["shifted.count"]["n"]) == 2
    assert chain.weigh(1.0, update, ServerState({})) == 11
    mean = chain.aggregate(Aggregate({"update": {"w": torch.zeros(1)}}, 1), ServerState({})).mean["update"]["w"]
    assert float(mean) == 2 * (0 + 10)


def test_an_empty_chain_changes_nothing() -> None:
    update, chain = ClientUpdate("a", {"w": torch.ones(2)}, 3), Chain()
    assert chain.client(update, ClientContext("a", FedAvg(), Broadcast(0, {}))) == (update, {})
    assert chain.weigh(3.0, update, ServerState({})) == 3.0
    aggregate = Aggregate({}, 0)
    assert chain.aggregate(aggregate, ServerState({})) is aggregate
    assert chain.codec is None


def test_the_last_transform_sets_the_codec() -> None:
    (writes,) = compression(CompressionConfig(name="int8"))
    assert Chain((Clipped(1.0), writes)).codec is writes.codec


@pytest.mark.parametrize("name", sorted(name for name, cls in ALGORITHMS.items() if cls.ignores_weights))
def test_a_transform_of_weights_is_refused_by_methods_that_ignore_them(name: str) -> None:
    with pytest.raises(ConfigError, match=f"shifted changes the weights of updates, but {name} ignores these weights; remove one of them"):
        Shifted(1.0).require(build_algorithm(AlgorithmConfig(name=name)), name)
    Shifted(1.0).require(FedAvg(), "fedavg")
    Clipped(1.0).require(build_algorithm(AlgorithmConfig(name=name)), name)
