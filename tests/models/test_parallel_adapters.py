"""Several clients' adapters on one model: which factors each row of a batch goes through. The suite of all families is in ``contracts``."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import adapted_layers, attach_lora, read_weights
from fedmllm.models.parallel_adapters import grouped, parallel_adapters, stackable, stacked
from fedmllm.models.parts import LoraConfig
from fedmllm.types import Weights
from tiny_families import load


def clients_of(vlm: VisionLanguageModel, count: int) -> list[Weights]:
    generator = torch.Generator().manual_seed(1)
    own = read_weights(vlm.model)
    return [{name: torch.randn(t.shape, generator=generator).requires_grad_() for name, t in own.items()} for _ in range(count)]


def first_layer(vlm: VisionLanguageModel) -> tuple[str, Any]:
    return next(adapted_layers(vlm.model))


def rows_for(vlm: VisionLanguageModel, count: int) -> Tensor:
    return torch.randn(count, 3, first_layer(vlm)[1].in_features, generator=torch.Generator().manual_seed(2))


def by_definition(vlm: VisionLanguageModel, x: Tensor, members: Sequence[Weights], counts: Sequence[int]) -> Tensor:
    """``W x + (alpha / r) B_k A_k x`` row by row."""
    name, layer = first_layer(vlm)
    base, rows = layer.get_base_layer(), []
    for k, count in enumerate(counts):
        change = layer.scaling["default"] * members[k][f"{name}.lora_B.weight"] @ members[k][f"{name}.lora_A.weight"]
        rows += [base(row) + row @ change.T for row in x[len(rows) : len(rows) + count]]
    return torch.stack(rows)


@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (3, 0, 1)])
def test_every_row_goes_through_its_own_clients_factors(vlm: VisionLanguageModel, counts: tuple[int, ...]) -> None:
    """Also with different numbers of rows, or none. Each client's factors get the gradient of its own rows only."""
    members, x = clients_of(vlm, len(counts)), rows_for(vlm, 4)
    name, layer = first_layer(vlm)
    factors = [member[f"{name}.lora_{letter}.weight"] for member in members for letter in "AB"]
    expected = by_definition(vlm, x, members, counts)
    wanted = torch.autograd.grad(expected.square().sum(), factors, materialize_grads=True)
    with parallel_adapters(vlm.model) as layers, stacked(layers, members, counts):
        found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), factors), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-3)


def test_grouped_factors_serve_equally_many_rows_each(vlm: VisionLanguageModel) -> None:
    """As ``stacked`` with equal counts; with a group for each row, a row's factors get the gradient of that row alone."""
    members, x = clients_of(vlm, 4), rows_for(vlm, 4)
    name, layer = first_layer(vlm)
    own = {name: torch.stack([member[name].detach() for member in members]).requires_grad_() for name in members[0]}
    with parallel_adapters(vlm.model) as layers, grouped(layers, own):
        found = layer(x)
    torch.testing.assert_close(found, by_definition(vlm, x, members, [1] * 4), atol=1e-4, rtol=1e-4)
    found[2].square().sum().backward()
    gradient = own[f"{name}.lora_B.weight"].grad
    assert gradient is not None
    assert gradient[2].any()
    assert not gradient[[0, 1, 3]].any()


def test_the_models_own_adapters_are_off_in_the_block_and_on_after_it(vlm: VisionLanguageModel) -> None:
    """Also after an error."""
    _, layer = first_layer(vlm)
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = rows_for(vlm, 2)
    with torch.no_grad():
        own, frozen = layer(x), layer.get_base_layer()(x)

    def interrupted() -> None:
        with torch.no_grad(), parallel_adapters(vlm.model) as layers:
            assert layers == dict(adapted_layers(vlm.model))
            assert torch.equal(layer(x), frozen)
            raise ZeroDivisionError

    assert not torch.equal(own, frozen)
    with pytest.raises(ZeroDivisionError):
        interrupted()
    with torch.no_grad():
        assert torch.equal(layer(x), own)


def test_threads_use_the_factors_of_their_own_block(vlm: VisionLanguageModel) -> None:
    """Both threads are in their block before either computes."""
    members, x, found = clients_of(vlm, 4), rows_for(vlm, 2), dict[int, Tensor]()
    _, layer = first_layer(vlm)
    together = Barrier(2, timeout=60)

    def work(i: int, layers: dict[str, Any]) -> None:
        with torch.no_grad(), stacked(layers, members[i : i + 2], (1, 1)):
            together.wait()
            found[i] = layer(x)
            together.wait()

    with parallel_adapters(vlm.model) as layers:
        threads = [Thread(target=work, args=(i, layers)) for i in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in (0, 2):
        torch.testing.assert_close(found[i], by_definition(vlm, x, members[i : i + 2], (1, 1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "stacks"),
    [
        ({}, True),
        ({"targets": "all-linear"}, True),
        ({"connector": "lora"}, False),
        ({"embeddings": "full"}, False),
        ({"dora": True}, False),
    ],
)
def test_clients_share_passes_only_if_nothing_but_the_decoders_factors_trains(settings: dict[str, Any], stacks: bool) -> None:
    assert stackable(attach_lora(load("llava"), LoraConfig(**settings), 0).model) is stacks
