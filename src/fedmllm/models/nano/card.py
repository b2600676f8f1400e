"""Measures the nano model's skills and writes its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmllm.models.encoding import collate, encode
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.nano.dialogues import dialogue
from fedmllm.models.nano.scenes import Dialogue
from fedmllm.randomness import generator

if TYPE_CHECKING:
    from fedmllm.models.nano.pretrain import PretrainConfig


def skills(vlm: VisionLanguageModel, seed: int, count: int) -> dict[str, tuple[float, int]]:
    """Return, by skill, (exact-match accuracy, number of questions) of greedy answers to first questions in the test split's handwriting."""
    items = [dialogue(generator(seed, "nano-probe", i), "test") for i in range(count)]
    right: dict[str, list[bool]] = {}
    for first in range(0, count, 50):
        part = items[first : first + 50]
        for item, answer in zip(part, _greedy(vlm, part), strict=True):
            right.setdefault(item.skills[0], []).append(answer == item.messages[1].parts[0].value)
    return {skill: (float(np.mean(hits)), len(hits)) for skill, hits in sorted(right.items())}


@torch.inference_mode()
def _greedy(vlm: VisionLanguageModel, items: list[Dialogue]) -> list[str]:
    """Return greedy answers to the first questions."""
    batch = collate(vlm, [encode(vlm, item.messages[:1], "") for item in items], with_answers=False)
    new = vlm.family.generate(vlm.model, batch.inputs, do_sample=False, max_new_tokens=12)
    return [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]


def model_card(vlm: VisionLanguageModel, config: PretrainConfig, scores: dict[str, tuple[float, int]], minutes: float) -> str:
    """Return the text of the folder's README: what the model is, its training data, and its scores."""
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
From scratch by `fedmllm pretrain-nano --seed {c.seed} --steps {c.steps}`: {c.steps} optimizer steps (AdamW), {minutes:.0f} minutes on 2 CPU
cores. First the vision tower alone learns to tell digits and inks, and the decoder to compare statements with notes; then
the two are joined by captions and yes-or-no questions; last come dialogues of three or four questions. Pictures are
composed from scikit-learn's handwritten digits (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0), scans 0-999 only; scans
1000-1399 are kept for the training and 1400-1796 for the test splits of the embedded datasets. Words come from
the descriptions of scikit-learn's data sets. Contexts: picture only, note only, both. Not among the questions: the tasks of
the embedded datasets (claims, triage, larger/next/odd digits, flashcards). The tokenizer, not the model, also saw these
datasets' wordings.

## Scores
Greedy answers to the first question of new dialogues, exact match, in the handwriting of the test split:

| skill | accuracy | questions |
|---|---|---|
{rows}
"""
