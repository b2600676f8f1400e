"""Update compression with error feedback: bfloat16, blocks of 8- or 4-bit integers, or the largest entries only."""

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
from fedmllm.settings_file import ADVANCED
from fedmllm.types import UPDATE, ClientUpdate, Slots, Weights


class CompressionConfig(BaseModel):
    """How clients compress their updates."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["none", "bfloat16", "int8", "int4", "top_k"] = "none"
    """``none`` (float32), ``bfloat16``, ``int8`` or ``int4`` (blocks of integers that share a scale), or ``top_k`` (the largest entries only)."""
    block: int = Field(128, ge=2, json_schema_extra=ADVANCED)
    """With ``int8`` and ``int4``, the number of entries that share a scale."""
    fraction: float = Field(0.05, gt=0, le=1)
    """With ``top_k``, the fraction of the entries that clients send."""
    error_feedback: bool = True
    """Clients keep the compression error and add it to their next update (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019). With
    FlexLoRA and calibrated_flexlora, the error is projected onto the new factors."""


ENDED = "ended"
"""The factors after training to which a client's residual of the update belongs."""


class BFloat16:
    """Half the bytes: 8 bits of precision, the range of float32."""

    def pack(self, tensor: Tensor) -> Packed:
        """Round each entry to the nearest bfloat16."""
        return (tensor.to(torch.bfloat16),)

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Return the rounded entries in float32."""
        return packed[0].float().reshape(shape)


class Blocks:
    """Integers of 8 or 4 bits, ``block`` of them under one scale:

        q_i = round(x_i / s),   s = max_i |x_i| / (2^(bits - 1) - 1) in bfloat16,   x_i ~ s q_i

    bits + 16 / block bits per entry. The error of an entry is at most s / 2, plus what is clipped at the largest integer if rounding to bfloat16
    made s smaller.

    Args:
        bits: 8 or 4.
        block: entries under one scale.
    """

    def __init__(self, bits: int, block: int) -> None:
        self._bits, self._block, self._largest = bits, block, 2 ** (bits - 1) - 1

    def pack(self, tensor: Tensor) -> Packed:
        """Return the integers (two per byte if they have 4 bits) and the scales."""
        flat = tensor.reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self._block)).reshape(-1, self._block)
        scales = (padded.abs().amax(1) / self._largest).to(torch.bfloat16)
        steps = padded / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        whole = steps.nan_to_num(0, 0, 0).round().clamp(-self._largest, self._largest).to(torch.int8).reshape(-1)[: len(flat)]
        return (_paired(whole) if self._bits == 4 else whole), scales

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Return integers times scales."""
        whole, scales = packed
        count = math.prod(shape)
        flat = (_unpaired(whole)[:count] if self._bits == 4 else whole).float()
        return (flat * scales.float().repeat_interleave(self._block)[:count]).reshape(shape)


class TopK:
    """Keeps the entries of largest magnitude, each as its position (32 bits) and its value in bfloat16. The others become 0.

    Args:
        fraction: the fraction of entries to keep, at least one entry.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def pack(self, tensor: Tensor) -> Packed:
        """Return positions and values of the largest entries."""
        flat = tensor.reshape(-1)
        count = min(len(flat), max(1, math.ceil(self._fraction * len(flat))))
        places = flat.abs().nan_to_num(math.inf).topk(count).indices.sort().values
        return places.to(torch.int32), flat[places].to(torch.bfloat16)

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Return the kept entries at their positions, and 0 at all others."""
        places, values = packed
        return torch.zeros(math.prod(shape)).index_put((places.long(),), values.float()).reshape(shape)


def _paired(whole: Tensor) -> Tensor:
    """Pack pairs of 4-bit integers into bytes, the first in the lower half."""
    shifted = torch.nn.functional.pad(whole, (0, len(whole) % 2)).to(torch.uint8) & 0xF
    return shifted[::2] | shifted[1::2] << 4


def _unpaired(pairs: Tensor) -> Tensor:
    halves = torch.stack([pairs & 0xF, pairs >> 4], dim=1).reshape(-1).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


