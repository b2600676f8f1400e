"""Keys of prompts, files and folders differ wherever their content differs."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.data.fingerprint import folder_key, prompt_key
from fedmllm.data.prompts import target, to_messages
from fedmllm.types import Content, Edit, EditedImage, Sample

RED = Image.new("RGB", (4, 4), "red")
SAMPLE = Sample("s", "Which?", "x", {"image": RED, "text": "a text"}, ("x", "y"))


def key(sample: Sample, style: str = "agnostic") -> bytes:
    return prompt_key(to_messages(sample, style), target(sample))


def shown(picture: Content) -> Sample:
    return replace(SAMPLE, content={"image": picture, "text": "a text"})


def palette(color: int) -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([color, 0, 0])
    return image


def see_through(image: Image.Image) -> Image.Image:
    image.info["transparency"] = 0
    return image


DIFFERENT = [
    SAMPLE,
    replace(SAMPLE, question="Which ?"),
    replace(SAMPLE, answer="y"),
    replace(SAMPLE, options=("x", "z")),
    replace(SAMPLE, options=()),
    replace(SAMPLE, content={"image": RED, "text": "a  text"}),
    replace(SAMPLE, content={"image": RED}),
    replace(SAMPLE, content={"text": "a text"}),
    shown(Image.new("RGB", (4, 4), (254, 0, 0))),
    shown(Image.new("RGB", (2, 8), "red")),
    shown(Image.new("L", (4, 12))),
    shown(Image.new("L", (12, 4))),
    shown(palette(1)),
    shown(palette(2)),
    shown(see_through(palette(2))),
    shown(b"some bytes"),
    shown(b"same bytes"),
    *(shown(EditedImage(source, edits)) for source in (RED, b"bytes") for edits in ((Edit("blur", 4, 1),), (Edit("blur", 4, 2),))),
    shown(EditedImage(RED, (Edit("blur", 5, 1),))),
    shown(EditedImage(RED, (Edit("noise", 4, 1),))),
    shown(EditedImage(RED, (Edit("blur", 4, 1), Edit("blur", 4, 1)))),
    shown(Path("no/such/file.png")),
    shown(Path("no/such/other.png")),
]


def test_different_prompts_have_different_keys() -> None:
    keys = [key(sample) for sample in DIFFERENT] + [key(SAMPLE, "specific")]
    assert [(a, b) for a, b in combinations(range(len(keys)), 2) if keys[a] == keys[b]] == []


def test_equal_prompts_have_equal_keys() -> None:
    """The model never sees id, category, client, domain or the identity of objects."""
    copy = replace(SAMPLE, id="other", category="c", client="d", domain="e", content={"text": "a text", "image": RED.copy()})
    assert key(copy) == key(SAMPLE)
    assert [key(replace(sample)) for sample in DIFFERENT] == [key(sample) for sample in DIFFERENT]


def test_a_rewritten_file_has_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first, edited = key(shown(path)), key(shown(EditedImage(path, ())))
    assert key(shown(path)) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert key(shown(path)) != first
    assert key(shown(EditedImage(path, ()))) != edited


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name in ("rows.csv", "images/a.png"):
        (root / name).write_text("content")
    return root


@pytest.mark.parametrize("name", ["rows.csv", "images/a.png", "images/b.png"])
def test_a_changed_file_changes_the_folders_key(folder: Path, name: str) -> None:
    before = folder_key(folder)
    assert folder_key(folder) == before
    (folder / name).write_text("changed")
    os.utime(folder / name, ns=(1, 1))
    assert folder_key(folder) != before


def test_a_deleted_or_moved_file_changes_the_folders_key(folder: Path, tmp_path: Path) -> None:
    before = folder_key(folder)
    (folder / "images" / "a.png").rename(folder / "images" / "b.png")
    renamed = folder_key(folder)
    (folder / "images" / "b.png").unlink()
    assert len({before, renamed, folder_key(folder), folder_key(tmp_path / "none")}) == 4


@pytest.mark.parametrize(
    "names",
    [["images/.cache"], [".git/index"], ["sweep/grid.json", "sweep/cells/a.json"], ["runs/a/config.yaml", "runs/a/manifest.json"]],
)
def test_hidden_files_and_output_of_runs_do_not_count(folder: Path, names: list[str]) -> None:
    before = folder_key(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new")
    assert folder_key(folder) == before


def test_links_are_followed_and_cycles_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_text("one")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "images" / "round").symlink_to(folder)
    before = folder_key(folder)
    (tmp_path / "elsewhere" / "c.png").write_text("another")
    assert folder_key(folder) != before
