"""The trimmed mean between the plain mean and the median."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server_rounds import B, begin, build, plain_mean, server_round, updates


def test_no_trimming_is_the_plain_mean_and_full_trimming_the_median() -> None:
    algorithm = build("trimmed_mean", trim=0.0)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    np.testing.assert_allclose(server_round(algorithm, state, sent).weights[B].numpy(), plain_mean(state, sent, B), atol=1e-6)
    most, median = (server_round(build(n, **p), state, sent).weights for n, p in (("trimmed_mean", {"trim": 0.49}), ("median", {})))
    assert all(torch.equal(most[key], median[key]) for key in most)


@pytest.mark.parametrize(("trim", "count"), [(0.0, 1), (0.1, 10), (0.2, 5), (0.34, 3), (0.49, 3), (1 / 3, 3), (1 / 49, 50)])
def test_smallest_cohort_of_a_trimmed_mean_is_the_first_that_trims(trim: float, count: int) -> None:
    """It trims one client at each end; with one client fewer it is the plain mean. In floating point, 1 / 49 of 49 is less than 1."""
    algorithm = build("trimmed_mean", trim=trim)
    assert algorithm.smallest_cohort == count
    if trim:
        outlier = torch.zeros(count)
        outlier[0] = 1e6
        assert float(algorithm.middle(outlier)) == 0  # type: ignore[attr-defined]
        assert float(algorithm.middle(outlier[:-1])) > 1  # type: ignore[attr-defined]
