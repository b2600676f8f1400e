"""Small datasets in the exact layout of files that may not be redistributed or that are the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

Written = tuple[Path, dict[str, Any]]
"""The folder, and the dataset's options."""

TRAIN, TEST = 130, 70


def pictures(folder: Path, names: Iterable[str]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names := list(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, 90, 40)).save(folder / name)
    return names


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def hateful_memes(root: Path) -> Written:
    names = pictures(root / "img", (f"{i:05d}.png" for i in range(TRAIN + TEST)))
    rows = [{"id": name[:5], "img": f"img/{name}", "label": i % 3 // 2, "text": f"a meme {i}"} for i, name in enumerate(names)]
    lines(root / "train.jsonl", rows[:TRAIN])
    for file in ("dev_seen", "dev_unseen", "test_seen", "test_unseen"):
        lines(root / f"{file}.jsonl", rows[TRAIN:])
    return root, {}


def crisismmd(root: Path) -> Written:
    header = ["event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text", "label_image", "label_text_image"]
    classes = ("not_humanitarian", "vehicle_damage", "affected_individuals")
    images = pictures(root / "data_image", (f"flood/1_1_2017/{i}_0.jpg" for i in range(TRAIN + TEST)))
    table = [
        ["flood", str(i), f"{i}_0", f'water "everywhere {i} https://t.co/x', f"data_image/{name}", *[classes[i % 4 % 3]] * 3, "Positive"]
        for i, name in enumerate(images)
    ]
    folder = root / "crisismmd_datasplit_all"
    folder.mkdir()
    for split, rows in {"train": table[:TRAIN], "dev": table[TRAIN:], "test": table[TRAIN:]}.items():
        text = "".join("\t".join(row) + "\n" for row in [header, *rows])
        (folder / f"task_humanitarian_text_img_{split}.tsv").write_text(text)
    return root, {}


def slake(root: Path) -> Written:
    pictures(root / "imgs", ("xmlab1/source.jpg",))
    kind = {"img_name": "xmlab1/source.jpg", "q_lang": "en", "location": "Lung", "modality": "CT"}
    rows = [
        {
            **kind,
            "qid": i,
            "question": f"Is it {i}?",
            "answer": ("Yes", "No", "CT")[i % 3],
            "answer_type": ("CLOSED", "CLOSED", "OPEN")[i % 3],
        }
        | {"content_type": ("Organ", "Modality")[i % 2]}
        for i in range(TRAIN + TEST)
    ]
    for split, part in {"train": rows[:TRAIN], "validate": rows[TRAIN:], "test": rows[TRAIN:]}.items():
        (root / f"{split}.json").write_text(json.dumps(part))
    return root, {}


def medical_flashcards(root: Path) -> Written:
    cards = [{"instruction": "Answer", "input": f"What is {i}?", "output": f"It is {i % 7}."} for i in range(TRAIN + TEST)]
    (root / "medical_meadow_wikidoc_medical_flashcards.json").write_text(json.dumps(cards))
    return root, {"test_share": TEST / (TRAIN + TEST)}


def own_rows(root: Path) -> list[dict[str, Any]]:
    names = pictures(root, (f"{i}.png" for i in range(TRAIN + TEST)))
    return [{"scan": name, "note": f"note {i}", "finding": ("benign", "malignant")[i % 3 // 2]} for i, name in enumerate(names)]


OWN = {"columns": {"image": "scan", "text": "note", "answer": "finding"}, "question": "Which?", "choices": ["benign", "malignant"]}


def jsonl(root: Path) -> Written:
    rows = own_rows(root)
    lines(root / "a.jsonl", rows[:TRAIN])
    lines(root / "b.jsonl", rows[TRAIN:])
    return root, {**OWN, "train": "a.jsonl", "test": "b.jsonl"}


def csv(root: Path) -> Written:
    rows = own_rows(root)
    for name, part in {"a.csv": rows[:TRAIN], "b.csv": rows[TRAIN:]}.items():
        (root / name).write_text("".join(",".join(row) + "\n" for row in [list(part[0]), *(list(row.values()) for row in part)]))
    return root, {**OWN, "train": "a.csv", "test": "b.csv"}


def huggingface(root: Path) -> Written:
    import datasets

    rows = own_rows(root / "files")
    features = datasets.Features({"scan": datasets.Image(), "note": datasets.Value("string"), "finding": datasets.Value("string")})
    stored = [{**row, "scan": str(root / "files" / row["scan"])} for row in rows]
    parts = {"train": stored[:TRAIN], "test": stored[TRAIN:]}
    splits = {name: datasets.Dataset.from_list(part, features=features) for name, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(root / "stored"))
    return root / "stored", {**OWN, "train": "train", "test": "test"}


WRITERS: Mapping[str, Callable[[Path], Written]] = {
    writer.__name__: writer for writer in (hateful_memes, crisismmd, slake, medical_flashcards, jsonl, csv, huggingface)
}
