"""How many tokens may go through a model at once, and how many clients may train side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedmllm.models.encoding import Encoded, answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import trainable

CPU_TOKENS = 1536
"""On a CPU more gain nothing: its products are as fast as they get, and what is kept for the gradient leaves its caches."""
_SHARE = 0.6
"""Of a GPU's free memory; the rest is for what the backward pass needs besides, and for fragmentation."""
OPTIMIZED_BYTES = 16
"""Of a trained parameter in float32: itself, its gradient, AdamW's two means."""
_CLIENTS_SHARE = 0.2
"""Of a GPU's free memory for what clients of a wave train."""


def clients_at_once(vlm: VisionLanguageModel) -> int | None:
    """How many clients' tensors fit beside one another on a GPU: ``0.2 * free bytes / (16 * trained parameters)``; None elsewhere."""
    if vlm.device.type != "cuda":
        return None
    trained = sum(parameter.numel() for _, parameter in trainable(vlm.model))
    return max(1, int(_CLIENTS_SHARE * _free_bytes(vlm.device) / (OPTIMIZED_BYTES * trained)))


def token_budget(vlm: VisionLanguageModel, sample: Encoded) -> int:
    """Padded tokens of a training pass that suit the model's device.

    On a GPU ``0.6 * free bytes / kept bytes per token``, the latter measured on one sample; elsewhere ``CPU_TOKENS``.

    Args:
        vlm: the model as it trains.
        sample: to measure with; one of a typical length.
    """
    if vlm.device.type != "cuda":
        return CPU_TOKENS
    return max(1, int(_SHARE * _free_bytes(vlm.device) * len(sample.input_ids) / kept_bytes(vlm, sample)))


def _free_bytes(device: torch.device) -> int:
    """What the driver has left, and what PyTorch holds without using it."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def kept_bytes(vlm: VisionLanguageModel, sample: Encoded) -> int:
    """Bytes that a forward pass over one sample keeps for the gradient, weights apart."""

    def forward() -> None:
        with vlm.autocast():
            answer_nll(vlm, collate(vlm, [sample]))

    return saved_bytes(vlm.model, forward)


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a pass keeps for the gradient, a model's own tensors apart."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    # Held until the end: an address is a storage's only as long as it lives.
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(kept.values())
