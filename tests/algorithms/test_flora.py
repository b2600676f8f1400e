"""How FLoRA starts a round; the rule itself is compared in ``contracts``."""

from __future__ import annotations

import torch

from server_rounds import A, B, build, effective, server_round, start, updates


def test_flora_resets_its_factors_each_round() -> None:
    """FLoRA merges the clients' products and resets the factors. Zero updates add nothing only while B is 0, as at the start of a run."""
    algorithm = build("flora")
    zero = {A: start()[A], B: torch.zeros_like(start()[B])}
    state = algorithm.init(zero, {})
    for _ in range(2):
        state = server_round(algorithm, state, updates(algorithm, state, size=0.0))
    assert float(effective(state)["m"].abs().max()) == 0
    after = server_round(algorithm, state, updates(algorithm, state))
    assert all(torch.equal(after.weights[key], tensor) for key, tensor in zero.items())
