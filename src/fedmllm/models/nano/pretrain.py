"""Pretrains the nano model from scratch: ``fedmllm pretrain-nano``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedmllm.data.datasets.digits.scans import Split
from fedmllm.data.prompts import to_messages
from fedmllm.models.encoding import Encoded, answer_nll, collate
from fedmllm.models.families import GENERIC
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.nano.build import build_model, build_processor, train_tokenizer
from fedmllm.models.nano.card import model_card, skills
from fedmllm.models.nano.dialogues import dialogue
from fedmllm.models.nano.drills import caption, note_checks, picture_checks, short_questions
from fedmllm.models.nano.scenes import Dialogue, english
from fedmllm.models.nano.sight import SightExam, sheets
from fedmllm.models.settings import ModelConfig
from fedmllm.randomness import generator, torch_randomness
from fedmllm.types import Message

Lesson = Callable[[np.random.Generator, Split], Dialogue]
Progress = Callable[[str], None]

WARMUP_STEPS = 30


@dataclass(frozen=True)
class Stage:
    """A stage of pretraining.

    Attributes:
        name: the name in the progress lines.
        share: share of all optimizer steps.
        batch_size: pictures or dialogues per step.
        learning_rate: the learning rate after a linear warmup.
        lessons: the kinds of dialogues and their probabilities. If empty, the vision tower trains alone as a classifier.
        decays: whether the learning rate falls to a hundredth along half a cosine instead of staying constant.
    """

    name: str
    share: float
    batch_size: int
    learning_rate: float
    lessons: tuple[tuple[Lesson, float], ...] = ()
    decays: bool = False


STAGES = (
    Stage("sight", 0.26, 64, 2e-3, decays=True),
    Stage("notes", 0.13, 8, 4e-4, ((note_checks, 1.0),)),
    Stage("pictures", 0.26, 16, 4e-4, ((caption, 0.3), (short_questions, 0.2), (picture_checks, 0.3), (note_checks, 0.2))),
    Stage("dialogues", 0.35, 20, 5e-4, ((dialogue, 0.8), (short_questions, 0.1), (picture_checks, 0.1)), decays=True),
)
"""The stages. Many small steps at a low rate leave the initial plateau of yes-or-no questions sooner than few large steps."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of pretraining. The defaults are those of the shipped weights."""

    seed: int = 0
    steps: int = 3450
    weight_decay: float = 0.05
    clip_norm: float = 1.0


def new_nano(seed: int) -> VisionLanguageModel:
    """Return a nano model with random weights on the CPU."""
    tokenizer = train_tokenizer(_tokenizer_texts(seed))
    device = torch.device("cpu")
    with torch_randomness(device, seed, "nano-weights"):
        model = build_model(tokenizer)
    return VisionLanguageModel("nano", model, build_processor(tokenizer), GENERIC, device, max_length=512)


def make_nano(folder: Path, config: PretrainConfig, progress: Progress, probes: int = 1000) -> None:
    """Pretrain a model, score it on unseen handwriting, and write a Transformers folder (float16) with its model card."""
    start = time.monotonic()
    vlm = pretrain(config, progress)
    vlm.model.to(torch.float16).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    minutes = (time.monotonic() - start) / 60
    scores = skills(load_model(ModelConfig(name=str(folder)), torch.device("cpu")), config.seed, probes)
    (folder / "README.md").write_text(model_card(vlm, config, scores, minutes), encoding="utf-8")


def pretrain(config: PretrainConfig, progress: Progress) -> VisionLanguageModel:
    """Train a model from scratch through ``STAGES``.

    Each stage minimizes the mean negative log-likelihood of the answer tokens (first stage: of digits and ink) with AdamW.
    """
    vlm = new_nano(config.seed)
    vlm.model.train()
    for stage in STAGES:
        rng = generator(config.seed, "nano-lessons", stage.name)
        module, backward = _sight(vlm, stage, rng, config.seed) if not stage.lessons else (vlm.model, partial(_teach, vlm, stage, rng))
        _optimize(module, stage, max(1, round(stage.share * config.steps)), config, backward, progress)
    vlm.model.eval()
    return vlm


