"""Pretraining the nano model from scratch: ``fedmllm pretrain-nano``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmllm.models.encoding import Encoded, answer_nll, collate, encode
from fedmllm.models.families import GENERIC
from fedmllm.models.load import ModelConfig, VisionLanguageModel, load_model
from fedmllm.models.nano.build import build_model, build_processor, train_tokenizer
from fedmllm.models.nano.curriculum import Dialogue, dialogue
from fedmllm.randomness import generator, torch_randomness

READING = 0.15
"""Share of the steps that only teach to read digits. Without this start, pictures are ignored for most of the time."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PretrainConfig:
    """How the embedded model was made; the defaults are the shipped weights' settings."""

    seed: int = 0
    steps: int = 1300
    batch_size: int = 24
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    clip_norm: float = 1.0


def new_nano(seed: int) -> VisionLanguageModel:
    """The nano model with fresh weights, on the CPU."""
    rng = generator(seed, "nano-tokenizer")
    tokenizer = train_tokenizer([*_texts(dialogue(rng) for _ in range(8000)), *_english()])
    device = torch.device("cpu")
    with torch_randomness(device, seed, "nano-weights"):
        model = build_model(tokenizer)
    return VisionLanguageModel("nano", model, build_processor(tokenizer), GENERIC, device, max_length=512)


def make_nano(folder: Path, config: PretrainConfig, progress: Progress, probes: int = 1000) -> None:
    """Pretrain, score on unseen handwriting, and write a Transformers folder (float16) with its model card."""
    start = time.monotonic()
    vlm = pretrain(config, progress)
    vlm.model.to(torch.float16).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    minutes = (time.monotonic() - start) / 60
    scores = skills(load_model(ModelConfig(name=str(folder)), torch.device("cpu")), config.seed, probes)
    (folder / "README.md").write_text(model_card(vlm, config, scores, minutes), encoding="utf-8")


def pretrain(config: PretrainConfig, progress: Progress) -> VisionLanguageModel:
    """Train from scratch on the curriculum.

    Minimizes the mean negative log-likelihood of the answer tokens with AdamW, linear warm-up and cosine decay.
    """
    vlm = new_nano(config.seed)
    rng = generator(config.seed, "nano-dialogues")
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    vlm.model.train()
    start, losses = time.monotonic(), []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        reading = step < config.steps * READING
        loss = _backward(vlm, [_tensors(vlm, dialogue(rng, reading=reading)) for _ in range(config.batch_size)])
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if (step + 1) % 50 == 0:
            progress(f"step {step + 1}/{config.steps} loss {np.mean(losses[-50:]):.3f} {time.monotonic() - start:.0f} s")
    vlm.model.eval()
    return vlm


def _learning_rate(step: int, config: PretrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _tensors(vlm: VisionLanguageModel, item: Dialogue) -> tuple[Encoded, Tensor]:
    """A dialogue as one sequence: its first question is the prompt; and which of the later tokens the assistant speaks."""
    (prompt, answer), *rest = _rounds(vlm, item)
    tensors = vlm.family.prompt_tensors(vlm.processor, prompt, item.messages)
    pieces = [(answer, True), *((text, spoken) for question, reply in rest for text, spoken in ((question, False), (reply, True)))]
    tokens = [vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    spoken = torch.tensor([said for row, (_, said) in zip(tokens, pieces, strict=True) for _ in row])
    ids = torch.cat([tensors.pop("input_ids")[0], torch.tensor([token for row in tokens for token in row])])
    return Encoded(ids, len(spoken), tensors), spoken


def _rounds(vlm: VisionLanguageModel, item: Dialogue) -> list[tuple[str, str]]:
    """(question up to the assistant's token, answer with its end token) of each turn, as the chat template writes them."""
    pairs = zip(item.messages[::2], item.messages[1::2], strict=True)
    return [vlm.family.render(vlm.processor, (user,), str(assistant.parts[0].value)) for user, assistant in pairs]


def _backward(vlm: VisionLanguageModel, lessons: list[tuple[Encoded, Tensor]], chunk: int = 12) -> float:
    """Gradient of the mean loss over the assistant's tokens; dialogues of like length go together, to pad less."""
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


def _texts(items: Iterable[Dialogue]) -> list[str]:
    return [str(part.value) for item in items for message in item.messages for part in message.parts if part.type == "text"]


def skills(vlm: VisionLanguageModel, seed: int, count: int) -> dict[str, tuple[float, int]]:
    """(exact-match accuracy, number) of greedy answers by skill, to first questions, with the test split's handwriting."""
    items = [dialogue(generator(seed, "nano-probe", i), "test") for i in range(count)]
    right: dict[str, list[bool]] = {}
    for first in range(0, count, 50):
        part = items[first : first + 50]
        for item, answer in zip(part, _greedy(vlm, part), strict=True):
            right.setdefault(item.skills[0], []).append(answer == item.messages[1].parts[0].value)
    return {skill: (float(np.mean(hits)), len(hits)) for skill, hits in sorted(right.items())}


@torch.inference_mode()
def _greedy(vlm: VisionLanguageModel, items: list[Dialogue]) -> list[str]:
    """Answers to the first questions."""
    batch = collate(vlm, [encode(vlm, item.messages[:1], "") for item in items], with_answers=False)
    output = vlm.model.generate(**batch.inputs, do_sample=False, max_new_tokens=12)
    return [text.strip() for text in vlm.tokenizer.batch_decode(output[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def model_card(vlm: VisionLanguageModel, config: PretrainConfig, scores: dict[str, tuple[float, int]], minutes: float) -> str:
    """The folder's README: what the model is, what it was trained on, what it can do."""
    count = sum(parameter.numel() for parameter in vlm.model.parameters())
    rows = "\n".join(f"| {skill} | {share:.3f} | {number} |" for skill, (share, number) in scores.items())
    return _CARD.format(count=count / 1e6, c=config, minutes=minutes, rows=rows)


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# nano

A LLaVA of {count:.1f} M parameters for demonstrations, tests and benchmarks of federated fine-tuning on a CPU: SigLIP
tower for 64x64 pixels, 16 visual tokens, Llama decoder of 6 layers, byte-level BPE. It was taught to read
handwritten digits and short notes and to compare the two, as well as the scores below say, and knows nothing else.

## Training
From scratch by `fedmllm pretrain-nano --seed {c.seed} --steps {c.steps}`: {c.steps} steps of {c.batch_size} dialogues of three or four questions
(AdamW, peak learning rate {c.learning_rate}, cosine), {minutes:.0f} minutes on 2 CPU cores. Pictures are composed from
scikit-learn's handwritten digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0), scans 0-999 only; scans 1000-1399 are kept for
the training and 1400-1796 for the test splits of the embedded datasets. The tokenizer also saw the descriptions of
scikit-learn's data sets. Contexts: picture only, note only, both. Not among the questions: the tasks of the embedded
datasets (claims, triage, larger/next/odd digits, flashcards).

## Scores
Greedy answers to the first question of new dialogues, exact match, in the handwriting of the test split:

| skill | accuracy | questions |
|---|---|---|
{rows}
"""


def _english() -> list[str]:
    """Real English for the tokenizer: the descriptions of scikit-learn's data sets."""
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    return [getattr(datasets, f"load_{name}")().DESCR for name in names]
