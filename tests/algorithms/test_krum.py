"""Krum as the plain mean; the rule itself is compared in ``contracts``."""

from __future__ import annotations

import numpy as np

from server_rounds import A, begin, build, plain_mean, server_round, updates


def test_krum_with_all_selected_is_the_plain_mean() -> None:
    algorithm = build("krum", num_selected=5)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    np.testing.assert_allclose(server_round(algorithm, state, sent).weights[A].numpy(), plain_mean(state, sent, A), atol=1e-6)
