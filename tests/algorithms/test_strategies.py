from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmllm.algorithms.strategies as package
from fedmllm.algorithms import STRATEGIES, AlgorithmConfig, Client, ServerState, StrategyConfig, build_algorithm
from fedmllm.algorithms.strategies.adaptive_regularization import AdaptiveRegularization, depth, profile_distance
from fedmllm.algorithms.strategies.label_calibration import Calibration
from fedmllm.algorithms.strategies.modality_coverage import ModalityCoverage, coverage
from fedmllm.config import Experiment
from fedmllm.engine.intake import Intake
from fedmllm.errors import ConfigError
from fedmllm.explain import tell_renamed
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast, ClientUpdate, Population, Weights

NAMES = [f"base.layers.{i}.q_proj.lora_{factor}.weight" for i in range(28) for factor in "AB"]


def weights(value: float = 0.0) -> Weights:
    return {name: torch.full((2, 2), value) for name in NAMES}


def broadcast(profile: dict[str, int] | None = None) -> Broadcast:
    return Broadcast(0, weights(), population=Population(10, profile or {}))


def penalty(strategy: AdaptiveRegularization, own: dict[str, int], everyone: dict[str, int]) -> float:
    rule = strategy.rule(LocalRule(), broadcast(everyone), Client(profile=own))
    value = rule.penalty(weights(1.0), weights(), 0.0)
    return 0.0 if value is None else float(value)


def test_every_strategy_has_a_file() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert set(STRATEGIES) == files


def test_the_window_of_28_layers_is_the_published_4_to_23() -> None:
    """With mu = 0.01, weight 0.1, and layers s..L-1-s for s = 4: 20 layers, each with two tensors of four entries at distance 1."""
    assert AdaptiveRegularization().window(28) == range(4, 24)
    assert penalty(AdaptiveRegularization(), {"image": 1}, {"image": 9}) == pytest.approx(0.5 * 0.01 * 0.1 * 20 * 2 * 4, rel=1e-5)


@pytest.mark.parametrize(("layers", "window"), [(1, range(1)), (6, range(6)), (7, range(1, 6)), (32, range(4, 28)), (80, range(11, 69))])
def test_the_window_is_a_fraction_of_any_decoder(layers: int, window: range) -> None:
    assert AdaptiveRegularization().window(layers) == window


def test_skipped_layers_can_be_set_and_must_leave_some() -> None:
    assert AdaptiveRegularization(skip_layers=2).window(6) == range(2, 4)
    with pytest.raises(ConfigError, match="skipping 3 layers at each end leaves none of 6"):
        AdaptiveRegularization(skip_layers=3).window(6)


def test_the_pull_grows_with_the_distance_of_the_profiles() -> None:
    strategy, everyone = AdaptiveRegularization(adaptivity=4.0), {"image": 50, "text": 50}
    same, half, other = (penalty(strategy, own, everyone) for own in ({"image": 3, "text": 3}, {"image": 4}, {"audio": 1}))
    plain = penalty(AdaptiveRegularization(), {"image": 1}, everyone)
    assert same == pytest.approx(plain)
    assert half == pytest.approx(3 * plain)
    assert other == pytest.approx(5 * plain)


def test_full_weight_on_all_layers_is_fedprox() -> None:
    strategy = AdaptiveRegularization(mu=0.3, weight=1.0, skip_fraction=0.0)
    prox = build_algorithm(AlgorithmConfig(name="fedprox", parameters={"proximal_mu": 0.3}))
    rules = [strategy.rule(LocalRule(), broadcast(), Client()), prox.local_rule(broadcast(), Client())]
    now = {name: torch.randn(2, 2) for name in NAMES}
    a, b = (rule.penalty(now, weights(), 0.0) for rule in rules)
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)


def test_penalties_add_up() -> None:
    method = build_algorithm(AlgorithmConfig(name="fedprox", parameters={"proximal_mu": 0.2}, strategies=("adaptive_regularization",)))  # type: ignore[arg-type]
    value = method.local_rule(broadcast(), Client()).penalty(weights(1.0), weights(), 0.0)
    expected = 0.5 * 0.2 * 56 * 4 + 0.5 * 0.001 * 40 * 4
    assert value is not None
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kept", [{}, {"own": {name: torch.full((2, 2), 5.0) for name in NAMES if "lora_B" in name}}])
def test_no_strategy_regularizes_a_clients_own_tensors(kept: dict[str, Weights]) -> None:
    """FedSA-LoRA shares only A; the received B belongs to no client. In the first round and later, the value and the gradient ignore B."""
    method = build_algorithm(AlgorithmConfig(name="FedMLLM(fedsa_lora)"))
    now = {name: torch.full((2, 2), 1.0, requires_grad=True) for name in NAMES}
    value = method.local_rule(broadcast(), Client(state=kept)).penalty(now, weights(), 0.0)
    assert value is not None
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == pytest.approx(0.5 * 0.001 * 20 * 4)
    assert {name.split("lora_")[1][0] for name, tensor in now.items() if tensor.grad is not None} == {"A"}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [({"x": 1}, {"x": 7}, 0.0), ({"x": 1}, {"y": 1}, 1.0), ({"x": 1, "y": 1}, {"x": 3, "y": 1}, 0.25), ({}, {"x": 1}, 0.0)],
)
def test_profile_distance_is_total_variation(a: dict[str, int], b: dict[str, int], distance: float) -> None:
    assert profile_distance(a, b) == profile_distance(b, a) == pytest.approx(distance)


