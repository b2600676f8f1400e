"""Our server rules compared with Flower's: the same client updates for several rounds, each side with its own state.

Where two rules differ, the tests remove one difference at a time and check that the results become equal. They then check
the difference itself against a value computed by hand. Client weights go to Flower in float64, so that its rounding plays
no part, except in the test about its rounding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from contracts.test_algorithms import COUNTS, A, B, begin, build, server_round, updates
from fedmllm import weights as W
from fedmllm.algorithms import ServerState
from fedmllm.types import ClientUpdate

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported

import flwr.serverapp.strategy as flower
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import compute_distances
from flwr.supercore.task_identity import TaskIdentity

Arrays = dict[str, np.ndarray]
ROUNDS, TOLERANCE = 4, 1e-6
ETA, BETA1, BETA2, TAU = 0.01, 0.9, 0.99, 0.01

OURS = {
    "FedAdagrad": "fedadagrad",
    "FedAdam": "fedadam",
    "FedAvg": "fedavg",
    "FedAvgM": "fedavgm",
    "FedMedian": "median",
    "FedProx": "fedprox",
    "FedTrimmedAvg": "trimmed_mean",
    "FedYogi": "fedyogi",
    "Krum": "krum",
    "MultiKrum": "krum",
}
NOT_OURS = {"Bulyan", "FedXgbBagging", "FedXgbCyclic", "QFedAvg"}
NO_METHODS = {"Result", "Strategy"}


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower requires a run, a task and a node to create messages."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The list of nodes, which is all that Flower's strategies ask of the network."""

    count: int

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.count + 1))


def record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})


def flower_round(strategy: flower.FedAvg, number: int, arrays: Arrays, clients: Sequence[Arrays], counts: Sequence[int]) -> Arrays:
    """One round of a Flower strategy: its own messages, answered by the clients in the order of their nodes."""
    asked = strategy.configure_train(number, record(arrays), ConfigRecord(), Nodes(len(clients)))
    replies = [
        Message(RecordDict({"arrays": record(weights), "metrics": MetricRecord({"num-examples": count})}), reply_to=message)
        for message, weights, count in zip(sorted(asked, key=lambda m: m.metadata.dst_node_id), clients, counts, strict=True)
    ]
    aggregated, _ = strategy.aggregate_train(number, replies)
    assert aggregated is not None
    return {name: array.numpy() for name, array in aggregated.items()}


