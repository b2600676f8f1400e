from __future__ import annotations

from collections import Counter

import pytest

from fedmllm.data.modalities import apply_scenario
from fedmllm.data.scenarios import parse_scenario
from fedmllm.errors import ConfigError
from fedmllm.types import Sample

BOTH = ("image", "text")


def clients(num_clients: int = 10, size: int = 200) -> dict[str, list[Sample]]:
    return {f"c{k}": [Sample(f"c{k}-{i}", "q", "a", {"image": "x.png", "text": "t"}) for i in range(size)] for k in range(num_clients)}


def kinds(samples: tuple[Sample, ...]) -> Counter[tuple[str, ...]]:
    return Counter(sample.modalities for sample in samples)


def test_aligned_changes_nothing() -> None:
    before = clients()
    after, dropped = apply_scenario("aligned", before, BOTH, 0)
    assert {k: list(v) for k, v in after.items()} == before
    assert dropped == 0


def test_missing_drops_each_modality_independently() -> None:
    """Of n samples with rate b, a share b^2 loses both modalities, (1 - b) b loses each one, and (1 - b)^2 keeps both."""
    after, dropped = apply_scenario("missing-0.4", clients(), BOTH, 0)
    counts = sum((kinds(samples) for samples in after.values()), Counter())
    assert dropped + counts.total() == 2000
    assert dropped / 2000 == pytest.approx(0.16, abs=0.03)
    assert counts[("image",)] / 2000 == pytest.approx(0.24, abs=0.03)
    assert counts[("text",)] / 2000 == pytest.approx(0.24, abs=0.03)
    assert counts[BOTH] / 2000 == pytest.approx(0.36, abs=0.03)


def test_missing_depends_on_the_sample_not_the_client() -> None:
    whole, _ = apply_scenario("missing-0.4", clients(1, 50), BOTH, 0)
    moved = {"elsewhere": clients(1, 50)["c0"][::-1]}
    again, _ = apply_scenario("missing-0.4", moved, BOTH, 0)
    assert {s.id: s.modalities for s in whole["c0"]} == {s.id: s.modalities for s in again["elsewhere"]}


@pytest.mark.parametrize(("level", "images"), [("3:7", 3), ("5:5", 5), ("7:3", 7), ("0:1", 0), ("1:0", 10)])
def test_cross_gives_each_client_one_modality(level: str, images: int) -> None:
    after, dropped = apply_scenario(f"cross-{level}", clients(), BOTH, 0)
    held = [set(kinds(samples)) for samples in after.values()]
    assert dropped == 0
    assert held.count({("image",)}) == images
    assert held.count({("text",)}) == 10 - images


def test_hybrid_holds_each_modality_by_client() -> None:
    """A client keeps both with p^2. A client that draws neither, with (1 - p)^2, keeps one modality at random per sample."""
    after, dropped = apply_scenario("hybrid-0.7", clients(400, 8), BOTH, 0)
    held = Counter(frozenset(kinds(samples)) for samples in after.values())
    assert dropped == 0
    assert held[frozenset({BOTH})] / 400 == pytest.approx(0.49, abs=0.07)
    assert held[frozenset({("image",), ("text",)})] / 400 == pytest.approx(0.09, abs=0.05)
    assert held[frozenset({("image",)})] / 400 == pytest.approx(0.21, abs=0.06)


def test_remaining_content_is_unchanged() -> None:
    after, _ = apply_scenario("cross-1:0", clients(1, 1), BOTH, 0)
    assert after["c0"][0].content == {"image": "x.png"}
    assert after["c0"][0].question == "q"


def test_the_seed_decides_which_modalities_are_dropped() -> None:
    first, again, other = (apply_scenario("hybrid-0.6", clients(), BOTH, seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("scenario", ["cross-5:5", "hybrid-0.7"])
def test_separating_one_modality_is_refused(scenario: str) -> None:
    with pytest.raises(ConfigError, match="hold only image"):
        apply_scenario(scenario, clients(), ("image",), 0)


@pytest.mark.parametrize(
    "text", ["", "Missing-0.4", "missing--0.1", "missing-1", "cross-1:2:3", "cross-a:b", "hybrid-1.5", "aligned-0", "aligned-nan"]
)
def test_invalid_scenario_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_scenario(text)


def test_default_levels() -> None:
    assert parse_scenario("missing") == ("missing", "0.4")
    assert parse_scenario("aligned") == ("aligned", "")


THREE = ("audio", "image", "text")


def three_modalities(num_clients: int, size: int) -> dict[str, list[Sample]]:
    content = {"audio": "x.wav", "image": "x.png", "text": "t"}
    return {f"c{k}": [Sample(f"c{k}-{i}", "q", "a", content) for i in range(size)] for k in range(num_clients)}


def test_missing_and_hybrid_support_any_number_of_modalities() -> None:
    """With three modalities a sample loses all with b^3, and a client holds all with p^3."""
    after, dropped = apply_scenario("missing-0.5", three_modalities(4, 500), THREE, 0)
    assert dropped / 2000 == pytest.approx(0.125, abs=0.03)
    counts = sum((kinds(samples) for samples in after.values()), Counter())
    assert len(counts) == 7
    assert all(count / 2000 == pytest.approx(0.125, abs=0.03) for count in counts.values())
    after, dropped = apply_scenario("hybrid-0.5", three_modalities(800, 4), THREE, 0)
    whole = sum(set(kinds(samples)) == {THREE} for samples in after.values())
    assert whole / 800 == pytest.approx(0.125, abs=0.04)
    assert dropped == 0
