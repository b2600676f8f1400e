"""Updates in fewer bytes: other number formats, blocks of small integers, the largest entries only; with error feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import ClientContext, Codec, Packed, UpdateTransform
from fedmllm.types import ClientUpdate, Slots, Weights


class CompressionConfig(BaseModel):
    """How clients' updates are written for the way up."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["none", "bfloat16", "int8", "int4", "top_k"] = "none"
    """``none`` (float32), ``bfloat16``, blocks of 8 or 4 bit integers with a scale each, or the largest entries only."""
    block: int = Field(128, ge=2)
    """Entries that share a scale, of ``int8`` and ``int4``."""
    fraction: float = Field(0.05, gt=0, le=1)
    """Which part of the entries ``top_k`` sends."""
    error_feedback: bool = True
    """Clients keep what was lost on the way and add it to their next update (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019); under
    FlexLoRA and fedmllm it is carried over to the new factors."""


class BFloat16:
    """Half the bytes: 8 bits of precision, the range of float32."""

    def pack(self, tensor: Tensor) -> Packed:
        """Rounded to the nearest."""
        return (tensor.to(torch.bfloat16),)

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Exactly what was sent."""
        return packed[0].float().reshape(shape)


class Blocks:
    """Integers of 8 or 4 bits, ``block`` of them under one scale:

        q_i = round(x_i / s),   s = max_i |x_i| / (2^(bits - 1) - 1) in bfloat16,   x_i ~ s q_i

    bits + 16 / block bits per entry. The error of an entry is at most s / 2 and, where rounding made s smaller, what was cut off at
    the largest integer.

    Args:
        bits: 8 or 4.
        block: entries under one scale.
    """

    def __init__(self, bits: int, block: int) -> None:
        self._bits, self._block, self._largest = bits, block, 2 ** (bits - 1) - 1

    def pack(self, tensor: Tensor) -> Packed:
        """The integers, two to a byte where they have 4 bits, and the scales."""
        flat = tensor.reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self._block)).reshape(-1, self._block)
        scales = (padded.abs().amax(1) / self._largest).to(torch.bfloat16)
        steps = padded / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        whole = steps.nan_to_num(0, 0, 0).round().clamp(-self._largest, self._largest).to(torch.int8).reshape(-1)[: len(flat)]
        return (_paired(whole) if self._bits == 4 else whole), scales

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Integers times scales."""
        whole, scales = packed
        count = math.prod(shape)
        flat = (_unpaired(whole)[:count] if self._bits == 4 else whole).float()
        return (flat * scales.float().repeat_interleave(self._block)[:count]).reshape(shape)


class TopK:
    """The entries of largest size, each as its position (32 bits) and its value in bfloat16; the others count as 0.

    Args:
        fraction: which part of the entries, at least one.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def pack(self, tensor: Tensor) -> Packed:
        """Positions and values."""
        flat = tensor.reshape(-1)
        count = min(len(flat), max(1, math.ceil(self._fraction * len(flat))))
        places = flat.abs().nan_to_num(math.inf).topk(count).indices.sort().values
        return places.to(torch.int32), flat[places].to(torch.bfloat16)

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Zeros but for what was sent."""
        places, values = packed
        return torch.zeros(math.prod(shape)).index_put((places.long(),), values.float()).reshape(shape)


def _paired(whole: Tensor) -> Tensor:
    """Two integers of 4 bits to a byte, the first in the lower half."""
    shifted = torch.nn.functional.pad(whole, (0, len(whole) % 2)).to(torch.uint8) & 0xF
    return shifted[::2] | shifted[1::2] << 4


def _unpaired(pairs: Tensor) -> Tensor:
    halves = torch.stack([pairs & 0xF, pairs >> 4], dim=1).reshape(-1).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


class Sent(NamedTuple):
    """Tensors on their way.

    Attributes:
        received: as they arrive.
        lost: what was to be sent less that.
        packed: as they are sent.
    """

    received: Weights
    lost: Weights
    packed: Mapping[str, Packed]

    @property
    def num_bytes(self) -> int:
        """On the way."""
        return sum(part.nbytes for parts in self.packed.values() for part in parts)


def sent_through(codec: Codec, tensors: Weights, kept: Mapping[str, Tensor]) -> Sent:
    """Send ``tensors_i + kept_i``.

    Args:
        codec: how they are written.
        tensors: what is to be sent.
        kept: what was lost the last time, added to what is named alike; empty for no feedback.
    """
    whole = {name: tensor + kept[name] if name in kept else tensor for name, tensor in tensors.items()}
    packed = {name: codec.pack(tensor) for name, tensor in whole.items()}
    received = {name: codec.unpack(packed[name], tensor.shape) for name, tensor in whole.items()}
    return Sent(received, {name: tensor - received[name] for name, tensor in whole.items()}, packed)


@dataclass(frozen=True)
class Compression(UpdateTransform):
    """Updates in fewer bytes; with error feedback, what was lost is added to the client's next update.

        sent_k = Q(update_k + residual_k),   residual_k <- update_k + residual_k - sent_k

    for the update and for each of the method's further tensors. Where the method's factors have other directions in each round
    (``splits_anew``), the residual of the update is carried over to the new ones. An update that is not finite is sent as it is, for the server to
    refuse, and leaves no residual, which would spoil all of the client's later updates.

    Attributes:
        writer: Q.
        error_feedback: whether clients keep residuals.
    """

    writer: Codec
    error_feedback: bool = True
    name = "compression"

    @property
    def codec(self) -> Codec:
        """The writer."""
        return self.writer

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """The rule above. Slots: ``update`` and the further tensors' names hold residuals, ``ended`` the factors they belong to."""
        ended = context.ended if context.algorithm.splits_anew else {}
        kept = _carried(context.kept, ended)
        groups = {"update": update.update, **update.extras}
        sent = {kind: sent_through(self.writer, tensors, kept.get(kind, {})) for kind, tensors in groups.items()}
        arrived = {kind: through.received for kind, through in sent.items()}
        packed = {kind: through.packed for kind, through in sent.items()}
        size = sum(through.num_bytes for through in sent.values())
        written = replace(update, update=arrived.pop("update"), extras=arrived, num_bytes=size, packed=packed)
        return written, self._residuals(sent, kept, ended)

    def _residuals(self, sent: Mapping[str, Sent], kept: Slots, ended: Weights) -> Slots:
        """What the client keeps of what was lost; tensors that a round does not send keep what they had."""
        lost = {kind: through.lost for kind, through in sent.items() if self.error_feedback and W.is_finite(through.lost)}
        slots: Slots = {kind: {**kept.get(kind, {}), **tensors} for kind, tensors in lost.items()}
        return {**slots, "ended": factors.named(dict(factors.pairs(ended)))} if ended and "update" in slots else slots


def _carried(kept: Slots, ended: Weights) -> Slots:
    """Residuals, that of the update in the directions of the new factors. What is not finite has no directions."""
    if not ended or "ended" not in kept or not W.is_finite(ended):
        return kept
    return {**kept, "update": factors.carried(kept["update"], kept["ended"], ended)}


def compression(config: CompressionConfig) -> tuple[Compression, ...]:
    """The transform a configuration names; none where updates go as they are."""
    writers: dict[str, Codec] = {
        "bfloat16": BFloat16(),
        "int8": Blocks(8, config.block),
        "int4": Blocks(4, config.block),
        "top_k": TopK(config.fraction),
    }
    return (Compression(writers[config.name], config.error_feedback),) if config.name in writers else ()
