"""FedAdagrad, and what its published code and FedAvgM, FedAdam and FedYogi do otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmllm.types import ClientUpdate
from server_rounds import B, begin, build, server_round, start, updates


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_the_reference_variant_starts_from_the_first_update(name: str) -> None:
    """Round 1: m = D. Round 2: m = 0.9 D_1 + 0.1 D_2. For Adagrad, m = D_2 in round 2, and v accumulates m^2."""
    algorithm = build(name, reference=True)
    state, momenta, means = begin(algorithm), [], []
    for _ in range(2):
        sent = updates(algorithm, state)
        counts = [algorithm.fold(state, update)[1] for update in sent]
        means.append(np.average([s.update[B].double().numpy() for s in sent], axis=0, weights=counts))
        state = server_round(algorithm, state, sent)
        momenta.append(state.slots["momentum"][B].numpy())
    np.testing.assert_allclose(momenta[0], means[0], atol=1e-12)
    stays = 0.0 if name == "fedadagrad" else 0.9
    np.testing.assert_allclose(momenta[1], stays * means[0] + (1 - stays) * means[1], atol=1e-12)
    if name == "fedadagrad":
        np.testing.assert_allclose(state.slots["second_moment"][B].numpy(), 1e-6 + momenta[0] ** 2 + momenta[1] ** 2, atol=1e-12)


def test_reference_fedadagrad_refuses_a_momentum() -> None:
    """Other methods accept ``beta1`` together with ``reference``."""
    with pytest.raises(ValueError, match=r"parameters: reference: the published code's FedAdagrad has no momentum, got beta1 = 0\.9"):
        build("fedadagrad", reference=True, beta1=0.9)
    assert build("fedadam", reference=True, beta1=0.8)


def test_yogi_lowers_the_second_moment_slower_than_adam() -> None:
    """After a large update, a tiny one lowers v by 1 % of v in Adam, and by 1 % of the tiny square in Yogi."""
    second = {}
    for name in ("fedadam", "fedyogi"):
        algorithm = build(name)
        state = begin(algorithm)
        for size in (1.0, 1e-3):
            state = server_round(algorithm, state, [ClientUpdate("c", {n: torch.full_like(t, size) for n, t in start().items()}, 1)])
        second[name] = state.slots["second_moment"][B][0, 0].item()
    assert second["fedadam"] == pytest.approx(0.99 * (0.99e-6 + 0.01) + 0.01e-6)
    assert second["fedyogi"] == pytest.approx(1e-6 + 0.01 - 0.01e-6)