def _optimize(
    module: nn.Module, stage: Stage, steps: int, config: PretrainConfig, backward: Callable[[], float], progress: Progress
) -> None:
    """Optimize a module with AdamW. ``backward`` computes the gradients of one batch and returns its loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    start, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(stage, step, steps)
        losses.append(backward())
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            progress(f"{stage.name} {step + 1}/{steps} loss {np.mean(losses[-50:]):.3f} {time.monotonic() - start:.0f} s")


def _learning_rate(stage: Stage, step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return stage.learning_rate * warm * (cosine if stage.decays else 1.0)


def _sight(vlm: VisionLanguageModel, stage: Stage, rng: np.random.Generator, seed: int) -> tuple[nn.Module, Callable[[], float]]:
    with torch_randomness(vlm.device, seed, "nano-exam"):
        exam = SightExam(vlm)

    def backward() -> float:
        loss = exam.loss(*sheets(vlm, rng, stage.batch_size))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return exam, backward


def _teach(vlm: VisionLanguageModel, stage: Stage, rng: np.random.Generator) -> float:
    lessons, shares = zip(*stage.lessons, strict=True)
    drawn = [lessons[i](rng, "pretrain") for i in rng.choice(len(lessons), size=stage.batch_size, p=shares)]
    return _backward(vlm, [_tensors(vlm, item) for item in drawn])


def _tensors(vlm: VisionLanguageModel, item: Dialogue) -> tuple[Encoded, Tensor]:
    """Encode a dialogue as one sequence whose prompt is the first question, and return which later tokens are the assistant's."""
    (prompt, answer), *rest = _rounds(vlm, item)
    tensors = vlm.family.prompt_tensors(vlm.processor, prompt, item.messages)
    pieces = [(answer, True), *((text, spoken) for question, reply in rest for text, spoken in ((question, False), (reply, True)))]
    tokens = [vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    spoken = torch.tensor([said for row, (_, said) in zip(tokens, pieces, strict=True) for _ in row])
    ids = torch.cat([tensors.pop("input_ids")[0], torch.tensor([token for row in tokens for token in row])])
    return Encoded(ids, len(spoken), tensors), spoken


def _rounds(vlm: VisionLanguageModel, item: Dialogue) -> list[tuple[str, str]]:
    """Return, for each question, (text up to the assistant's token, answer with its end token) as rendered by the chat template."""
    pairs = zip(item.messages[::2], item.messages[1::2], strict=True)
    return [vlm.family.render(vlm.processor, (user,), str(assistant.parts[0].value)) for user, assistant in pairs]


def _backward(vlm: VisionLanguageModel, lessons: list[tuple[Encoded, Tensor]], chunk: int = 12) -> float:
    """Compute the gradient of the mean loss over the assistant's tokens. Dialogues of similar length share a batch, which saves padding."""
    lessons = sorted(lessons, key=lambda lesson: len(lesson[0].input_ids))
    total = sum(int(spoken.sum()) for _, spoken in lessons)
    loss = 0.0
    for first in range(0, len(lessons), chunk):
        part = lessons[first : first + chunk]
        batch = collate(vlm, [encoded for encoded, _ in part])
        mask = torch.zeros_like(batch.answer_mask)
        for row, (_, spoken) in zip(mask, part, strict=True):
            row[len(row) - len(spoken) :] = spoken
        mean = (answer_nll(vlm, batch) * mask).sum() / total
        mean.backward()  # type: ignore[no-untyped-call]
        loss += mean.item()
    return loss


def _tokenizer_texts(seed: int) -> Iterator[str]:
    """Yield the tokenizer's training texts: lessons, real English, and the wordings of the embedded datasets."""
    from fedmllm.data.datasets.digits import wordings

    rng = generator(seed, "nano-tokenizer")
    for lesson in (dialogue, note_checks):
        yield from (text for _ in range(4000) for text in _texts(lesson(rng, "pretrain").messages))
    yield english()
    for sample in wordings(seed, 2000):
        # The shipped tokenizer predates the request for brevity in closed questions, so that text must stay out to reproduce it.
        yield from _texts(to_messages(sample if sample.options else replace(sample, answer_type="open"), "agnostic"))


def _texts(messages: Iterable[Message]) -> list[str]:
    return [str(part.value) for message in messages for part in message.parts if part.type == "text"]
