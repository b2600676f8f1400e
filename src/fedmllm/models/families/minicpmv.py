"""MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5, whose code comes with their weights: ``forward(data=...)``, with images as lists by sample."""

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
"""The placeholder of an image in a text. The processor replaces it with the image's tokens."""


class MiniCPMV(ModelFamily):
    """``data`` contains, by sample, the slices of its images, their sizes in patches, and the column ranges of their features.

    A sample's slices, each of shape (3, patch, patch * number of patches), are concatenated into one tensor. ``tgt_sizes`` holds the sizes
    that separate them again.
    """

    auto_class = "AutoModel"

    def can_render(self, processor: ProcessorMixin) -> bool:
        """Return whether the tokenizer, not the processor, has a chat template."""
        return getattr(processor.tokenizer, "chat_template", None) is not None

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """Render every part of a message on its own line, with images as ``PICTURE``."""
        specials = [*special_tokens(processor), PICTURE]
        chat = [
            {"role": m.role, "content": "\n".join(PICTURE if p.type == "image" else defuse(str(p.value), specials) for p in m.parts)}
            for m in messages
        ]
        return continued(processor.tokenizer, chat, {"role": "assistant", "content": defuse(answer, specials)})

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Return ``input_ids`` and, with images, ``pixel_values`` (3, patch, sum of widths), ``tgt_sizes`` and ``image_bound`` (slices, 2)."""
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
        """Return each tensor as a list by sample, empty for samples without images. Column ranges count from the start of the padded row."""
        return {
            "pixel_values": [_slices(sample) if sample else [] for sample in extras],
            "tgt_sizes": [sample["tgt_sizes"] if sample else [] for sample in extras],
            "image_bound": [sample["image_bound"] + shift if sample else [] for sample, shift in zip(extras, shifts, strict=True)],
        }

    def call(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """Run ``forward(data, attention_mask=..., ...)``."""
        return model(_data(inputs), attention_mask=inputs["attention_mask"], **settings)

    def generate(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
        """Generate with the language model from the embedded prompt. Its output contains only the new tokens."""
        inner = without_adapters(model)
        embedded, _ = inner.get_vllm_embedding(_data(inputs))
        tokens: Tensor = inner.llm.generate(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], **settings)
        return tokens


def _slices(sample: Mapping[str, Tensor]) -> list[Tensor]:
    """Split a sample's concatenated slices."""
    pixels = sample["pixel_values"]
    ends = torch.cumsum(sample["tgt_sizes"].prod(1) * pixels.shape[1], 0).tolist()
    return [pixels[..., start:end] for start, end in pairwise([0, *ends])]


def _data(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's ``data`` argument. Positions count from each row's first token that is not padding."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**{name: value for name, value in inputs.items() if name != "attention_mask"}, "position_ids": positions}
