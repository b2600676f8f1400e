"""The embedded model, and the code that trains it."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmllm.data.datasets.digits import claims, triage, vqa
from fedmllm.data.images import open_image
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.nano.card import skills
from fedmllm.models.nano.dialogues import dialogue
from fedmllm.models.nano.drills import caption, note_checks, picture_checks, short_questions
from fedmllm.models.nano.pretrain import STAGES, PretrainConfig, make_nano, new_nano
from fedmllm.models.nano.scenes import Dialogue
from fedmllm.models.nano.sight import SightExam, sheets
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import NANO_FOLDER
from fedmllm.randomness import generator, torch_randomness


@pytest.fixture(scope="module")
def fresh() -> VisionLanguageModel:
    """Seed 0 before any step. Tests must not change it."""
    return new_nano(0)


def test_the_folder_is_small_and_has_the_usual_files() -> None:
    assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) < 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in NANO_FOLDER.iterdir()
    }


def test_the_model_has_the_stated_size(base: VisionLanguageModel) -> None:
    assert 3e6 < sum(parameter.numel() for parameter in base.model.parameters()) < 6e6


def test_any_text_survives_tokenization(base: VisionLanguageModel) -> None:
    for text in ("Größe 12 µm", "日本語 😀", "a\tb\n  c"):
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert base.tokenizer.decode(ids) == text


def test_each_digit_is_one_token(base: VisionLanguageModel) -> None:
    assert len(base.tokenizer("47", add_special_tokens=False)["input_ids"]) == 2


def test_skills_match_the_model_card(base: VisionLanguageModel) -> None:
    """The card's scores are over 1,000 dialogues. These are 200 others, with a tolerance of three standard errors."""
    card = dict(_card_rows())
    for skill, (share, count) in skills(base, seed=123, count=200).items():
        expected = card[skill]
        assert share > expected - 3 * np.sqrt(max(expected * (1 - expected), 0.02) / count), skill


