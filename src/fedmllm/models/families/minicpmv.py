"""MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5, whose code comes with their weights: ``forward(data=...)``, pictures as lists by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmllm.data.images import open_image
from fedmllm.models.families.generic import ModelFamily, continued, defuse, special_tokens, without_adapters
from fedmllm.types import Message

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PICTURE = "(<image>./</image>)"
"""What stands for a picture in a text; the processor puts its tokens there."""


class MiniCPMV(ModelFamily):
    """``data`` holds, by sample, the slices of its pictures, their sizes in patches, and the columns between which their features belong.

    A sample's slices, each of shape (3, patch, patch * number of patches), are kept side by side as one tensor: ``tgt_sizes`` tells them apart.
    """

    auto_class = "AutoModel"

    def words_chats(self, processor: ProcessorMixin) -> bool:
        """The template is the tokenizer's."""
        return getattr(processor.tokenizer, "chat_template", None) is not None

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """Parts on lines of their own, pictures as ``PICTURE``."""
        specials = [*special_tokens(processor), PICTURE]
        chat = [
            {"role": m.role, "content": "\n".join(PICTURE if p.type == "image" else defuse(str(p.value), specials) for p in m.parts)}
            for m in messages
        ]
        return continued(processor.tokenizer, chat, {"role": "assistant", "content": defuse(answer, specials)})

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """``input_ids`` and, with pictures, ``pixel_values`` (3, patch, widths summed), ``tgt_sizes`` and ``image_bound`` (slices, 2)."""
        self.require({part.type for message in messages for part in message.parts})
        images = [open_image(part.value) for message in messages for part in message.parts if part.type == "image"]
        tensors = processor(prompt, images or None, return_tensors="pt")
        ids = {"input_ids": torch.as_tensor(tensors["input_ids"]).reshape(1, -1).long()}
        if not images:
            return ids
        slices, sizes, bounds = (tensors[name][0] for name in ("pixel_values", "tgt_sizes", "image_bound"))
        return ids | {
            "pixel_values": torch.cat(list(slices), -1),
            "tgt_sizes": torch.as_tensor(sizes),
            "image_bound": torch.as_tensor(bounds),
        }

    def batch(self, extras: Sequence[Mapping[str, Tensor]], shifts: Sequence[int]) -> dict[str, Any]:
        """A list by sample for each, empty for a sample without pictures; columns are counted from the padded row's beginning."""
        return {
            "pixel_values": [_slices(sample) if sample else [] for sample in extras],
            "tgt_sizes": [sample["tgt_sizes"] if sample else [] for sample in extras],
            "image_bound": [sample["image_bound"] + shift if sample else [] for sample, shift in zip(extras, shifts, strict=True)],
        }

    def call(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """``forward(data, attention_mask=..., ...)``."""
        return model(_data(inputs), attention_mask=inputs["attention_mask"], **settings)

    def generate(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
        """By the language model on the embedded prompt, whose output is the new tokens alone."""
        inner = without_adapters(model)
        embedded, _ = inner.get_vllm_embedding(_data(inputs))
        tokens: Tensor = inner.llm.generate(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], **settings)
        return tokens


def _slices(sample: Mapping[str, Tensor]) -> list[Tensor]:
    """A sample's slices, apart again."""
    pixels = sample["pixel_values"]
    ends = torch.cumsum(sample["tgt_sizes"].prod(1) * pixels.shape[1], 0).tolist()
    return [pixels[..., start:end] for start, end in pairwise([0, *ends])]


def _data(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes as one; positions are counted from each row's first token."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**{name: value for name, value in inputs.items() if name != "attention_mask"}, "position_ids": positions}
