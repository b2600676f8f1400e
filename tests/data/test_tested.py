from __future__ import annotations

import pytest

from fedmllm.data.tested import check_copy, reduced_copy
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
