"""EmojiTwo: entries that are read, left out and refused, and the real files where they are available."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.emojitwo import CLASSES, load
from fedmllm.data.images import open_image
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

Entry = dict[str, Any]


def entry(name: str, category: str = "people", **changes: object) -> Entry:
    return {"name": name, "shortname": f":{name}:", "category": category, "ascii": [], "keywords": ["happy", "smiley"], **changes}


def write(root: Path, more: dict[str, Any] | None = None, pictures: tuple[str, ...] = ()) -> Path:
    """Eight good entries, one for each class, and their pictures."""
    entries = {f"1f60{i}": entry(f"face {i}", category) for i, category in enumerate(CLASSES)}
    (root / "png" / "128").mkdir(parents=True, exist_ok=True)
    for code in (*entries, *pictures):
        (root / "png" / "128" / f"{code}.png").touch()
    (root / "emoji.json").write_text(json.dumps({**entries, **(more or {})}, indent="\t"))
    return root


def everything(dataset: Dataset) -> dict[str, Sample]:
    return {s.id: s for s in (*dataset.train, *dataset.test)}


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def test_an_entry_becomes_a_sample(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path), 0, validation_share=0))

    content = {"image": tmp_path / "png/128/1f603.png", "text": "face 3: happy, smiley"}
    options = ("symbols", "flags", "people", "objects", "nature", "travel", "food", "activity")
    expected = Sample("emojitwo-1f603", "Which kind of thing is it?", "objects", content, options, "objects")
    assert everything(dataset)["emojitwo-1f603"] == expected
    assert {s.answer for s in everything(dataset).values()} == set(options)
    assert (dataset.name, dataset.metric, dataset.modalities) == ("emojitwo", "macro_f1", ("image", "text"))
    assert load_dataset("emojitwo", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


@pytest.mark.parametrize(("keywords", "text"), [([], "flag"), (["a"], "flag: a"), ([" a  b ", 8], "flag: a b, 8"), (None, "flag")])
def test_keywords_follow_the_name(keywords: list[object] | None, text: str, tmp_path: Path) -> None:
    """None means that the key is missing."""
    flag = {key: value for key, value in entry(" flag\n", "flags", keywords=keywords).items() if keywords is not None or key != "keywords"}
    dataset = load(DatasetRequest(write(tmp_path, {"1f1e6-1f1e8": flag}, ("1f1e6-1f1e8",)), 0, validation_share=0))

    assert everything(dataset)["emojitwo-1f1e6-1f1e8"].content["text"] == text


LEFT_OUT = {
    "no category": ("1f900", entry("x", "")),
    "a skin tone alone": ("1f3fb", entry("x", "modifier")),
    "a letter of flags": ("1f1e6", entry("x", "regional")),
    "a skin tone of another": ("1f44b-1f3ff", entry("x")),
    "a skin tone within": ("1f468-1f3fd-200d-2695", entry("x")),
    "keywords of no matter": ("1f900", entry("x", "", keywords="x")),
}


@pytest.mark.parametrize(("code", "row"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_entries_without_a_category_and_skin_tone_variants_are_left_out(code: str, row: Entry, tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path, {code: row}, (code,)), 0, validation_share=0))

    assert (len(everything(dataset)), dataset.notes[0]) == (
        8,
        "1 of 9 entries left out: no image, no usable category, or a skin-tone variant",
    )


@pytest.mark.parametrize("code", ["1f900", "a" * 5000])
def test_an_entry_without_a_picture_is_left_out(code: str, tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path, {code: entry("x")}), 0, validation_share=0))

    assert (len(everything(dataset)), dataset.notes[0].split(":")[0]) == (8, "1 of 9 entries left out")


@pytest.mark.parametrize(("options", "held"), [({}, 2), ({"test_share": 0.5}, 4)])
def test_the_held_out_share_does_not_depend_on_the_order_of_entries(options: dict[str, float], held: int, tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path), 0, options=options, validation_share=0))
    entries = json.loads((tmp_path / "emoji.json").read_text())
    (tmp_path / "emoji.json").write_text(json.dumps(dict(reversed(entries.items()))))

    assert len(dataset.test) == held
    assert load(DatasetRequest(tmp_path, 0, options=options, validation_share=0)) == dataset
    assert load(DatasetRequest(tmp_path, 1, options=options, validation_share=0)).test != dataset.test


BAD = {
    "unknown category": ("1f900", entry("x", "peoples"), "category must be one of , modifier, regional, symbols, "),
    "category null": ("1f900", entry("x", category=None), "category must be one of "),  # type: ignore[arg-type]
    "category a list": ("1f900", entry("x", category=[]), "category must be one of "),  # type: ignore[arg-type]
    "no category": ("1f900", {"name": "x"}, "lacks category"),
    "no name": ("1f900", entry(""), "name must be text that is not empty, got ''"),
    "keywords in one": ("1f900", entry("x", keywords="happy"), "keywords must be a list of words, got 'happy'"),
    "an empty keyword": ("1f900", entry("x", keywords=["happy", ""]), "keywords must be a list of words, got ['happy', '']"),
    "no object": ("1f900", ["x"], "must be an object with keys, got ['x']"),
    "a path": ("../1f600", entry("x"), "an entry's name must be code points"),
    "a path elsewhere": ("/1f600", entry("x"), "an entry's name must be code points"),
    "a null character": ("1f900\0", entry("x"), "an entry's name must be code points"),
    "capital letters": ("1F900", entry("x"), "an entry's name must be code points"),
    "nothing": ("", entry("x"), "code must be text that is not empty, got ''"),
    "the same, padded": (" 1f600", entry("x"), "id must be unique, but 'emojitwo-1f600' also occurs at emoji.json['1f600']"),
}


@pytest.mark.parametrize(("code", "row", "message"), BAD.values(), ids=BAD)
def test_a_bad_entry_is_named_or_skipped(code: str, row: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, {code: row}, ("1f900",))

    (problem,) = problems(DatasetRequest(tmp_path, 0, validation_share=0))
    assert problem.startswith(f"emoji.json[{code!r}]: {message}")
    dataset = load(DatasetRequest(tmp_path, 0, on_bad_sample="skip", validation_share=0))
    assert dataset.notes[:3] == (
        "1 bad row(s) skipped",
        problem,
        "0 of 9 entries left out: no image, no usable category, or a skin-tone variant",
    )
    assert len(everything(dataset)) == 8


@pytest.mark.parametrize("content", [b"", b"[]", b'{"1f600": "\xff"}', b'{"1f600": {}', b"{" * 1000])
def test_a_file_that_is_not_a_json_object_is_named(content: bytes, tmp_path: Path) -> None:
    (write(tmp_path) / "emoji.json").write_bytes(content)

    with pytest.raises(DataError, match=r"emoji\.json: must be "):
        load(DatasetRequest(tmp_path, 0, validation_share=0))


@pytest.mark.parametrize("missing", ["emoji.json", "png/128"])
def test_missing_files_are_named(missing: str, tmp_path: Path) -> None:
    (write(tmp_path) / missing).rename(tmp_path / "elsewhere")

    assert f"{missing} (missing)" in problems(DatasetRequest(tmp_path, 0, validation_share=0))


def test_nothing_usable_and_unknown_options_are_refused(tmp_path: Path) -> None:
    for options in ({"test_share": 1}, {"test_share": 0}, {"share": 0.5}):
        with pytest.raises(ConfigError, match=rf"data\.options\.{next(iter(options))}: "):
            load(DatasetRequest(write(tmp_path), 0, options=options, validation_share=0))
    (tmp_path / "emoji.json").write_text("{}")
    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == ["the train split is empty", "the test split is empty"]


@pytest.mark.data
def test_the_real_files_hold_the_counted_entries(real_data: Path) -> None:
    dataset = load(DatasetRequest(real_data / "emojitwo", 0, validation_share=0))

    # 1,389 usable entries, a quarter of them (347.25) held out.
    assert (len(dataset.train), len(dataset.test)) == (1042, 347)
    counts = {"symbols": 291, "flags": 259, "people": 226, "objects": 180, "nature": 160, "travel": 119, "food": 85, "activity": 69}
    assert Counter(s.answer for s in everything(dataset).values()) == counts
    assert dataset.notes[0].startswith("624 of 2,013 entries left out")
    for sample in dataset.test[:20]:
        image = sample.content["image"]
        assert isinstance(image, Path)
        assert (open_image(image).mode, open_image(image).size) == ("RGB", (128, 128))
