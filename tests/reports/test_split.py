from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from rich.text import Text

from fedmllm.api import train
from fedmllm.cli.tables import _example_lines
from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS
from fedmllm.data.federated import federate
from fedmllm.data.prompts import Wording
from fedmllm.data.quality import PARTS
from fedmllm.data.scenarios import parse_scenario
from fedmllm.errors import ConfigError
from fedmllm.reports.split import catalog, describe, export_split, save_picture
from fedmllm.run.reader import read_run


def test_the_catalog_describes_each_entry_in_one_line() -> None:
    names = catalog()
    assert set(names["datasets"]) == set(DATASETS)
    assert set(names["heterogeneity"]) == set(PARTS)
    assert Counter(parse_scenario(setting)[0] for setting in names["settings"]) == {"aligned": 3, "missing": 3, "cross": 3, "hybrid": 3}
    assert all(line and "\n" not in line for kind in names.values() for line in kind.values())


def test_a_split_is_described_by_its_counts_and_one_example(tiny: Experiment) -> None:
    record = json.loads(json.dumps(describe(tiny)))
    data = federate(tiny.data, tiny.federation, tiny.seed)
    assert [row["id"] for row in record["clients"]] == list(data.clients)
    for row, samples in zip(record["clients"], data.clients.values(), strict=True):
        assert set(row) == {"id", "num_samples", "labels", "modalities"}
        assert row["num_samples"] == len(samples) == sum(row["labels"].values()) == sum(row["modalities"].values())
    example = record["example"]
    shown = example["wordings"]
    assert list(shown) == ["specific", "neutral", "agnostic"]
    assert [name for name, text in shown.items() if "whatever the modality" in text] == ["agnostic"]
    assert [name for name, text in shown.items() if "Answer based on the" in text] == ["specific"]
    assert example["target"] in ("A", "B")


def test_an_own_wording_is_shown_beside_the_others(tiny: Experiment) -> None:
    template = "Own words.\n{text}\n{question}\n{options}"
    data = tiny.data.model_copy(update={"wordings": {"mine": Wording(templates={"any": template})}})
    example = describe(tiny.model_copy(update={"data": data}))["example"]
    assert example["wordings"]["mine"].replace("<image>", "").startswith("Own words.\n")
    lines = Text("\n".join(map(str, _example_lines(example)))).plain
    assert all(f"{name} wording" in lines for name in ("specific", "neutral", "agnostic", "mine"))
    assert f"  question: {example['question']}" in lines


def test_a_picture_is_drawn(tiny: Experiment, tmp_path: Path) -> None:
    save_picture(describe(tiny), tmp_path / "clients.png")
    with Image.open(tmp_path / "clients.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    with pytest.raises(ConfigError, match="cannot be written"):
        save_picture(describe(tiny), tmp_path / "clients.words")


def test_training_from_an_export_is_the_same(tiny: Experiment, tmp_path: Path) -> None:
    train(tiny, tmp_path / "here")
    train(Experiment.load(export_split(tiny, tmp_path / "files")), tmp_path / "there")
    here, there = (read_run(tmp_path / name).result for name in ("here", "there"))
    assert here is not None
    assert there is not None
    assert here.scores["federated"] == there.scores["federated"]
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("here", "there")]
    assert adapters[0] == adapters[1]