class Sent(NamedTuple):
    """Compressed tensors.

    Attributes:
        received: the tensors that the receiver decompresses.
        lost: the compression error, original minus received.
        packed: the compressed tensors that travel.
    """

    received: Weights
    lost: Weights
    packed: Mapping[str, Packed]

    @property
    def num_bytes(self) -> int:
        """Size of the compressed tensors in bytes."""
        return sum(part.nbytes for parts in self.packed.values() for part in parts)


def sent_through(codec: Codec, tensors: Weights, kept: Mapping[str, Tensor]) -> Sent:
    """Compress and decompress ``tensors_i + kept_i``.

    Args:
        codec: the compressor.
        tensors: the tensors to send.
        kept: residuals from the last time, added to the tensors of the same names; empty without error feedback.
    """
    whole = {name: tensor + kept[name] if name in kept else tensor for name, tensor in tensors.items()}
    packed = {name: codec.pack(tensor) for name, tensor in whole.items()}
    received = {name: codec.unpack(packed[name], tensor.shape) for name, tensor in whole.items()}
    return Sent(received, {name: tensor - received[name] for name, tensor in whole.items()}, packed)


@dataclass(frozen=True)
class Compression(UpdateTransform):
    """Compresses updates. With error feedback, a client adds the compression error to its next update.

        sent_k = Q(update_k + residual_k),   residual_k <- update_k + residual_k - sent_k

    This applies to the update and to each of the method's extra tensors. If the method's factors change their directions every round
    (``refactorizes``), the residual of the update is projected onto the new factors. An update that is not finite leaves no residual, which would
    spoil all of the client's later updates. It is sent regardless, for the server to refuse.

    Attributes:
        writer: the compressor Q.
        error_feedback: whether clients keep residuals.
    """

    writer: Codec
    error_feedback: bool = True
    name = "compression"

    @property
    def codec(self) -> Codec:
        """The compressor, by which the transport writes updates."""
        return self.writer

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """Compress a client's update.

        Returns:
            The update, and the slots that the client keeps: ``UPDATE`` and the names of the extra tensors hold residuals, ``ENDED`` the
            factors to which the residual of the update belongs.
        """
        ended = context.ended if context.algorithm.refactorizes else {}
        kept = _carried(context.kept, ended)
        groups = {UPDATE: update.update, **update.extras}
        sent = {kind: sent_through(self.writer, tensors, kept.get(kind, {})) for kind, tensors in groups.items()}
        arrived = {kind: through.received for kind, through in sent.items()}
        packed = {kind: through.packed for kind, through in sent.items()}
        size = sum(through.num_bytes for through in sent.values())
        written = replace(update, update=arrived.pop(UPDATE), extras=arrived, num_bytes=size, packed=packed)
        return written, self._residuals(sent, kept, ended)

    def _residuals(self, sent: Mapping[str, Sent], kept: Slots, ended: Weights) -> Slots:
        """Return the residuals that the client keeps. Tensors that the client did not send in this round keep their old residuals."""
        lost = {kind: through.lost for kind, through in sent.items() if self.error_feedback and W.is_finite(through.lost)}
        slots: Slots = {kind: {**kept.get(kind, {}), **tensors} for kind, tensors in lost.items()}
        return {**slots, ENDED: factors.named(dict(factors.pairs(ended)))} if ended and UPDATE in slots else slots


def _carried(kept: Slots, ended: Weights) -> Slots:
    """Return the residuals, with that of the update projected onto the new factors. Non-finite factors have no directions to project onto."""
    if not ended or ENDED not in kept or not W.is_finite(ended):
        return kept
    return {**kept, UPDATE: factors.carried(kept[UPDATE], kept[ENDED], ended)}


def compression(config: CompressionConfig) -> tuple[Compression, ...]:
    """Return the compression transform that a configuration names, or an empty tuple if updates are not compressed."""
    writers: dict[str, Codec] = {
        "bfloat16": BFloat16(),
        "int8": Blocks(8, config.block),
        "int4": Blocks(4, config.block),
        "top_k": TopK(config.fraction),
    }
    return (Compression(writers[config.name], config.error_feedback),) if config.name in writers else ()
