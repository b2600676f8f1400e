"""What attacks on membership compute about samples: losses before and after training, and how well their gradients match updates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.config import Experiment
from fedmllm.models.encoding import Encoded, answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import trainable, write_base, write_weights
from fedmllm.models.memory import rows_at_once
from fedmllm.models.parallel_adapters import grouped, parallel_adapters
from fedmllm.privacy.membership import Floats
from fedmllm.run.resident import Resident
from fedmllm.training.batches import batched
from fedmllm.training.per_sample import separable
from fedmllm.types import Sample, Weights

_TOKENS = 4096
"""Tokens in a pass."""


class GlobalModel(NamedTuple):
    """The weights that clients received, and the change merged into the frozen weights."""

    weights: Weights
    base: Weights


def evidence(experiment: Experiment, held: Resident, samples: Sequence[Sample], models: Sequence[GlobalModel]) -> dict[str, Floats]:
    """Return each attack's scores of samples, higher for more likely members.

    - ``adapter``: the fall of a sample's loss from the first model to the last. The loss before training says how hard the sample is
      (Watson et al., ICLR 2022).
    - ``updates``: the mean cosine between a sample's negative gradient and the change from each model to the next (Li et al., PETS 2023).
      It is left out for methods that change the frozen weights.

    Args:
        experiment: the experiment that trained.
        held: caches.
        samples: the samples to test.
        models: global models from before the first round to after the last; at least two.
    """
    with held.model(experiment) as (vlm, _):
        encoder = held.encoder(experiment)
        encoded = [encoder(sample) for sample in samples]
        fall = _losses(vlm, encoded, models[0]) - _losses(vlm, encoded, models[-1])
        if any(model.base for model in models):
            return {"adapter": fall}
        changes = [(before.weights, W.subtract(after.weights, before.weights)) for before, after in pairwise(models)]
        cosines = [cosines_along(vlm, encoded, before, change) for before, change in changes if W.norm(change)]
        return {"adapter": fall, "updates": np.mean(cosines, axis=0) if cosines else np.zeros(len(encoded))}


def _losses(vlm: VisionLanguageModel, samples: Sequence[Encoded], model: GlobalModel) -> Floats:
    """Return each sample's mean negative log-likelihood over its answer tokens."""
    write_weights(vlm.model, model.weights)
    write_base(vlm, model.base)
    losses = np.empty(len(samples))
    with torch.no_grad():
        for group in batched(vlm, samples, _TOKENS):
            losses[group] = _mean_nll(vlm, [samples[i] for i in group]).double().cpu().numpy()
    return losses


def _mean_nll(vlm: VisionLanguageModel, samples: Sequence[Encoded]) -> Tensor:
    lengths = torch.tensor([sample.answer_length for sample in samples], device=vlm.device)
    with vlm.autocast():
        return answer_nll(vlm, collate(vlm, samples)).sum(1) / lengths


def cosines_along(vlm: VisionLanguageModel, samples: Sequence[Encoded], weights: Weights, change: Weights) -> Floats:
    """Return the cosine between a change of the weights and the negative gradient of each sample's loss. Tensors without change are left out.

    Args:
        vlm: the model.
        samples: the samples.
        weights: where the gradients are taken.
        change: the change; at least one entry is not zero.
    """
    moved = {name: tensor.double().flatten().to(vlm.device) for name, tensor in change.items() if tensor.any()}
    size, cosines = W.norm(change), np.empty(len(samples))
    for group, gradients in _gradients(vlm, samples, weights, moved):
        rows = {name: gradient.double().flatten(1) for name, gradient in gradients.items()}
        along = torch.stack([row @ moved[name] for name, row in rows.items()]).sum(0)
        norms = torch.stack([row.square().sum(1) for row in rows.values()]).sum(0).sqrt()
        cosines[group] = (-along / (norms * size).clamp(min=torch.finfo(torch.float64).tiny)).cpu().numpy()
    return cosines


def _gradients(
    vlm: VisionLanguageModel, samples: Sequence[Encoded], weights: Weights, names: Collection[str]
) -> Iterator[tuple[list[int], Weights]]:
    """Yield the positions of some samples and their gradients, of shape (samples, ...) by name, until all samples have theirs."""
    write_weights(vlm.model, weights)
    if separable(vlm):
        with parallel_adapters(vlm.model) as layers:
            for group in batched(vlm, samples, _TOKENS, rows_at_once(vlm)):
                copies = {name: t.to(vlm.device).expand(len(group), *t.shape).clone() for name, t in weights.items()}
                leaves = {name: copies[name].requires_grad_() for name in names}
                with grouped(layers, copies), torch.enable_grad():
                    loss = _mean_nll(vlm, [samples[i] for i in group]).sum()
                yield group, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return
    own = {name: parameter for name, parameter in trainable(vlm.model) if name in names}
    for place, sample in enumerate(samples):
        with torch.enable_grad():
            loss = _mean_nll(vlm, [sample]).sum()
        found = torch.autograd.grad(loss, list(own.values()))
        yield [place], {name: gradient[None] for name, gradient in zip(own, found, strict=True)}
