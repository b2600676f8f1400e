"""SCAFFOLD's controls at clients and at the server."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedmllm.algorithms import Client
from fedmllm.training.rules import LocalResult
from server_rounds import A, B, begin, build, server_round, start, updates


def test_scaffold_corrects_gradients_and_keeps_the_mean_gradient() -> None:
    """Option II under SGD: w_K = w - lr sum(g + c - c_k), so c_k - c + (w - w_K) / (K lr) is the mean of g."""
    method = build("scaffold")
    state = dataclasses.replace(begin(method), slots={"control": {key: torch.full_like(t, 0.3) for key, t in start().items()}})
    kept = {key: torch.full_like(t, 0.1) for key, t in start().items()}
    rule = method.local_rule(method.broadcast(state), Client("c0", {"control": kept}))
    assert rule.edit_gradient is not None
    generator, rate, steps = torch.Generator().manual_seed(3), 0.05, 6
    gradients = [torch.randn(start()[A].shape, generator=generator) for _ in range(steps)]
    weights = start()[A]
    for gradient in gradients:
        weights = weights - rate * rule.edit_gradient(A, gradient)
    option_two = 0.1 - 0.3 + (start()[A] - weights) / (steps * rate)
    raw = {A: torch.stack(gradients).mean(0), B: torch.zeros_like(start()[B])}
    upload = rule.finish(LocalResult(start(), start(), {}, raw))
    torch.testing.assert_close(upload.keeps["control"][A], option_two, atol=1e-5, rtol=0)
    torch.testing.assert_close(upload.extras["control"][A], option_two - 0.1, atol=1e-5, rtol=0)


def test_scaffold_moves_the_server_control_by_the_share_of_participating_clients() -> None:
    method = build("scaffold")
    state = begin(method)
    sent = updates(method, state)
    after = server_round(method, state, sent)
    expected = 5 / 7 * np.mean([s.extras["control"][A].double().numpy() for s in sent], axis=0)
    np.testing.assert_allclose(after.slots["control"][A].numpy(), expected, atol=1e-6)
