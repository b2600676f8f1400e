from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmllm.data.images import EDITS, open_image
from fedmllm.data.quality import PARTS, parse_part
from fedmllm.errors import ConfigError
from fedmllm.randomness import generator
from fedmllm.types import EditedImage, Sample

TEXT = "just saw smoke near the old bridge, send help please"


def picture() -> Image.Image:
    values = generator(0, "picture").integers(0, 256, size=(40, 60, 3))
    return Image.fromarray(values.astype(np.uint8))


def samples(count: int = 400) -> list[Sample]:
    page = picture()
    return [Sample(f"s{i}", "q", "a", {"image": page, "text": f"{TEXT} {i}"}) for i in range(count)]


def changed(before: Sequence[Sample], after: Sequence[Sample]) -> list[bool]:
    return [old.content != new.content for old, new in zip(before, after, strict=True)]


def corrupted(spec: str, before: Sequence[Sample], client: str = "c", seed: int = 0) -> list[Sample]:
    return parse_part(spec)(client, before, seed)


@pytest.mark.parametrize("kind", PARTS)
def test_a_corruption_changes_its_share_and_nothing_else(kind: str) -> None:
    before = samples()
    assert np.mean(changed(before, corrupted(f"{kind}-0.3", before))) == pytest.approx(0.3, abs=0.07)
    assert not any(changed(before, corrupted(f"{kind}-0", before)))
    for old, new in zip(before, corrupted(kind, before), strict=True):
        assert (old.id, old.question, old.answer, old.modalities) == (new.id, new.question, new.answer, new.modalities)
        assert [name for name in old.content if old.content[name] != new.content[name]] in (
            [["text"], []] if PARTS[kind].needs[-1] == "text" else [["image"]]
        )


@pytest.mark.parametrize("kind", PARTS)
def test_a_samples_corruption_does_not_depend_on_its_position(kind: str) -> None:
    """Decisions depend on the sample, so its position and neighbors do not matter, except for misaligned texts."""
    before = samples(50)
    there = {sample.id: sample for sample in corrupted(f"{kind}-0.5", before, "x")}
    again = {sample.id: sample for sample in corrupted(f"{kind}-0.5", before[::-1], "y")}
    if kind != "misaligned":
        assert {key: value.content for key, value in there.items()} == {key: value.content for key, value in again.items()}
    other = corrupted(f"{kind}-0.5", before, "x", seed=1)
    assert [s.content for s in other] != [there[s.id].content for s in other]


def test_a_corruption_by_client_changes_all_samples_or_none() -> None:
    before = samples(20)
    whole = [changed(before, corrupted("typos-0.4:0.5@client", before, f"c{k}")) for k in range(100)]
    assert all(all(flags) or not any(flags) for flags in whole)
    assert np.mean([flags[0] for flags in whole]) == pytest.approx(0.4, abs=0.15)


@pytest.mark.parametrize("kind", EDITS)
def test_edits_keep_the_size_and_are_reproducible(kind: str) -> None:
    edited = corrupted(kind, samples(1))[0].content["image"]
    assert isinstance(edited, EditedImage)
    first, again = open_image(edited), open_image(edited)
    assert first.size == (60, 40)
    assert first.tobytes() == again.tobytes() != picture().tobytes()


def test_stronger_edits_change_more() -> None:
    def distance(spec: str) -> float:
        edited = open_image(corrupted(spec, samples(1))[0].content["image"])  # type: ignore[arg-type]
        return float(np.abs(np.asarray(edited, dtype=float) - np.asarray(picture(), dtype=float)).mean())

    for kind, (weak, strong) in {"blur": (1, 10), "noise": (5, 80), "occlusion": (0.05, 0.6), "low_resolution": (2, 20)}.items():
        assert distance(f"{kind}-1:{weak}") < distance(f"{kind}-1:{strong}")


def test_occlusion_hides_its_share_of_the_area() -> None:
    white = [Sample("s", "q", "a", {"image": Image.new("RGB", (100, 80), "white")})]
    hidden = np.asarray(open_image(corrupted("occlusion-1:0.25", white)[0].content["image"]))  # type: ignore[arg-type]
    assert (hidden[..., 0] == 128).mean() == pytest.approx(0.25)


def test_several_edits_apply_in_order(tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    before = [Sample("s", "q", "a", {"image": tmp_path / "p.png"})]
    both = corrupted("noise", corrupted("blur", before))[0].content["image"]
    assert isinstance(both, EditedImage)
    assert [edit.name for edit in both.edits] == ["blur", "noise"]
    assert open_image(both).size == (60, 40)


def test_corruptions_of_text() -> None:
    before = samples(1)
    assert corrupted("truncation-1:0.5", before)[0].content["text"] == "just saw smoke near the old"  # 11 words: 5.5 rounds to 6
    assert corrupted("truncation-1:1", before)[0].content["text"] == "just"
    foreign = str(corrupted("wrong_language", before)[0].content["text"])
    assert not any("a" <= letter <= "z" for letter in foreign)
    assert len(foreign.split()) == 11
    assert corrupted("typos-1:0", before)[0].content["text"] == before[0].content["text"]


def test_typos_occur_at_their_rate() -> None:
    before = [Sample("s", "q", "a", {"text": "e" * 20_000})]
    after = str(corrupted("typos-1:0.3", before)[0].content["text"])
    # Unchanged letters stay e. A third of the changed ones vanish, a third are doubled, a third become any of 26 letters.
    assert sum(letter != "e" for letter in after) / 20_000 == pytest.approx(0.1 * 25 / 26, abs=0.01)
    assert len(after) / 20_000 == pytest.approx(1, abs=0.01)


def test_misaligned_texts_come_from_the_same_client() -> None:
    before = samples(30)
    texts = {sample.content["text"] for sample in before}
    after = corrupted("misaligned", before)
    assert all(new.content["text"] in texts for new in after)
    assert all(new.content["text"] != old.content["text"] for old, new in zip(before, after, strict=True))
    assert corrupted("misaligned", before[:1]) == before[:1]


def test_samples_without_the_modality_do_not_change() -> None:
    before = [Sample("s", "q", "a", {"text": TEXT}), Sample("t", "q", "a", {"audio": Path("a.wav")})]
    assert corrupted("blur", before) == before
    assert corrupted("misaligned", before) == before


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("fog-0.3", "'fog-0.3' is not a known corruption; known: blur"),
        ("blur-1.5", r"share must be in \[0, 1\]"),
        ("occlusion-0.5:2", r"strength of occlusion in \[0, 1\]"),
        ("blur-0.3.1", "must be numbers"),
        ("blur-0.3@site", "is not a known corruption"),
    ],
)
def test_invalid_corruptions_are_refused(spec: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse_part(spec)
