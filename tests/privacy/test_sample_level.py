from __future__ import annotations

import dp_accounting
import pytest

from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, epsilon
from fedmllm.privacy.sample_level import noise_for, releases
from fedmllm.training.settings import TrainingConfig

DELTA = 1e-5


def renyi_epsilon(row: Releases) -> float:
    """Return epsilon by dp-accounting's Renyi accountant, which ours does not use."""
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp_accounting.PoissonSampledDpEvent(row.rate, dp_accounting.GaussianDpEvent(row.noise_multiplier))
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, row.count))
    return float(accountant.get_epsilon(DELTA))


def test_two_hundred_samples_cost_the_reference_value() -> None:
    """They are trained on with batch 8, 14 epochs and z = 1. As one training or as 7 rounds of 2 epochs, and whatever the micro-batches.

    Renyi accounting, an independent upper bound, gives 5.494; the distribution of the privacy loss gives 4.917.
    """
    found = releases(1.0, TrainingConfig(batch_size=8, local_epochs=14), 200)
    assert found == Releases(1.0, 350, 0.04)
    assert found == releases(1.0, TrainingConfig(batch_size=2, accumulation=4, local_epochs=2), 200, 7)
    assert renyi_epsilon(found) == pytest.approx(5.494, abs=1e-3)
    assert epsilon([found], DELTA) == pytest.approx(4.917, abs=1e-3)
    # Without the amplification it would cost many times as much.
    assert epsilon([Releases(1.0, 350)], DELTA) > 100


def test_a_batch_of_all_samples_is_not_amplified() -> None:
    assert releases(1.0, TrainingConfig(batch_size=8, local_epochs=5), 3) == Releases(1.0, 5)


def test_no_samples_and_no_epochs_cost_nothing() -> None:
    assert epsilon([releases(1.0, TrainingConfig(), 0, 10)], DELTA) == 0
    assert epsilon([releases(1.0, TrainingConfig(local_epochs=0), 10)], DELTA) == 0
    with pytest.raises(ConfigError, match="at least one"):
        noise_for(8, DELTA, TrainingConfig(), 0)


@pytest.mark.slow
def test_the_noise_for_a_target_reaches_it_from_below() -> None:
    config = TrainingConfig(batch_size=8, local_epochs=2)
    z = noise_for(4.92, DELTA, config, 200, 7)
    assert z == pytest.approx(1.0, abs=2e-3)
    assert 4.91 < epsilon([releases(z, config, 200, 7)], DELTA) <= 4.92
