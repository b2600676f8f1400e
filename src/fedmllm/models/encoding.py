"""Messages to tensors, and the answer's log-likelihood.

Sequences are padded on the left, so that the answers of a batch end in the same column: the logits of the last few
columns are all that training and scoring ever compute, whatever the vocabulary.
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
"""How the names of processors' tensors begin that hold pixels."""


@dataclass(frozen=True)
class Encoded:
    """One prompt with its answer.

    Attributes:
        input_ids: prompt then answer, shape (length,).
        answer_length: how many of the last tokens are the answer, its end token included.
        extras: the processor's further tensors (``pixel_values`` and the like), stacked along their first axis; without those of pixels where
            features stand for them (``without_pixels``).
        by_token: the processor's numbers that stand beside tokens (``token_type_ids`` and the like), as long as ``input_ids``.
        companions: further prompts with answers that training compares with this one, by the name of the loss term that does.
        option_bias: (tokens, values) added to the logits of the options' letters in training; None for nothing.
        left_out: of a sample without its pixels, the key of its picture, and what makes ``extras`` whole again; None where nothing was left out.
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
        """The prompt alone."""
        return self.input_ids[: len(self.input_ids) - self.answer_length]

    @property
    def answer_ids(self) -> Tensor:
        """The answer alone."""
        return self.input_ids[len(self.input_ids) - self.answer_length :]

    @property
    def pictured(self) -> bool:
        """Whether it holds a picture."""
        return bool(self.extras) or self.left_out is not None

    @property
    def whole(self) -> Mapping[str, Tensor]:
        """All further tensors; those of pixels are made anew if they were left out."""
        return self.extras if self.left_out is None else self.left_out[1]()

    def without_pixels(self, again: Callable[[], Mapping[str, Tensor]]) -> Encoded:
        """The same without the tensors that hold pixels, nearly all of its memory.

        Args:
            again: makes all of ``extras``.
        """
        kept = {name: tensor for name, tensor in self.extras.items() if not name.startswith(PIXELS)}
        return replace(self, extras=kept, left_out=(self.picture, again))

    @cached_property
    def picture(self) -> bytes:
        """A key of what it holds of pictures, as the processor made it."""
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
        inputs: what the model's ``forward`` takes: ``input_ids`` and ``attention_mask`` of shape (samples, length), and what stands
            for pictures.
        answer_mask: which of the last ``answer_mask.shape[1]`` columns belong to each sample's answer.
        bias: what training adds to the logits, as (rows, answer columns, tokens) and values; None for nothing.
    """

    inputs: dict[str, Any]
    answer_mask: Tensor
    bias: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None


def encode(vlm: VisionLanguageModel, messages: Sequence[Message], answer: str) -> Encoded:
    """One sample as tensors.

    Raises:
        ModelError: if the processor does not take the sample, or prompt and answer exceed the model's context.
        DataError: if a picture cannot be read.
    """
    if vlm.max_image_side is not None:
        messages = [Message(m.role, tuple(_shrunk(part, vlm.max_image_side) for part in m.parts)) for m in messages]
    prompt, completion = vlm.family.render(vlm.processor, messages, answer)
    try:
        tensors = vlm.family.prompt_tensors(vlm.processor, prompt, messages)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"the processor of {vlm.name!r} does not take it: {' '.join(str(error).split())[:300]}") from error
    prompt_ids = tensors.pop("input_ids")[0]
    answer_ids = vlm.tokenizer(completion, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids = torch.cat([prompt_ids, answer_ids])
    if len(ids) > vlm.max_length:
        own = context(vlm.model)
        remedy = ", the model's own: shorten the text, or leave it out with data.on_bad_sample=skip"
        if own > vlm.max_length:
            remedy = f" by model.max_length: shorten the text, or raise that up to the model's own {own}"
        raise ModelError(f"prompt and answer take {len(ids)} tokens, the limit is {vlm.max_length}{remedy}")
    kinds = {name: tensors.pop(name)[0] for name in sorted(tensors) if name.endswith("token_type_ids")}
    by_token = {name: F.pad(row, (0, len(answer_ids)), value=vlm.family.answer_type) for name, row in kinds.items()}
    return Encoded(ids, len(answer_ids), tensors, by_token)


def _shrunk(part: Part, side: int) -> Part:
    """A picture with no side longer than ``side``, its shape kept; anything else as it is."""
    if part.type != "image":
        return part
    image = open_image(part.value).copy()
    image.thumbnail((side, side))
    return Part("image", image)


def collate(vlm: VisionLanguageModel, samples: Sequence[Encoded], with_answers: bool = True) -> Batch:
    """Pad samples on the left into one batch; ``with_answers=False`` leaves the prompts only, to continue from."""
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
    """Rows of different lengths in one tensor, filled up on the left."""
    return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])


def _fed(vlm: VisionLanguageModel, sample: Encoded) -> dict[str, Tensor]:
    """A sample's further tensors; those of pixels are not read where features stand for them."""
    if vlm.features is None:
        return dict(sample.whole)
    return {name: tensor for name, tensor in sample.extras.items() if not name.startswith(PIXELS)}


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or lists of them, on a device."""
    return [_moved(part, device) for part in value] if isinstance(value, list) else value.to(device)


def _bias(samples: Sequence[Encoded], columns: int, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """The samples' biases, each at the first column of its answer."""
    held = [(i, columns - sample.answer_length, sample.option_bias) for i, sample in enumerate(samples) if sample.option_bias]
    if not held:
        return None
    places = torch.tensor([[i, column] for i, column, (tokens, _) in held for _ in tokens], device=device)
    tokens, values = (torch.cat([bias[k] for _, _, bias in held]).to(device) for k in (0, 1))
    return (places[:, 0], places[:, 1], tokens), values


def option_tokens(vlm: VisionLanguageModel, sample: Sample) -> list[int]:
    """The first token of each option's letter.

    Raises:
        ModelError: if the tokenizer does not give each letter a first token of its own.
    """
    rows = vlm.tokenizer(list(letters(sample.options)), add_special_tokens=False)["input_ids"]
    tokens = [row[0] for row in rows]
    if len(set(tokens)) < len(tokens):
        raise ModelError(
            f"the tokenizer of {vlm.name!r} does not tell the letters of {len(tokens)} options apart by their first token; "
            "ask with fewer options or for a free answer, or use another model"
        )
    return tokens


def answer_nll(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """Negative log-likelihood of each answer token, shape (samples, answer columns), 0 outside the answers.

    ``nll[i, t] = -log p(token t of answer i | its prompt, the tokens before t)``, in nats and float32.
    """
    logits = answer_logits(vlm, batch)
    if batch.bias is not None:
        logits = logits.index_put(batch.bias[0], batch.bias[1], accumulate=True)
    nll = F.cross_entropy(logits.transpose(1, 2), batch.inputs["input_ids"][:, -logits.shape[1] :], reduction="none")
    return nll * batch.answer_mask


def answer_logits(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """What the model expects at each column of the answers, shape (samples, answer columns, vocabulary), float32."""
    columns = batch.answer_mask.shape[1]
    with reading(columns + 1):
        output = vlm.family.call(vlm.model, batch.inputs, logits_to_keep=columns + 1, use_cache=False)
    logits: Tensor = output.logits[:, :-1]
    return logits.float()
