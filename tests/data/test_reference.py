"""The published reference splits, number by number, as the released code gives them for seed 42 and 10 clients."""

from __future__ import annotations

import pytest

from fedmllm.data import reference
from fedmllm.data.modalities import apply_scenario
from fedmllm.types import Sample

LABELS = ["no"] * 5481 + ["yes"] * 3019
"""Hateful Memes, later release."""

SIZES = {
    0.5: [523, 1433, 173, 30, 1014, 3, 4285, 123, 507, 409],
    1.0: [257, 2933, 1378, 577, 166, 166, 168, 1354, 704, 797],
    5.0: [821, 839, 1036, 737, 1215, 1040, 640, 919, 879, 374],
}
HELD = {
    "0.8": "10 11 11 10 11 10 01 11 11 11",
    "0.7": "10 01 11 10 10 10 01 11 11 11",
    "0.6": "10 01 11 10 00 10 01 11 11 11",
}


@pytest.mark.parametrize("alpha", SIZES)
def test_client_sizes_equal_the_published_ones(alpha: float) -> None:
    parts = reference.dirichlet(LABELS, ("no", "yes"), 10, alpha)
    assert [len(part) for part in parts] == SIZES[alpha]
    assert sorted(i for part in parts for i in part.tolist()) == list(range(8500))


def test_samples_are_taken_in_file_order() -> None:
    """The first client gets the first rows of each class."""
    first = reference.dirichlet(LABELS, ("no", "yes"), 10, 5.0)[0].tolist()
    without = [i for i in first if i < 5481]
    assert without == list(range(len(without)))
    assert [i for i in first if i >= 5481] == list(range(5481, 5481 + len(first) - len(without)))


def test_the_first_class_reaches_every_client() -> None:
    parts = reference.dirichlet(["a"] * 12 + ["b"] * 3, ("a", "b"), 10, 0.05)
    assert all(any(i < 12 for i in part) for part in parts)


def clients(content: dict[str, str]) -> dict[str, list[Sample]]:
    return {f"client-{k}": [Sample(f"{k}-{i}", "q", "a", dict(content)) for i in range(30)] for k in range(10)}


@pytest.mark.parametrize(("level", "images"), [("3:7", {0, 1, 4}), ("5:5", {0, 1, 4, 6, 9}), ("7:3", {0, 1, 4, 5, 6, 8, 9})])
def test_cross_clients_equal_the_published_ones(level: str, images: set[int]) -> None:
    after, _ = apply_scenario(f"cross-{level}", clients({"image": "x", "text": "t"}), ("image", "text"), 7, protocol="reference")
    assert {k for k in range(10) if after[f"client-{k}"][0].modalities == ("image",)} == images


@pytest.mark.parametrize("level", HELD)
def test_hybrid_modalities_equal_the_published_ones(level: str) -> None:
    """A client with neither modality (00) keeps one of the two in every sample."""
    after, dropped = apply_scenario(f"hybrid-{level}", clients({"image": "x", "text": "t"}), ("image", "text"), 7, protocol="reference")
    assert dropped == 0
    for bits, samples in zip(HELD[level].split(), after.values(), strict=True):
        kinds = {sample.modalities for sample in samples}
        if bits == "00":
            assert kinds == {("image",), ("text",)}
        else:
            assert kinds == {tuple(name for name, bit in zip(("image", "text"), bits, strict=True) if bit == "1")}
