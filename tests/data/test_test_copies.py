from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fedmllm.data.federated import FederatedData
from fedmllm.data.test_copies import check_copy, own_kind, reduced_copy
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

BOTH = [Sample(f"s{i}", "q", "a", {"image": "x.png", "text": "near the old bridge"}) for i in range(5)]


def test_copies_have_the_content_that_they_are_named_after() -> None:
    assert [sample.modalities for sample in reduced_copy(BOTH, "image", 0)] == [("image",)] * 5
    assert [sample.modalities for sample in reduced_copy(BOTH, "image+text", 0)] == [("image", "text")] * 5
    assert [sample.content["text"] for sample in reduced_copy(BOTH, "truncation-1:0.5", 0)] == ["near the"] * 5


def test_copies_have_their_own_ids() -> None:
    """Encoded samples are cached, so a copy must never be taken for the complete sample."""
    ids = {sample.id for spec in ("image", "text", "typos") for sample in reduced_copy(BOTH, spec, 0)}
    assert len(ids) == 15
    assert ids.isdisjoint(sample.id for sample in BOTH)


def test_samples_without_any_content_are_left_out() -> None:
    mixed = [*BOTH, Sample("t", "q", "a", {"text": "t"})]
    assert len(reduced_copy(mixed, "image", 0)) == 5
    with pytest.raises(DataError, match=r"evaluation\.tested: audio leaves no test sample any content"):
        reduced_copy(mixed, "audio", 0)


@pytest.mark.parametrize("spec", ["", "Image", "image,text", "blur-2"])
def test_invalid_names_of_copies_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        check_copy(spec)


SPLIT = [Sample(f"t{i:03d}", "q", "a", {"image": "x.png", "text": "t"}, category="abc"[i % 3]) for i in range(300)]


def holding(**counts: int) -> list[Sample]:
    """A client's samples by category, with pictures only."""
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Sample(f"h{i:03d}", "q", "a", {"image": "x.png"}, category=name) for i, name in enumerate(names)]


def test_a_clients_kind_of_samples_has_its_frequencies_and_modalities() -> None:
    samples = own_kind(SPLIT, holding(a=30, b=10), "client-00", 40, 0)
    assert Counter(sample.category for sample in samples) == {"a": 30, "b": 10}
    assert {sample.modalities for sample in samples} == {("image",)}
    mixed = [replace(sample, content={"text": "t"}) if i % 2 else sample for i, sample in enumerate(holding(a=50))]
    kinds = Counter(sample.modalities for sample in own_kind(SPLIT, mixed, "client-00", 100, 0))
    # 100 fair draws: standard deviation 5.
    assert set(kinds) == {("image",), ("text",)}
    assert 30 <= kinds["image",] <= 70


def test_a_clients_kind_of_samples_is_drawn_without_repetition() -> None:
    samples = own_kind(SPLIT, holding(a=20, c=20), "client-00", 60, 0)
    drawn = [sample.id.partition("@")[0] for sample in samples]
    assert len(drawn) == len(set(drawn)) == 60
    assert set(drawn) <= {sample.id for sample in SPLIT}
    assert {sample.id for sample in samples}.isdisjoint(sample.id for sample in SPLIT)


def test_a_clients_kind_of_samples_depends_on_seed_and_client() -> None:
    held = holding(a=5, b=5)
    first = own_kind(SPLIT, held, "client-00", 20, 0)
    assert own_kind(SPLIT, held, "client-00", 20, 0) == first
    others = [own_kind(SPLIT, held, "client-01", 20, 0), own_kind(SPLIT, held, "client-00", 20, 1)]
    drawn = [{sample.id.partition("@")[0] for sample in samples} for samples in (first, *others)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_a_rare_category_is_drawn_once_and_a_small_split_completely() -> None:
    assert Counter(s.category for s in own_kind(SPLIT, holding(a=99, b=1), "client-00", 10, 0)) == {"a": 10, "b": 1}
    assert len(own_kind(SPLIT, holding(a=1), "client-00", 1000, 0)) == 100


def test_categories_that_the_test_split_lacks_are_left_out() -> None:
    assert own_kind(SPLIT, holding(z=4), "client-00", 10, 0) == ()
    assert Counter(s.category for s in own_kind(SPLIT, holding(z=5, a=5), "client-00", 10, 0)) == {"a": 5}
    assert own_kind([], holding(a=4), "client-00", 10, 0) == ()


def test_samples_without_the_clients_modalities_are_left_out() -> None:
    texts = [replace(sample, content={"text": "t"}) for sample in SPLIT]
    assert own_kind(texts, holding(a=4), "client-00", 10, 0) == ()


def test_no_client_is_scored_on_its_training_samples(federation: FederatedData) -> None:
    for client, held in federation.clients.items():
        samples = own_kind(federation.dataset.test, held, client, 10, 0)
        assert samples
        assert {sample.id.partition("@")[0] for sample in samples}.isdisjoint(sample.id for sample in held)
        assert {sample.modalities for sample in samples} <= {sample.modalities for sample in held}
