"""Predicts answers: options by their probabilities, free answers by greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmllm.models.encoding import Encoded, collate, option_tokens
from fedmllm.models.families.generic import restored, special_tokens
from fedmllm.models.last_layer import reading
from fedmllm.models.load import VisionLanguageModel
from fedmllm.types import Prediction, Sample


@torch.inference_mode()
def choose(vlm: VisionLanguageModel, samples: Sequence[Sample], encoded: Sequence[Encoded]) -> list[Prediction]:
    """Answer multiple-choice questions in one forward pass: ``p_i = softmax_i(logit of option i's letter)`` right after the prompt.

    Raises:
        ModelError: if the tokenizer gives two letters the same first token.
    """
    batch = collate(vlm, encoded, with_answers=False)
    with vlm.autocast(), reading(1):
        logits = vlm.family.call(vlm.model, batch.inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().cpu()
    return [_choice(sample, row, option_tokens(vlm, sample)) for sample, row in zip(samples, logits, strict=True)]


def _choice(sample: Sample, logits: Tensor, tokens: list[int]) -> Prediction:
    probabilities = torch.softmax(logits[tokens].double(), dim=0)
    if not torch.isfinite(probabilities).all():
        return Prediction(sample, None)
    return Prediction(sample, sample.options[int(probabilities.argmax())], tuple(probabilities.tolist()))


@torch.inference_mode()
def generate(vlm: VisionLanguageModel, samples: Sequence[Sample], encoded: Sequence[Encoded], max_new_tokens: int) -> list[Prediction]:
    """Answer questions with greedy decoding.

    An answer that is empty, or that does not end within ``max_new_tokens``, is a failure. An unfinished answer to a closed question is not
    a failure: its complete words are kept.
    """
    batch = collate(vlm, encoded, with_answers=False)
    ends = _end_tokens(vlm)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": vlm.pad_token_id, "eos_token_id": ends}
    with vlm.autocast():
        new = vlm.family.generate(vlm.model, batch.inputs, max_new_tokens=max_new_tokens, **settings).cpu()
    return [Prediction(sample, _read(vlm, row, ends, sample.answer_type == "closed")) for sample, row in zip(samples, new, strict=True)]


def _end_tokens(vlm: VisionLanguageModel) -> list[int]:
    end = vlm.model.generation_config.eos_token_id
    end = vlm.tokenizer.eos_token_id if end is None else end
    return list(end) if isinstance(end, list) else [int(end)]


def _read(vlm: VisionLanguageModel, tokens: Tensor, ends: list[int], cut: bool = False) -> str | None:
    """Return the text before the first end token; None if there is no text or no end token.

    With ``cut``, text without an end token is kept except for its last word.
    """
    stops = torch.isin(tokens, torch.tensor(ends)).nonzero()
    if len(stops) == 0 and not cut:
        return None
    written = tokens[: int(stops[0])] if len(stops) else tokens
    text = vlm.tokenizer.decode(written, skip_special_tokens=True).strip()
    # The last word of an unfinished text may be cut off: "No" may stand for "Normal".
    text = text if len(stops) else " ".join(text.split()[:-1])
    return restored(text, special_tokens(vlm.processor)) or None
