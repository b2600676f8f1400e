"""Client-level privacy in a round: what is clipped, the noise that is added, and the number that the sum is divided by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, kstest, norm

from fedmllm.algorithms import ALGORITHMS, STRATEGIES, AlgorithmConfig, ServerState, build_algorithm
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.intake import Intake
from fedmllm.errors import ConfigError
from fedmllm.privacy.client_level import BIT, CLIP_NORM, ClientPrivacy
from fedmllm.privacy.clipping import AdaptiveClip, bit_deviation, joint_norm
from fedmllm.privacy.lawful import require_client_level
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.types import UPDATE, ClientUpdate, Weights
from server_rounds import begin, updates

COHORT = 5


def private(noise: Noise | None = None, **settings: object) -> ClientPrivacy:
    facts = {"clip_norm": 0.5, "noise_multiplier": 1.0, "cohort": COHORT, "noise": noise or Noise(1), "ledger": Ledger(Path("unused"))}
    return ClientPrivacy(**(facts | settings))  # type: ignore[arg-type]


def almost_silent(**settings: object) -> ClientPrivacy:
    """Noise so small that the means show."""
    return private(noise_multiplier=1e-12, **settings)


def released(privacy: ClientPrivacy, sent: list[Weights], state: ServerState) -> Weights:
    intake = Intake(FedAvg(), state, privacy=privacy)
    for number, update in enumerate(sent):
        intake.take(ClientUpdate(f"c{number}", update, 1 + 10 * number))
    return intake.aggregate().update


def flat(weights: Weights) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in weights.values()])


STATE = ServerState({"a": torch.zeros(3), "b": torch.zeros(2, 2)})


def numbered(*sizes: float) -> list[Weights]:
    """Updates of these norms, each in a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        update = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in STATE.weights.items()}
        scale = size / joint_norm({UPDATE: update})
        found.append({name: tensor * scale for name, tensor in update.items()})
    return found


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=COHORT))
def test_the_mean_is_of_clipped_updates_over_a_fixed_number_with_equal_weights(sizes: list[float]) -> None:
    """Fewer updates are divided by the same number, and sample counts have no effect."""
    sent = numbered(*sizes)
    expected = sum(flat(update) * min(1, 0.5 / size) for update, size in zip(sent, sizes, strict=True)) / COHORT
    assert flat(released(almost_silent(), sent, STATE)) == pytest.approx(expected, abs=1e-6)


def test_near_misses_differ_from_the_mechanism() -> None:
    """Clipping each tensor on its own allows sqrt(2) C, and dividing by the updates that arrived reveals their number."""
    sent = numbered(10.0, 10.0)
    found = flat(released(almost_silent(), sent, STATE))
    per_tensor = sum(np.concatenate([0.5 * t.numpy().ravel() / t.norm().item() for t in update.values()]) for update in sent) / COHORT
    arrived = sum(flat(update) * 0.05 for update in sent) / 2
    assert np.abs(found - per_tensor).max() > 0.01 < np.abs(found - arrived).max()


@pytest.mark.parametrize("arrived", [0, 2, COHORT])
def test_the_noise_is_normal_and_the_same_however_many_updates_arrive(arrived: int) -> None:
    """With 100,000 entries the variance is within 1.8% of (z C / m)^2, and the distribution passes a Kolmogorov-Smirnov test."""
    state = ServerState({"w": torch.zeros(100_000)})
    found = flat(released(private(noise_multiplier=2.0), [{"w": torch.zeros(100_000)}] * arrived, state)) / (2.0 * 0.5 / COHORT)
    assert found.var() == pytest.approx(1, abs=0.018)
    assert kstest(found, "norm").pvalue > 0.001


def test_noise_does_not_derive_from_the_seed() -> None:
    """Two releases of the same updates differ, although everything else about them is equal."""
    first, second = (flat(released(private(Noise()), numbered(1.0), STATE)) for _ in range(2))
    assert np.abs(first - second).min() > 0


