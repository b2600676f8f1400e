"""Encodes messages as tensors, and computes the log-likelihood of answers.

Sequences are padded on the left, so that all answers of a batch end in the same column. Training and scoring then compute only
the logits of the last few columns, which saves memory with large vocabularies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmllm.data.images import open_image
from fedmllm.data.prompts import letters
from fedmllm.errors import ModelError
from fedmllm.models.last_layer import reading
from fedmllm.models.load import VisionLanguageModel, context
from fedmllm.types import Message, Part, Sample

PIXELS = "pixel_"
"""Prefix of the names of processor outputs that contain pixels."""


@dataclass(frozen=True)
class Encoded:
    """One encoded prompt with its answer.

    Attributes:
        input_ids: the prompt's tokens, then the answer's, shape (length,).
        answer_length: number of tokens at the end that belong to the answer, including its end token.
        extras: the processor's other tensors (``pixel_values`` and the like), stacked along their first axis. Pixels are left out if
            cached image features replace them (``without_pixels``).
        by_token: the processor's per-token values (``token_type_ids`` and the like), as long as ``input_ids``.
        companions: other encoded prompts that a loss term compares with this one, by the name of the term.
        option_bias: (tokens, values) to add to the logits of the options' letters in training; None for no bias.
        left_out: for a sample without pixels, the key of its images and a function that restores all of ``extras``; None if
            nothing was left out.
    """

    input_ids: Tensor
    answer_length: int
    extras: dict[str, Tensor]
    by_token: dict[str, Tensor] = field(default_factory=dict)
    companions: Mapping[str, tuple[Encoded, ...]] = field(default_factory=dict)
    option_bias: tuple[Tensor, Tensor] | None = None
    left_out: tuple[bytes, Callable[[], Mapping[str, Tensor]]] | None = None

    @property
    def prompt_ids(self) -> Tensor:
        """The tokens of the prompt without the answer."""
        return self.input_ids[: len(self.input_ids) - self.answer_length]

    @property
    def answer_ids(self) -> Tensor:
        """The tokens of the answer, including its end token."""
        return self.input_ids[len(self.input_ids) - self.answer_length :]

    @property
    def pictured(self) -> bool:
        """Whether the sample contains an image."""
        return bool(self.extras) or self.left_out is not None

    @property
    def whole(self) -> Mapping[str, Tensor]:
        """All of ``extras``. Pixels that were left out are computed again."""
        return self.extras if self.left_out is None else self.left_out[1]()

    def without_pixels(self, again: Callable[[], Mapping[str, Tensor]]) -> Encoded:
        """Return a copy without the pixel tensors, which take nearly all of the sample's memory.

        Args:
            again: returns all of ``extras``, computed again.
        """
        kept = {name: tensor for name, tensor in self.extras.items() if not name.startswith(PIXELS)}
        return replace(self, extras=kept, left_out=(self.picture, again))

    @cached_property
    def picture(self) -> bytes:
        """A hash of the processor's outputs for the sample's images."""
        if self.left_out is not None:
            return self.left_out[0]
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.extras.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()


@dataclass(frozen=True)
class Batch:
    """Padded samples on the model's device.

    Attributes:
        inputs: the arguments of the model's ``forward``: ``input_ids`` and ``attention_mask`` of shape (samples, length), and pixels or
            image features.
        answer_mask: whether each of the last ``answer_mask.shape[1]`` columns belongs to the sample's answer.
        bias: positions (rows, answer columns, tokens) and values to add to the logits in training; None for no bias.
    """

    inputs: dict[str, Any]
    answer_mask: Tensor
    bias: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None


def encode(vlm: VisionLanguageModel, messages: Sequence[Message], answer: str) -> Encoded:
    """Encode one sample.

    Args:
        vlm: the model.
        messages: the prompt.
        answer: the answer's text.

    Raises:
        ModelError: if the processor rejects the sample, or prompt and answer exceed ``vlm.max_length``.
        DataError: if an image cannot be read.
    """
    if vlm.max_image_side is not None:
        messages = [Message(m.role, tuple(_shrunk(part, vlm.max_image_side) for part in m.parts)) for m in messages]
    prompt, completion = vlm.family.render(vlm.processor, messages, answer)
    try:
        tensors = vlm.family.prompt_tensors(vlm.processor, prompt, messages)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"the processor of {vlm.name!r} rejected it: {' '.join(str(error).split())[:300]}") from error
    prompt_ids = tensors.pop("input_ids")[0]
    answer_ids = vlm.tokenizer(completion, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids = torch.cat([prompt_ids, answer_ids])
    if len(ids) > vlm.max_length:
        own = context(vlm.model)
        remedy = ", the model's own limit; shorten the text, or leave the sample out with data.on_bad_sample=skip"
        if own > vlm.max_length:
            remedy = f" (model.max_length); shorten the text, or raise model.max_length up to the model's own limit of {own}"
        raise ModelError(f"prompt and answer take {len(ids)} tokens, but the limit is {vlm.max_length}{remedy}")
    kinds = {name: tensors.pop(name)[0] for name in sorted(tensors) if name.endswith("token_type_ids")}
    by_token = {name: F.pad(row, (0, len(answer_ids)), value=vlm.family.answer_type) for name, row in kinds.items()}
    return Encoded(ids, len(answer_ids), tensors, by_token)


def _shrunk(part: Part, side: int) -> Part:
    """Scale an image down so that no side is longer than ``side``, and keep its aspect ratio. Other content is not changed."""
    if part.type != "image":
        return part
    image = open_image(part.value).copy()
    image.thumbnail((side, side))
    return Part("image", image)


def collate(vlm: VisionLanguageModel, samples: Sequence[Encoded], with_answers: bool = True) -> Batch:
    """Pad samples on the left into one batch. ``with_answers=False`` keeps only the prompts, for generation."""
    lengths = [len(sample.input_ids) - (0 if with_answers else sample.answer_length) for sample in samples]
    length, answers = max(lengths), max(sample.answer_length for sample in samples)
    input_ids = _padded([sample.input_ids[:n] for sample, n in zip(samples, lengths, strict=True)], length, vlm.pad_token_id)
    attention_mask = _padded([torch.ones(n, dtype=torch.long) for n in lengths], length, 0)
    answer_mask = _padded([torch.ones(sample.answer_length, dtype=torch.bool) for sample in samples], answers, False)
    extras = vlm.family.batch([_fed(vlm, sample) for sample in samples], [length - n for n in lengths])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **extras}
    for name in samples[0].by_token:
        inputs[name] = _padded([sample.by_token[name][:n] for sample, n in zip(samples, lengths, strict=True)], length, 0)
    on_device: dict[str, Any] = {name: _moved(value, vlm.device) for name, value in inputs.items()}
    pictured = [sample for sample in samples if sample.pictured]
    if vlm.features is not None and pictured:
        on_device |= vlm.features.inputs(pictured)
    return Batch(on_device, answer_mask.to(vlm.device), _bias(samples, answers, vlm.device))


def _padded(rows: Sequence[Tensor], length: int, value: float) -> Tensor:
    """Stack rows of different lengths, padded on the left."""
    return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])


def _fed(vlm: VisionLanguageModel, sample: Encoded) -> dict[str, Tensor]:
    """Return the processor's other tensors of a sample, without pixels if cached features replace them."""
    if vlm.features is None:
        return dict(sample.whole)
    return {name: tensor for name, tensor in sample.extras.items() if not name.startswith(PIXELS)}


