from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fedmllm.data.federated import FederatedData
from fedmllm.data.test_copies import check_copy, own_kind, reduced_copy
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

BOTH = [Sample(f"s{i}", "q", "a", {"image": "x.png", "text": "near the old bridge"}) for i in range(5)]


def test_copies_hold_what_they_are_named_after() -> None:
    assert [sample.modalities for sample in reduced_copy(BOTH, "image", 0)] == [("image",)] * 5
    assert [sample.modalities for sample in reduced_copy(BOTH, "image+text", 0)] == [("image", "text")] * 5
    assert [sample.content["text"] for sample in reduced_copy(BOTH, "truncation-1:0.5", 0)] == ["near the"] * 5


def test_copies_have_ids_of_their_own() -> None:
    """Encoded samples are kept by id: a copy must never be taken for the complete sample."""
    ids = {sample.id for spec in ("image", "text", "typos") for sample in reduced_copy(BOTH, spec, 0)}
    assert len(ids) == 15
    assert ids.isdisjoint(sample.id for sample in BOTH)


def test_samples_left_with_nothing_are_not_asked() -> None:
    mixed = [*BOTH, Sample("t", "q", "a", {"text": "t"})]
    assert len(reduced_copy(mixed, "image", 0)) == 5
    with pytest.raises(DataError, match=r"evaluation\.tested: audio leaves no test sample any content"):
        reduced_copy(mixed, "audio", 0)


@pytest.mark.parametrize("spec", ["", "Image", "image,text", "blur-2"])
def test_what_names_no_copy(spec: str) -> None:
    with pytest.raises(ConfigError):
        check_copy(spec)


SPLIT = [Sample(f"t{i:03d}", "q", "a", {"image": "x.png", "text": "t"}, category="abc"[i % 3]) for i in range(300)]


def holding(**counts: int) -> list[Sample]:
    """A client's samples of some categories, with pictures only."""
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Sample(f"h{i:03d}", "q", "a", {"image": "x.png"}, category=name) for i, name in enumerate(names)]


def test_a_client_s_own_kind_has_its_frequencies_and_its_modalities() -> None:
    asked = own_kind(SPLIT, holding(a=30, b=10), "client-00", 40, 0)
    assert Counter(sample.category for sample in asked) == {"a": 30, "b": 10}
    assert {sample.modalities for sample in asked} == {("image",)}
    mixed = [replace(sample, content={"text": "t"}) if i % 2 else sample for i, sample in enumerate(holding(a=50))]
    kinds = Counter(sample.modalities for sample in own_kind(SPLIT, mixed, "client-00", 100, 0))
    # 100 fair draws: standard deviation 5.
    assert set(kinds) == {("image",), ("text",)}
    assert 30 <= kinds["image",] <= 70


def test_a_client_s_own_kind_is_drawn_once_from_the_test_split() -> None:
    asked = own_kind(SPLIT, holding(a=20, c=20), "client-00", 60, 0)
    drawn = [sample.id.partition("@")[0] for sample in asked]
    assert len(drawn) == len(set(drawn)) == 60
    assert set(drawn) <= {sample.id for sample in SPLIT}
    assert {sample.id for sample in asked}.isdisjoint(sample.id for sample in SPLIT)


def test_a_client_s_own_kind_is_decided_by_seed_and_client() -> None:
    held = holding(a=5, b=5)
    first = own_kind(SPLIT, held, "client-00", 20, 0)
    assert own_kind(SPLIT, held, "client-00", 20, 0) == first
    others = [own_kind(SPLIT, held, "client-01", 20, 0), own_kind(SPLIT, held, "client-00", 20, 1)]
    drawn = [{sample.id.partition("@")[0] for sample in asked} for asked in (first, *others)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_a_rare_category_is_asked_once_and_a_small_split_as_a_whole() -> None:
    assert Counter(s.category for s in own_kind(SPLIT, holding(a=99, b=1), "client-00", 10, 0)) == {"a": 10, "b": 1}
    assert len(own_kind(SPLIT, holding(a=1), "client-00", 1000, 0)) == 100


def test_categories_that_the_test_split_lacks_are_not_asked() -> None:
    assert own_kind(SPLIT, holding(z=4), "client-00", 10, 0) == ()
    assert Counter(s.category for s in own_kind(SPLIT, holding(z=5, a=5), "client-00", 10, 0)) == {"a": 5}
    assert own_kind([], holding(a=4), "client-00", 10, 0) == ()


def test_samples_that_the_kept_modalities_leave_empty_are_not_asked() -> None:
    texts = [replace(sample, content={"text": "t"}) for sample in SPLIT]
    assert own_kind(texts, holding(a=4), "client-00", 10, 0) == ()


def test_no_client_is_asked_what_it_trained_on(federation: FederatedData) -> None:
    for client, held in federation.clients.items():
        asked = own_kind(federation.dataset.test, held, client, 10, 0)
        assert asked
        assert {sample.id.partition("@")[0] for sample in asked}.isdisjoint(sample.id for sample in held)
        assert {sample.modalities for sample in asked} <= {sample.modalities for sample in held}