def test_an_audit_with_a_canary_finds_the_sensitivity_and_no_more() -> None:
    """A client along a unit vector, present or absent in 2,000 rounds each: the mechanism is Gaussian with mu = 1 / z.

    The 95% Clopper-Pearson bounds of both error rates at a threshold of mu / 2 give a lower bound on mu. Dividing by the number of arrivals,
    clipping to another norm or half the noise would move it out of [0.85 mu, mu].
    """
    z, repeats = 1.0, 2000
    privacy, state = private(noise_multiplier=z), ServerState({"w": torch.zeros(4)})
    canary = {"w": torch.tensor([100.0, 0.0, 0.0, 0.0])}

    def scores(sent: list[Weights]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([released(privacy, sent, state)["w"][0].item() * COHORT / (z * 0.5) for _ in range(repeats)])

    missed = int((scores([canary]) < 0.5 / z).sum())
    raised = int((scores([]) >= 0.5 / z).sum())
    upper = [beta.ppf(0.975, wrong + 1, repeats - wrong) for wrong in (missed, raised)]
    mu = norm.isf(upper[0]) + norm.isf(upper[1])
    assert 0.85 / z <= mu <= 1 / z


def test_a_refused_update_contributes_nothing() -> None:
    broken = {name: tensor + math.nan for name, tensor in STATE.weights.items()}
    assert np.abs(flat(released(almost_silent(), [broken], STATE))).max() < 1e-9


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_an_adaptive_clip_norm_moves_toward_the_quantile_of_the_norms(size: float) -> None:
    privacy = almost_silent(adaptive=AdaptiveClip(0.8, 0.2))
    state, norms = STATE, np.array([1.0, 2.0, 3.0, 4.0, 5.0]) * size
    for _ in range(200):
        intake = Intake(FedAvg(), state, privacy=privacy)
        for number, update in enumerate(numbered(*norms)):
            intake.take(ClientUpdate(f"c{number}", update, 1))
        means = intake.aggregate().mean
        state = ServerState(state.weights, 0, {**state.slots, **privacy.slots_after(means, state.slots)})
    # Noise of deviation m / 20 on the bits keeps C moving around the 0.8 quantile, between the fourth and fifth norm.
    assert 3.2 * size < float(state.slots[CLIP_NORM][CLIP_NORM]) < 6.2 * size


def test_an_adaptive_clip_norm_has_the_published_noise() -> None:
    """With z = 1 and m = 100, bits have noise of deviation 5, and updates that of z_delta = 1.0050378."""
    privacy, state = private(cohort=100, adaptive=AdaptiveClip()), ServerState({"w": torch.zeros(100_000)})
    means = privacy.released(privacy.kinds({UPDATE: state.weights}), {})
    assert flat(means[UPDATE]).std() * 100 / 0.5 == pytest.approx(1.0050378, rel=0.01)
    bits = [float(privacy.released(privacy.kinds({}), {})[BIT][BIT]) * 100 for _ in range(4000)]
    assert np.std(bits) == pytest.approx(bit_deviation(1.0, 100), rel=0.05) == 5.0


def test_secret_cohorts_are_poisson_samples() -> None:
    privacy, names = private(rate=0.3), [f"c{i}" for i in range(40)]
    drawn = [privacy.drawn(names) for _ in range(2000)]
    sizes = np.array([len(cohort) for cohort in drawn])
    assert sizes.mean() == pytest.approx(12, abs=0.3)
    assert sizes.var() == pytest.approx(40 * 0.3 * 0.7, rel=0.15)  # a cohort of fixed size has variance 0
    assert sum("c7" in cohort for cohort in drawn) == pytest.approx(600, abs=70)


RECORD = {
    "clients": ["a", "b"],
    "num_samples": 31,
    "loss": 0.7,
    "losses": {"a": 0.7},
    "halvings": {"a": 1},
    "withheld": [],
    "refused": [{"client": "b", "reason": "the norm of the update is 33, the limit is 3"}],
    "bytes_up": 400,
    "bytes_held": 800,
    "bytes_down": 800,
    "seconds": {"train": 3.0, "aggregate": 0.1, "evaluate": 1.0, "checkpoint": 0.1},
}


def test_public_metrics_hold_no_number_that_depends_on_data() -> None:
    found = private().published(RECORD, 400)
    assert (found["num_samples"], found["loss"], found["losses"], found["halvings"], found["withheld"]) == (0, None, {}, {}, ["a", "b"])
    assert (found["bytes_up"], found["seconds"]) == (400, RECORD["seconds"])


def test_public_metrics_of_a_secret_cohort_do_not_reveal_who_took_part_or_how_many() -> None:
    found = private(rate=0.5).published(RECORD, 400)
    assert (found["clients"], found["refused"], found["withheld"]) == ([], [], [])
    assert (found["bytes_up"], found["bytes_held"]) == (COHORT * 400, 0)
    assert found["seconds"] == {"evaluate": 1.0, "checkpoint": 0.1}


ALLOWED = {"fedadagrad", "fedadam", "fedavg", "fedavgm", "fedit", "fedprox", "fedyogi", "ffa_lora", "rolora"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_each_method_is_bounded_or_refused(name: str) -> None:
    """What an allowed method adds to the aggregate has a norm of at most C, with the kinds for which noise is added."""
    method = build_algorithm(AlgorithmConfig(name=name))
    if name not in ALLOWED:
        with pytest.raises(ConfigError, match=rf"privacy.unit: client does not work with {name}, because .*; use ffa_lora"):
            require_client_level(method, ALGORITHMS[name], name)
        return
    require_client_level(method, ALGORITHMS[name], name)
    state, privacy = begin(method), private()
    for update in updates(method, state, 100.0):
        slots = method.fold(state, update)[0]
        assert slots.keys() == {UPDATE}
        assert joint_norm(privacy.bounded(slots, {})) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        ({"name": "modality_coverage"}, "omit modality_coverage"),
        ({"name": "adaptive_regularization", "parameters": {"adaptivity": 1.0}}, "set adaptivity of adaptive_regularization to 0"),
        ({"name": "label_calibration", "parameters": {"global_prior": True}}, "omit global_prior"),
    ],
)
def test_strategies_that_need_private_facts_are_refused(strategy: dict[str, object], remedy: str) -> None:
    config = AlgorithmConfig.model_validate({"name": "fedavg", "strategies": [strategy]})
    with pytest.raises(ConfigError, match=remedy):
        require_client_level(build_algorithm(config), ALGORITHMS["fedavg"], "fedavg")


def test_other_strategies_are_allowed() -> None:
    for name in STRATEGIES.keys() - {"modality_coverage"}:
        config = AlgorithmConfig.model_validate({"name": "fedavg", "strategies": [name]})
        require_client_level(build_algorithm(config), ALGORITHMS["fedavg"], "fedavg")