def _moved(value: Any, device: torch.device) -> Any:
    """Move a tensor, or nested lists of tensors, to a device."""
    return [_moved(part, device) for part in value] if isinstance(value, list) else value.to(device)


def _bias(samples: Sequence[Encoded], columns: int, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """Return the samples' option biases, each placed at the first column of its answer."""
    held = [(i, columns - sample.answer_length, sample.option_bias) for i, sample in enumerate(samples) if sample.option_bias]
    if not held:
        return None
    places = torch.tensor([[i, column] for i, column, (tokens, _) in held for _ in tokens], device=device)
    tokens, values = (torch.cat([bias[k] for _, _, bias in held]).to(device) for k in (0, 1))
    return (places[:, 0], places[:, 1], tokens), values


def option_tokens(vlm: VisionLanguageModel, sample: Sample) -> list[int]:
    """Return the first token of each option's letter.

    Raises:
        ModelError: if two letters have the same first token.
    """
    rows = vlm.tokenizer(list(letters(sample.options)), add_special_tokens=False)["input_ids"]
    tokens = [row[0] for row in rows]
    if len(set(tokens)) < len(tokens):
        raise ModelError(
            f"the tokenizer of {vlm.name!r} gives some letters of {len(tokens)} options the same first token; "
            "use fewer options, free answers, or another model"
        )
    return tokens


def answer_nll(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of each answer token, shape (samples, answer columns), and 0 outside the answers.

    ``nll[i, t] = -log p(token t of answer i | its prompt, the tokens before t)``, in nats and float32.
    """
    logits = answer_logits(vlm, batch)
    if batch.bias is not None:
        logits = logits.index_put(batch.bias[0], batch.bias[1], accumulate=True)
    nll = F.cross_entropy(logits.transpose(1, 2), batch.inputs["input_ids"][:, -logits.shape[1] :], reduction="none")
    return nll * batch.answer_mask


def answer_logits(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the logits that predict each answer column, in float32, shape (samples, answer columns, vocabulary)."""
    columns = batch.answer_mask.shape[1]
    with reading(columns + 1):
        output = vlm.family.call(vlm.model, batch.inputs, logits_to_keep=columns + 1, use_cache=False)
    logits: Tensor = output.logits[:, :-1]
    return logits.float()