NEUTRAL = {
    "adaptive_regularization": {"mu": 0.0},
    "agnostic_prompt": {},
    "feature_alignment": {"weight": 0.0},
    "label_calibration": {"strength": 0.0},
    "modality_coverage": {"power": 0.0},
}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_neutral_parameters_change_nothing(name: str) -> None:
    plain = build_algorithm(AlgorithmConfig())
    method = build_algorithm(AlgorithmConfig(strategies=(StrategyConfig(name=name, parameters=NEUTRAL[name]),)))
    assert method.local_rule(broadcast({"image": 1}), Client()) == plain.local_rule(broadcast(), Client())
    update = ClientUpdate("c", weights(1.0), 7, profile={"image": 7})
    state = ServerState(weights(), population=Population(2, {"image": 7, "text": 50}))
    assert method.fold(state, update)[1] == plain.fold(state, update)[1] == 7.0


@pytest.mark.parametrize(("parameters", "needs"), [({}, False), ({"global_prior": True}, True)])
def test_a_strategy_declares_that_it_needs_all_clients_labels(parameters: dict[str, bool], needs: bool) -> None:
    """A client's own frequencies never leave it. The frequencies of all clients are sent to it if the strategy needs them."""
    strategies = (StrategyConfig(name="label_calibration", parameters=parameters), StrategyConfig(name="modality_coverage"))
    method = build_algorithm(AlgorithmConfig(strategies=strategies))
    assert method.needs_labels is needs
    labels = {'["no", "yes"]': {"no": 2, "yes": 3}}
    rule = method.local_rule(Broadcast(0, weights(), population=Population(2, labels=labels)), Client())
    assert rule.all_terms == (Calibration(1.0, labels if needs else {}),)


def test_coverage_gives_each_modality_the_same_weight() -> None:
    """100 pictures at one client, and 25 texts at each of two clients. The clients' shares c_k are 1/2, 1/4 and 1/4."""
    everyone = {"image": 100, "text": 50}
    pictures, texts = ({"image": 100}, {"text": 25})
    weighted = [n * float(coverage(own, everyone)) for n, own in ((100, pictures), (25, texts), (25, texts))]
    np.testing.assert_allclose(np.array(weighted) / sum(weighted), [0.5, 0.25, 0.25])


def test_samples_with_several_modalities_count_more() -> None:
    everyone = {"image": 40, "text": 40, "image+text": 20}
    assert coverage({"image+text": 10}, everyone) == 2 * coverage({"image": 10}, everyone)


def test_complete_clients_keep_their_weight_bit_for_bit() -> None:
    state, (weigher,) = ServerState(weights(), population=Population(3, {"image+text": 333})), ModalityCoverage().transforms
    assert weigher.weigh(37.0, ClientUpdate("c", {}, 37, profile={"image+text": 37}), state) == 37.0
    assert weigher.weigh(37.0, ClientUpdate("c", {}, 37), state) == 37.0


def test_a_strategy_weights_scaffolds_updates_but_not_its_controls() -> None:
    """Samples of the rare modality weigh 25 times as much. With two of three clients, c is 2/3 of the plain mean of their controls."""
    method = build_algorithm(AlgorithmConfig(name="scaffold", strategies=(StrategyConfig(name="modality_coverage"),)))
    start = replace(method.init({"w": torch.zeros(1)}, {}), population=Population(3, {"image": 100, "text": 4}))
    aggregator = Intake(method, start)
    for profile, value in (({"image": 1}, 1.0), ({"text": 1}, 3.0)):
        sent = {"w": torch.tensor([value])}
        aggregator.fold(ClientUpdate("c", sent, 1, extras={"control": sent}, profile=profile))
    end = method.server_step(start, aggregator.aggregate())
    assert float(end.weights["w"]) == pytest.approx((1 * 1 + 25 * 3) / 26)
    assert float(end.slots["control"]["w"]) == pytest.approx(2 / 3 * 2)


