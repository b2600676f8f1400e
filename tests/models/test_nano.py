"""The embedded model, and the code that makes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmllm.data.datasets.digits import claims, triage, vqa
from fedmllm.data.images import open_image
from fedmllm.models.load import NANO_FOLDER, ModelConfig, VisionLanguageModel, load_model
from fedmllm.models.nano.curriculum import exercise
from fedmllm.models.nano.pretrain import PretrainConfig, make_nano, new_nano, skills
from fedmllm.randomness import generator


def test_the_folder_is_small_and_ordinary() -> None:
    assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) < 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in NANO_FOLDER.iterdir()
    }


def test_its_size_is_as_stated(base: VisionLanguageModel) -> None:
    assert 3e6 < sum(parameter.numel() for parameter in base.model.parameters()) < 6e6


def test_any_text_has_tokens_and_comes_back(base: VisionLanguageModel) -> None:
    for text in ("Größe 12 µm", "日本語 😀", "a\tb\n  c"):
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert base.tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(base: VisionLanguageModel) -> None:
    assert len(base.tokenizer("47", add_special_tokens=False)["input_ids"]) == 2


def test_it_has_the_skills_its_card_states(base: VisionLanguageModel) -> None:
    """The card's scores are over 1,000 exercises; these 200 are others, and three standard errors are allowed."""
    card = dict(_card_rows())
    for skill, (share, count) in skills(base, seed=123, count=200).items():
        expected = card[skill]
        assert share > expected - 3 * np.sqrt(max(expected * (1 - expected), 0.02) / count), skill


def _card_rows() -> list[tuple[str, float]]:
    lines = (NANO_FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [(name, float(share)) for name, share, _ in cells[1:]]


def test_exercises_mix_contexts_and_never_show_the_tasks() -> None:
    items = [exercise(generator(0, "t", i)) for i in range(800)]
    contexts = Counter(item.skill for item in items)
    assert min(contexts["picture"], contexts["note"], contexts["both"] + contexts["comparing"]) > 120
    tasks = [claims.QUESTION, triage.QUESTION, *triage.TEAMS, "misleading", "claims", *[q for q, _ in {**vqa.OPEN, **vqa.CLOSED}.values()]]
    for item in items:
        text = str(item.messages[0].parts[-1].value)
        assert not [phrase for phrase in tasks if phrase in text]


def test_exercises_draw_on_the_pretraining_handwriting_only() -> None:
    first, again, test = (exercise(generator(3, "t", 1), split) for split in ("pretrain", "pretrain", "test"))
    assert first.answer == again.answer == test.answer
    pictures = [
        [open_image(part.value).tobytes() for part in item.messages[0].parts if part.type == "image"] for item in (first, again, test)
    ]
    assert pictures[0] == pictures[1]


def test_pretraining_is_seeded_and_writes_a_loadable_folder(tmp_path: Path) -> None:
    lines: list[str] = []
    config = PretrainConfig(seed=5, steps=2, batch_size=4)
    for name in ("a", "b"):
        make_nano(tmp_path / name, config, lines.append, probes=4)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    vlm = load_model(ModelConfig(name=str(tmp_path / "a")), torch.device("cpu"))
    assert vlm.model.config.model_type == "llava"


@pytest.mark.parametrize("seed", [0, 1])
def test_fresh_weights_depend_on_the_seed(seed: int) -> None:
    first = next(new_nano(seed).model.parameters())
    assert torch.equal(first, next(new_nano(seed).model.parameters()))
    assert not torch.equal(first, next(new_nano(seed + 1).model.parameters()))
