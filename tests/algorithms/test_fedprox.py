"""FedProx's penalty."""

from __future__ import annotations

import pytest

from fedmllm.algorithms import Client
from server_rounds import begin, build, start


def test_fedprox_penalty_is_half_mu_times_the_squared_distance() -> None:
    method = build("fedprox", proximal_mu=0.2)
    rule = method.local_rule(method.broadcast(begin(method)), Client())
    now = {key: tensor + 0.5 for key, tensor in start().items()}
    value = rule.penalty(now, start(), 0.0)
    assert value is not None
    assert float(value) == pytest.approx(0.5 * 0.2 * 33 * 0.25, rel=1e-5)