def test_fedmllm_with_a_method_is_one_name() -> None:
    config = AlgorithmConfig(name="FedMLLM(fedyogi)", parameters={"server_learning_rate": 0.01})
    assert config.method == "fedyogi"
    assert config.strategy_names == ("agnostic_prompt", "adaptive_regularization")
    method = build_algorithm(config)
    assert "momentum" in method.init(weights(), None).slots  # type: ignore[arg-type]
    assert method.local_rule(broadcast(), Client()).penalty(weights(1.0), weights(), 0.0) is not None
    assert AlgorithmConfig.model_validate(config.model_dump(mode="json")) == config


def test_calibrated_flexlora_equals_its_composition() -> None:
    """The contracts show that its server is FlexLoRA's."""
    parts = AlgorithmConfig(name="flexlora", strategies=(StrategyConfig(name="label_calibration"),))
    whole, composed = build_algorithm(AlgorithmConfig(name="calibrated_flexlora")), build_algorithm(parts)
    assert whole.local_rule(broadcast(), Client()) == composed.local_rule(broadcast(), Client()) != LocalRule()


@pytest.mark.parametrize(
    ("written", "name"), [("fedmllm", "calibrated_flexlora"), ("FedMLLM(fedmllm)", "FedMLLM(calibrated_flexlora)"), ("fedavg", "fedavg")]
)
def test_a_former_name_means_the_current_method(written: str, name: str) -> None:
    assert AlgorithmConfig(name=written) == AlgorithmConfig(name=name)
    assert AlgorithmConfig(name=written).name == name


def test_a_former_name_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tell_renamed.cache_clear()
    for _ in range(2):
        AlgorithmConfig(name="fedmllm")
    assert [record.message for record in caplog.records] == [
        "algorithm.name: fedmllm is now called calibrated_flexlora; please write the new name"
    ]


@pytest.mark.parametrize(
    ("algorithm", "part"),
    [
        ({"name": "FedMLLM(fedyoga)"}, "'fedyoga' is not a known method"),
        ({"strategies": ["prompt"]}, "'prompt' is not a known strategy; known: adaptive_regularization"),
        (
            {"strategies": [{"name": "feature_alignment", "parameters": {"mu": 1}}]},
            "feature_alignment has no parameter 'mu'; it takes weight",
        ),
        ({"strategies": [{"name": "feature_alignment", "parameters": {"weight": -1}}]}, "weight must not be negative"),
        ({"strategies": ["feature_alignment", "feature_alignment"]}, "feature_alignment is listed twice"),
        ({"name": "FedMLLM(fedavg)", "strategies": ["adaptive_regularization"]}, "adaptive_regularization is listed twice"),
        ({"strategies": [{"name": "adaptive_regularization", "parameters": {"skip_fraction": 0.5}}]}, "must be in [0, 0.5)"),
        *(
            (
                {"name": name, "strategies": ["modality_coverage"]},
                f"modality_coverage changes the weights of updates, but {name} ignores these weights",
            )
            for name in ("median", "trimmed_mean", "krum")
        ),
    ],
)
def test_wrong_strategies_are_refused(algorithm: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse({"algorithm": algorithm})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"algorithm": {"name": "FedMLLM(fedavg)"}, "data": {"prompt": "specific"}},
            "data.prompt: algorithm.strategies has agnostic_prompt",
        ),
        ({"algorithm": {"name": "krum"}, "federation": {"clients_per_round": 4}}, "krum with these parameters needs at least 5 clients"),
        (
            {"algorithm": {"name": "krum", "parameters": {"num_selected": 5}}, "federation": {"clients_per_round": 5}},
            "krum with these parameters needs at least 6 clients",
        ),
        (
            {"algorithm": {"name": "trimmed_mean"}, "federation": {"clients_per_round": 4}},
            "with these parameters needs at least 5 clients per round, got 4",
        ),
        (
            {"algorithm": {"name": "trimmed_mean", "parameters": {"trim": 0.34}}},
            "with these parameters needs at least 3 clients per round, got 2",
        ),
        ({"algorithm": {"name": "median"}}, "median with these parameters needs at least 3 clients per round, got 2"),
        (
            {"lora": {"client_ranks": [4, 8]}},
            "fedavg needs the same rank at all clients; leave it out, or use calibrated_flexlora, fedilora, flexlora, flora, hetlora",
        ),
        ({"lora": {"client_ranks": [4, 16]}, "algorithm": {"name": "hetlora"}}, "must be between 1 and r = 8, got 16"),
        ({"lora": {"client_ranks": [0]}, "algorithm": {"name": "hetlora"}}, "must be between 1 and r = 8, got 0"),
    ],
)
def test_methods_that_do_not_fit_the_experiment_are_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse(values)
    assert part in str(caught.value)


def test_a_model_without_numbered_layers_is_refused_by_the_window() -> None:
    with pytest.raises(ConfigError, match="names no decoder layer"):
        depth(("base.encoder.q_proj.lora_A.weight",))
