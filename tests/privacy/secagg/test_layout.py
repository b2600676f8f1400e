from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.layout import Entry, Layout

names = st.dictionaries(st.text(min_size=1, max_size=3), st.lists(st.integers(0, 3), max_size=3), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=3), names, max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_tensors_come_back_as_they_were(shapes: dict[str, dict[str, list[int]]], dtype: torch.dtype) -> None:
    slots = {kind: {name: torch.randn(shape).to(dtype) for name, shape in tensors.items()} for kind, tensors in shapes.items()}
    layout = Layout.of(slots)
    vector = layout.flat(slots)
    assert vector.dtype == np.float64
    assert vector.shape == (layout.length,)
    found = layout.slots(vector)
    assert found.keys() == {kind for kind in slots if slots[kind]}
    for kind, tensors in found.items():
        assert tensors.keys() == slots[kind].keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, slots[kind][name].double())


def test_the_order_is_by_kind_and_name() -> None:
    slots = {"b": {"y": torch.tensor([[4.0, 5.0]]), "x": torch.tensor(3.0)}, "a": {"z": torch.tensor([1.0, 2.0])}}
    layout = Layout.of(slots)
    assert layout.entries == (Entry("a", "z", (2,)), Entry("b", "x", ()), Entry("b", "y", (1, 2)))
    assert layout.flat(slots).tolist() == [1, 2, 3, 4, 5]
    assert Layout.of(dict(reversed(slots.items()))) == layout


def test_other_tensors_are_refused() -> None:
    slots = {"update": {"a": torch.zeros(2, 3), "b": torch.zeros(4)}}
    layout = Layout.of(slots)
    for wrong in (
        {"update": {"a": torch.zeros(2, 3)}},
        {"update": {**slots["update"], "b": torch.zeros(5)}},
        {"update": {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}},
        {"other": slots["update"]},
    ):
        with pytest.raises(FederationError, match=r"must have the same tensors, but .* is missing, unexpected or of another shape"):
            layout.flat(wrong)
    with pytest.raises(FederationError, match=r"must have the shape \(10,\), got \(9,\)"):
        layout.slots(np.zeros(9))


def test_digests_tell_layouts_apart() -> None:
    shapes = [
        {"a": {"b": (2, 3)}},
        {"a": {"b": (3, 2)}},
        {"a": {"b": (6,)}},
        {"a": {"c": (2, 3)}},
        {"b": {"b": (2, 3)}},
        {"a": {"b": (2,), "c": (3,)}},
    ]
    layouts = [
        Layout.of({kind: {name: torch.zeros(shape) for name, shape in tensors.items()} for kind, tensors in each.items()})
        for each in shapes
    ]
    assert len({layout.digest for layout in layouts}) == len(shapes)
    assert Layout.of({"a": {"b": torch.ones(2, 3)}}).digest == layouts[0].digest