def numpy(weights: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


def trained_weights(state: ServerState, sent: Sequence[ClientUpdate]) -> list[Arrays]:
    """Each client's weights after local training."""
    before = {name: tensor.double() for name, tensor in state.weights.items()}
    return [numpy(W.add(before, update.update)) for update in sent]


def cohort(name: str, state: ServerState, number: int = 5, one_sample: bool = False) -> list[ClientUpdate]:
    """The first ``number`` of the five updates; with ``one_sample``, every client has one sample."""
    sent = updates(build(name), state)[:number]
    return [dataclasses.replace(update, num_samples=1) for update in sent] if one_sample else sent


def repeated(sent: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Each client repeated once per sample, with one sample each."""
    return [dataclasses.replace(u, client=f"{u.client}-{i}", num_samples=1) for u in sent for i in range(u.num_samples)]


def unchanged(sent: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
    return sent


@dataclasses.dataclass(frozen=True)
class Setting:
    """How both sides are configured.

    Attributes:
        ours: name of our method.
        parameters: our method's parameters by round number, counted from 1.
        number: clients per round.
        one_sample: whether every client has one sample.
        start: a change to our state before the first round.
        feed: a change to the updates that our server receives; Flower's receives the originals.
    """

    ours: str
    parameters: Callable[[int], dict[str, float]] = lambda number: {}
    number: int = 5
    one_sample: bool = False
    start: Callable[[ServerState], ServerState] = lambda state: state
    feed: Callable[[Sequence[ClientUpdate]], Sequence[ClientUpdate]] = unchanged


def assert_same(theirs: flower.FedAvg, setting: Setting) -> None:
    """Both sides have equal weights after each of several rounds."""
    state = setting.start(begin(build(setting.ours, **setting.parameters(1))))
    arrays = numpy(state.weights)
    for number in range(1, ROUNDS + 1):
        sent = cohort(setting.ours, state, setting.number, setting.one_sample)
        arrays = flower_round(theirs, number, arrays, trained_weights(state, sent), [update.num_samples for update in sent])
        state = server_round(build(setting.ours, **setting.parameters(number)), state, setting.feed(sent))
        for name, tensor in state.weights.items():
            np.testing.assert_allclose(tensor.numpy(), arrays[name], atol=TOLERANCE, rtol=0)


def one_round(theirs: flower.FedAvg, setting: Setting) -> tuple[Arrays, Arrays, list[Arrays]]:
    """The change of the weights in the first round, Flower's and ours, and the clients' updates."""
    algorithm = build(setting.ours, **setting.parameters(1))
    state = setting.start(begin(algorithm))
    before, sent = numpy(state.weights), cohort(setting.ours, state, setting.number, setting.one_sample)
    flowers = flower_round(theirs, 1, before, trained_weights(state, sent), [update.num_samples for update in sent])
    after = numpy(server_round(algorithm, state, sent).weights)
    added, ours = ({name: array - before[name] for name, array in side.items()} for side in (flowers, after))
    return added, ours, [numpy(update.update) for update in sent]


def mean(sent: Sequence[Arrays], name: str, counts: Sequence[int] | None = None) -> np.ndarray:
    return np.asarray(np.average([update[name] for update in sent], axis=0, weights=counts))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_every_flower_strategy_is_compared_or_has_no_counterpart() -> None:
    privacy = {name for name in flower.__all__ if name.startswith("DifferentialPrivacy")}
    assert set(flower.__all__) == {*OURS, *NOT_OURS, *NO_METHODS, *privacy}


@pytest.mark.parametrize(
    ("theirs", "setting"),
    [
        (flower.FedAvg(), Setting("fedavg")),
        (flower.FedProx(proximal_mu=0.1), Setting("fedprox", lambda number: {"proximal_mu": 0.1})),
        (flower.FedAvgM(server_momentum=0.9), Setting("fedavgm")),
        (
            flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.7),
            Setting("fedavgm", lambda number: {"server_learning_rate": 0.5, "beta1": 0.7}),
        ),
        (flower.FedAvgM(server_learning_rate=0.5), Setting("fedavgm", lambda number: {"server_learning_rate": 0.5, "beta1": 0.0})),
        (flower.FedMedian(), Setting("median")),
        (flower.FedMedian(), Setting("median", number=4)),
        (flower.Krum(num_malicious_nodes=1), Setting("krum")),
        (flower.Krum(num_malicious_nodes=0), Setting("krum", lambda number: {"num_byzantine": 0})),
    ],
    ids=["FedAvg", "FedProx", "FedAvgM", "FedAvgM-slower", "FedAvgM-rate-alone", "FedMedian-5", "FedMedian-4", "Krum-1", "Krum-0"],
)
def test_same_rule(theirs: flower.FedAvg, setting: Setting) -> None:
    """Clients have unequal sample counts. Only the names and defaults of parameters differ."""
    assert_same(theirs, setting)


@pytest.mark.parametrize(("trim", "number"), [(0.0, 5), (0.2, 5), (0.2, 4), (0.3, 5), (0.3, 4), (0.49, 5), (0.49, 4)])
def test_trimmed_mean_drops_as_many_clients_as_flower(trim: float, number: int) -> None:
    """Both drop ``floor(trim K)`` clients at each end, 0 to 2 here, and weight the others equally."""
    assert_same(flower.FedTrimmedAvg(beta=trim), Setting("trimmed_mean", lambda _: {"trim": trim}, number))


def test_flower_fedprox_sends_mu_and_leaves_the_term_to_the_client() -> None:
    """Flower's ``FedProx`` only sends mu: its clients must add the term themselves. In ours the term is part of the method."""
    asked = flower.FedProx(proximal_mu=0.1).configure_train(1, record({A: np.zeros(2)}), ConfigRecord(), Nodes(2))
    assert {message.content["config"]["proximal-mu"] for message in asked} == {0.1}


def test_flower_fedavgm_has_no_momentum_by_default() -> None:
    """Flower's default momentum is 0, which makes it FedAvg; ours is 0.9. Nothing else differs."""
    assert_same(flower.FedAvgM(), Setting("fedavgm", lambda number: {"beta1": 0.0}))
    assert_same(flower.FedAvgM(), Setting("fedavg"))


ADAPTIVE: dict[str, Callable[[np.ndarray | float, np.ndarray], np.ndarray]] = {
    "FedAdagrad": lambda v, square: v + square,
    "FedAdam": lambda v, square: BETA2 * v + (1 - BETA2) * square,
    "FedYogi": lambda v, square: v - (1 - BETA2) * square * np.sign(v - square),
}
"""The next second moment."""


def adaptive(name: str) -> flower.FedAvg:
    decay = {} if name == "FedAdagrad" else {"beta_1": BETA1, "beta_2": BETA2}
    strategy: flower.FedAvg = getattr(flower, name)(eta=ETA, tau=TAU, **decay)
    return strategy


def bias_correction(name: str, number: int) -> float:
    """The factor on Flower's FedAdam rate in a round, which is Adam's bias correction for the following step."""
    return float(np.sqrt(1 - BETA2 ** (number + 1)) / (1 - BETA1 ** (number + 1))) if name == "FedAdam" else 1.0


def matched(name: str) -> Callable[[int], dict[str, float]]:
    """Our parameters that reproduce Flower's: no momentum for FedAdagrad, and FedAdam's bias correction folded into the rate."""

    def parameters(number: int) -> dict[str, float]:
        shared = {"server_learning_rate": ETA * bias_correction(name, number), "tau": TAU}
        return {**shared, "beta1": 0.0} if name == "FedAdagrad" else {**shared, "beta1": BETA1, "beta2": BETA2}

    return parameters


def from_zero(state: ServerState) -> ServerState:
    """The state with Flower's initial second moment, zero."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in state.slots["second_moment"].items()}
    return dataclasses.replace(state, slots={**state.slots, "second_moment": zero})


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_servers_agree_once_their_differences_are_removed(name: str) -> None:
    """One sample per client, ``v_0 = 0``, FedAdam's bias correction, and no momentum for FedAdagrad."""
    assert_same(adaptive(name), Setting(OURS[name], matched(name), one_sample=True, start=from_zero))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_servers_weight_clients_differently(name: str) -> None:
    """Flower weights clients by samples; ours weights them equally. A Flower client with n samples equals n of our clients with one each."""
    assert_same(adaptive(name), Setting(OURS[name], matched(name), start=from_zero, feed=repeated))
    flowers, ours, sent = one_round(adaptive(name), Setting(OURS[name], matched(name), start=from_zero))
    for side, counts in ((flowers, COUNTS), (ours, None)):
        assert_close(side[B], first_step(name, mean(sent, B, counts), v=0.0))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_servers_start_from_different_second_moments(name: str) -> None:
    """Flower starts from ``v_0 = 0``, ours from the paper's ``tau^2``. The first step of each matches a hand computation."""
    flowers, ours, sent = one_round(adaptive(name), Setting(OURS[name], matched(name), one_sample=True))
    for side, v in ((flowers, 0.0), (ours, TAU**2)):
        assert_close(side[B], first_step(name, mean(sent, B), v))
    assert np.abs(flowers[B] - ours[B]).max() > 10 * TOLERANCE


def first_step(name: str, d: np.ndarray, v: float) -> np.ndarray:
    """The change of the weights in the first round, from the mean update and the initial second moment."""
    rate, m = ETA * bias_correction(name, 1), d if name == "FedAdagrad" else (1 - BETA1) * d
    return np.asarray(rate * m / (np.sqrt(ADAPTIVE[name](v, d**2)) + TAU))


def test_flower_fedadam_corrects_the_bias_one_step_late() -> None:
    """Flower's FedAdam corrects the bias; ours and the paper's do not. In round 1 its factor is sqrt(1 - 0.99^2) / (1 - 0.9^2) = 0.742.

    Adam's own factor for the first step would be sqrt(1 - 0.99) / (1 - 0.9) = 1.
    """
    uncorrected = {"server_learning_rate": ETA, "tau": TAU, "beta1": BETA1, "beta2": BETA2}
    flowers, ours, _ = one_round(adaptive("FedAdam"), Setting("fedadam", lambda number: uncorrected, one_sample=True, start=from_zero))
    assert bias_correction("FedAdam", 1) == pytest.approx(0.742, abs=1e-3)
    assert_close(flowers[B], bias_correction("FedAdam", 1) * ours[B])


def test_flower_fedadagrad_has_no_momentum() -> None:
    """Flower fixes beta1 at 0, which is also our default, as published. With 0.9 our first step is a tenth as large."""
    for momentum, share in (({}, 1.0), ({"beta1": BETA1}, 1 - BETA1)):
        chosen = {"server_learning_rate": ETA, "tau": TAU, **momentum}
        setting = Setting("fedadagrad", lambda number, chosen=chosen: chosen, one_sample=True, start=from_zero)
        flowers, ours, _ = one_round(adaptive("FedAdagrad"), setting)
        assert_close(ours[B], share * flowers[B])


def test_multi_krum_agrees_when_clients_have_equal_weights() -> None:
    """Both choose the same clients. With one sample each, the means of the chosen clients are equal too."""
    assert_same(
        flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), Setting("krum", lambda number: {"num_selected": 3}, one_sample=True)
    )


def test_flower_multi_krum_weights_the_chosen_clients_by_samples() -> None:
    """Flower's mean of the chosen clients is weighted by samples; ours is plain. Both match a hand computation from the same three clients."""
    strategy = flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3)
    flowers, ours, sent = one_round(strategy, Setting("krum", lambda number: {"num_selected": 3}))
    flat = np.array([np.concatenate([update[A].ravel(), update[B].ravel()]) for update in sent])
    squares = np.sort(((flat[:, None] - flat[None]) ** 2).sum(axis=2), axis=1)
    chosen = np.argsort(squares[:, 1:3].sum(axis=1))[:3]
    nearest = [sent[k] for k in chosen]
    assert_close(flowers[B], mean(nearest, B, [COUNTS[k] for k in chosen]))
    assert_close(ours[B], mean(nearest, B))


def test_flower_krum_loses_small_updates_to_rounding() -> None:
    """Flower computes distances as ``|x|^2 + |y|^2 - 2 x y`` of the weights in the dtype sent.

    Ours computes ``|x - y|^2`` of the updates in float64. At 4096, float32 has a spacing of 2^-11. For ``x = 4096 + 2^-11 j``,
    x^2 = 2^24 + 4 j + 2^-22 j^2. float32 drops the last term, which is all that distances consist of.
    """
    steps, unit = (0, 2, 3, 4, 9), 2.0**-11
    clients = [np.array([4096 + unit * j], dtype=np.float32) for j in steps]
    assert not compute_distances([record({A: weights}) for weights in clients]).any()
    exact = compute_distances([record({A: weights.astype(np.float64)}) for weights in clients])
    np.testing.assert_allclose(exact, [[(unit * (i - j)) ** 2 for j in steps] for i in steps], atol=1e-8)
    state = ServerState({A: torch.tensor([4096.0])})
    sent = [ClientUpdate(f"c{j}", {A: torch.tensor([unit * j])}, 1) for j in steps]
    assert float(server_round(build("krum"), state, sent).weights[A]) == 4096 + 3 * unit  # scores, in units: 13, 5, 2, 5, 61
