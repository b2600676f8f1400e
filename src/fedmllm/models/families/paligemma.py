"""PaliGemma: no chat format, but images and a prompt with bidirectional attention, followed by the answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmllm.models.families.generic import ModelFamily, defuse, special_tokens
from fedmllm.types import Message

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class PaliGemma(ModelFamily):
    """The input is ``<image>...<image><bos>prompt``, a newline, the answer and its end token. ``token_type_ids`` are 0, and 1 in the answer."""

    answer_type = 1

    def can_render(self, processor: ProcessorMixin) -> bool:
        """Return True: the format needs no chat template."""
        return True

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """Render all images, then each text on its own line. The processor adds the tokens around them."""
        parts, specials = [part for message in messages for part in message.parts], special_tokens(processor)
        pictures = processor.image_token * sum(part.type == "image" for part in parts)
        texts = [defuse(str(part.value), specials) for part in parts if part.type == "text"]
        return pictures + "\n".join(texts), defuse(answer, specials) + processor.tokenizer.eos_token

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Return the processor's tensors. The processor rejects prompts without an image, so these are encoded in the same format here."""
        if processor.image_token in prompt:
            with warnings.catch_warnings():
                # The processor also computes labels, which are not used, in a way that NumPy has deprecated.
                warnings.simplefilter("ignore", DeprecationWarning)
                return super().prompt_tensors(processor, prompt, messages)
        self.require({part.type for message in messages for part in message.parts})
        tokenizer: Any = processor.tokenizer
        ids = tokenizer(f"{tokenizer.bos_token}{prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