def _card_rows() -> list[tuple[str, float]]:
    lines = (NANO_FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [(name, float(share)) for name, share, _ in cells[1:]]


def spoken(item: Dialogue, role: str) -> list[str]:
    return [str(message.parts[-1].value) for message in item.messages if message.role == role]


def test_dialogues_mix_contexts_and_never_show_the_tasks() -> None:
    items = [dialogue(generator(0, "t", i)) for i in range(800)]
    pictures = [item for item in items if item.messages[0].parts[0].type == "image"]
    assert 0.7 < len(pictures) / 800 < 0.9
    counts = Counter(skill for item in items for skill in set(item.skills))
    assert min(counts[skill] for skill in ("reading", "lookup", "both", "comparing")) > 80
    questions = [question for question, _ in {**vqa.OPEN, **vqa.CLOSED}.values()]
    for lesson in (caption, short_questions, picture_checks, note_checks):
        items += [lesson(generator(0, "t", i), "pretrain") for i in range(300)]
    tasks = [claims.QUESTION, triage.QUESTION, *triage.TEAMS, "misleading", *claims.SOURCES, *questions]
    assert not [phrase for phrase in tasks for item in items for text in spoken(item, "user") if phrase in text]


def test_answers_to_dialogues_are_right() -> None:
    """The right answers are read back from the notes' text."""
    checked = 0
    for i in range(1000):
        item = dialogue(generator(1, "t", i))
        note = re.search(r"number (\d)(\d) in (\w+) ink", spoken(item, "user")[0])
        if note is None or item.skills[0] != "lookup":
            continue
        facts = {
            "left": note[1],
            "right": note[2],
            "number": note[1] + note[2],
            "digits": note[1] + note[2],
            "ink": note[3],
            "color": note[3],
        }
        for question, answer in zip(spoken(item, "user"), spoken(item, "assistant"), strict=True):
            asked = question.splitlines()[1 if question is spoken(item, "user")[0] else 0].lower() if "Options" not in question else ""
            for word, fact in facts.items():
                if word in re.findall(r"[a-z]+", asked) and ("digit " not in asked or word in ("left", "right")):
                    assert answer == fact
                    checked += 1
    assert checked > 30


def test_lessons_differ_between_splits_in_the_handwriting_only() -> None:
    for lesson in (caption, short_questions, picture_checks):
        first, again, test = (lesson(generator(3, "t", 1), split) for split in ("pretrain", "pretrain", "test"))
        assert spoken(first, "user")[1:] == spoken(test, "user")[1:]
        assert spoken(first, "assistant") == spoken(test, "assistant")
        pages = [open_image(item.messages[0].parts[0].value).tobytes() for item in (first, again, test)]
        assert pages[0] == pages[1] != pages[2]


def test_note_checks_have_right_answers() -> None:
    """The right answers are read back from the note and the statement's words."""
    answers: list[str] = []
    for i in range(300):
        item = note_checks(generator(2, "t", i), "pretrain")
        note, first = spoken(item, "user")[0].split("\n")
        scene = re.search(r"(\d)(?: on the left, )?(\d).*(black|red|blue|green)", note) if re.search(r"\d\d|on the left", note) else None
        for question, answer in zip([first, *spoken(item, "user")[1:]], spoken(item, "assistant"), strict=True):
            words = question.strip("?").split()
            if scene is None:
                right = words[0] in note.split()
            elif len(words) == 2:
                right = words[1] == scene[1 if words[0] == "left" else 2]
            else:
                right = words[0] in (scene[1] + scene[2], scene[3])
            assert answer == ("yes" if right else "no"), (note, question)
            answers.append(answer)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_picture_checks_are_consistent() -> None:
    """Of statements of one kind at most one is right, and no statement is both right and wrong."""
    for i in range(100):
        item = picture_checks(generator(2, "t", i), "pretrain")
        verdicts: dict[str, set[str]] = {}
        for question, answer in zip(spoken(item, "user"), spoken(item, "assistant"), strict=True):
            verdicts.setdefault(question, set()).add(answer)
        assert all(len(answers) == 1 for answers in verdicts.values())
        for form in (r"left \d\?", r"right \d\?", r"\d\d\?", r"[a-z]+\?"):
            assert sum(verdicts[question] == {"yes"} for question in verdicts if re.fullmatch(form, question)) <= 1


@pytest.mark.slow
def test_the_tower_alone_learns_to_recognize_inks(fresh: VisionLanguageModel) -> None:
    """For seeds 0 to 2 it recognizes at least 98 of 100 inks after these steps; guessing gives 25."""
    vlm = replace(fresh, model=deepcopy(fresh.model))
    with torch_randomness(vlm.device, 0, "test"):
        exam, rng = SightExam(vlm), generator(0, "t")
    optimizer = torch.optim.AdamW(exam.parameters(), lr=5e-4)
    for _ in range(40):
        optimizer.zero_grad()
        exam.loss(*sheets(vlm, rng, 32)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(exam.parameters(), 1.0)
        optimizer.step()
    pixels, truth = sheets(vlm, rng, 100)
    left, right, ink = exam(pixels)
    assert left.shape == right.shape == (100, 10)
    assert (ink.argmax(1) == truth[:, 2]).float().mean() > 0.9
    assert exam.tower is vlm.model.model.vision_tower


def test_stages_share_all_steps() -> None:
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)
    assert all(sum(share for _, share in stage.lessons) == pytest.approx(1) for stage in STAGES if stage.lessons)


def test_initial_keys_correlate_with_queries(fresh: VisionLanguageModel) -> None:
    attention = fresh.model.model.language_model.layers[0].self_attn
    query, key = (weight.detach().flatten() for weight in (attention.q_proj.weight, attention.k_proj.weight))
    assert torch.corrcoef(torch.stack([query, key]))[0, 1].item() == pytest.approx(0.7, abs=0.02)
    assert key.std().item() == pytest.approx(192**-0.5, rel=0.02)


@pytest.mark.slow
def test_pretraining_is_seeded_and_writes_a_loadable_folder(tmp_path: Path) -> None:
    lines: list[str] = []
    # One step of each stage.
    config = PretrainConfig(seed=5, steps=4)
    for name in ("a", "b"):
        make_nano(tmp_path / name, config, lines.append, probes=4)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    vlm = load_model(ModelConfig(name=str(tmp_path / "a")), torch.device("cpu"))
    assert vlm.model.config.model_type == "llava"


@pytest.mark.slow
def test_fresh_weights_depend_on_the_seed(fresh: VisionLanguageModel) -> None:
    first, other = (next(vlm.model.parameters()) for vlm in (fresh, new_nano(1)))
    assert not torch.equal(first, other)
