"""A client's new state is committed when its update is accepted. After a refused, late or lost update the client keeps its old state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.algorithms import AlgorithmConfig, Client, ServerState, StrategyConfig, build_algorithm
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Assignment, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import CompressionConfig, compression
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.scores import personal_models
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Answer, Broadcast, ClientFailure, ClientUpdate, Sample, Slots, Weights
from scripted import Scripted, answers, cut_short

PLAIN, INT4 = CompressionConfig(), CompressionConfig(name="int4")
Change = Callable[[ClientUpdate], Answer]


def scaled(factor: float) -> Change:
    return lambda sent: replace(sent, update={name: factor * tensor for name, tensor in sent.update.items()})


FAULTS: dict[str, Change] = {
    "NaN": scaled(float("nan")),
    "too large": scaled(1e6),
    "late": lambda sent: ClientFailure(sent.client, "no answer within the deadline of 1 s"),
    "lost": lambda sent: ClientFailure(sent.client, "Flower: Node Unavailable"),
}
"""What happens to an answer after its client has trained. The last two are ``flower.engine``'s failures for silence and for an error."""


@dataclass
class SpoiledAnswers(Scripted):
    """Trains real clients, then spoils chosen answers: ``spoiled`` counts them by round and client."""

    engine: InProcessEngine
    change: Change
    spoiled: dict[tuple[int, str], int]

    def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        for answer in answers(self.engine, assignment, clients):
            key = (assignment.broadcast.round_num, answer.client)
            left = self.spoiled.get(key, 0)
            self.spoiled[key] = left - 1
            yield self.change(answer) if left > 0 and isinstance(answer, ClientUpdate) else answer


@dataclass
class Recorded:
    """A method that records the state that each client starts from, and each round's broadcast."""

    method: Any
    states: dict[tuple[int, str], Slots] = field(default_factory=dict)
    sent: dict[int, Broadcast] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def local_rule(self, broadcast: Broadcast, client: Client) -> Any:
        self.states[broadcast.round_num, client.name] = client.state
        self.sent[broadcast.round_num] = broadcast
        return self.method.local_rule(broadcast, client)


@dataclass
class Trial:
    """Runs a loop on a tiny model with three clients."""

    vlm: VisionLanguageModel
    encoder: Encoder
    clients: dict[str, list[Sample]]
    folder: Path
    start: Weights = field(init=False)

    def __post_init__(self) -> None:
        self.start = read_weights(self.vlm.model)

    def run(
        self,
        name: str,
        spoiled: Mapping[tuple[int, str], int],
        change: Change,
        rounds: int = 4,
        *,
        folder: str = "run",
        compressed: CompressionConfig = PLAIN,
        failures: FailureConfig | None = None,
        strategies: Sequence[str] = (),
        cohort: int = 3,
    ) -> tuple[Recorded, Loop, Stage, ServerState]:
        config = AlgorithmConfig(name=name, strategies=tuple(StrategyConfig(name=strategy) for strategy in strategies))
        method, training = Recorded(build_algorithm(config)), TrainingConfig(learning_rate=3e-3, schedule="constant")
        way = SpoiledAnswers(InProcessEngine(self.vlm, self.encoder, training), change, dict(spoiled))
        loop = Loop(
            method, way, training, Split(lambda w, b: {"score": 0.0}), RunStore(self.folder / folder), 0, transforms=compression(compressed)
        )  # type: ignore[arg-type]
        if failures is not None:
            loop = replace(loop, failures=failures)
        stage = Stage("federated", self.clients, rounds, cohort)
        return method, loop, stage, run_stage(loop, stage, method.init(self.start, frozen_weights(self.vlm)))


@pytest.fixture
def trial(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path) -> Trial:
    # Clients with one, two and three samples. Some samples lack a modality.
    held = zip("abc", federation.clients.values(), strict=True)
    return Trial(vlm, encoder, {name: list(itertools.islice(samples, 1 + i)) for i, (name, samples) in enumerate(held)}, tmp_path)


def same(a: Slots, b: Slots) -> bool:
    return {kind: slot.keys() for kind, slot in a.items()} == {kind: slot.keys() for kind, slot in b.items()} and all(
        torch.equal(tensor, b[kind][name]) for kind, slot in a.items() for name, tensor in slot.items()
    )


KEEPERS = {
    "controls": ("scaffold", PLAIN, {"control"}),
    "residuals": ("fedavg", INT4, {"compression.update"}),
    "a personal model": ("ditto", PLAIN, {"personal"}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("what", KEEPERS)
def test_a_client_keeps_its_state_when_its_update_is_not_accepted(trial: Trial, what: str, fault: str) -> None:
    """Client b fails in the first, third and fourth round. It starts from nothing, then from the state of the second round."""
    name, compressed, kinds = KEEPERS[what]
    spoiled = dict.fromkeys([(0, "b"), (2, "b"), (3, "b")], 1)
    method, *_ = trial.run(name, spoiled, FAULTS[fault], rounds=5, compressed=compressed)
    started = {client: [method.states[i, client] for i in range(5)] for client in "abc"}
    assert started["b"][0] == started["b"][1] == {}
    assert started["b"][2].keys() == kinds
    assert same(started["b"][2], started["b"][3])
    assert same(started["b"][3], started["b"][4])
    assert not any(same(one, other) for client in "ac" for one, other in itertools.pairwise(started[client]))


@pytest.mark.parametrize("fault", ["too large", "lost"])
def test_a_personalized_model_comes_from_the_last_accepted_round(trial: Trial, fault: str) -> None:
    """In the last round b's update fails; c's fails in both rounds."""
    whole, _, _, _ = trial.run("ditto", {}, FAULTS[fault], rounds=2, folder="whole")
    _, loop, stage, end = trial.run("ditto", dict.fromkeys([(1, "b"), (0, "c"), (1, "c")], 1), FAULTS[fault], rounds=2)
    models = personal_models(loop, stage, end)
    assert same({"personal": models["b"]}, whole.states[1, "b"])
    assert same({"personal": models["c"]}, {"personal": end.weights})


@pytest.mark.parametrize(("fault", "strategies"), [("NaN", ()), ("lost", ()), ("late", ("modality_coverage",))])
def test_the_servers_control_is_the_mean_of_all_clients_controls(trial: Trial, fault: str, strategies: Sequence[str]) -> None:
    """For any cohorts, any failures, and any weights of updates that a strategy sets."""
    spoiled = dict.fromkeys([(0, "b"), (1, "b"), (2, "a"), (2, "b"), (2, "c"), (3, "a")], 1)
    _, loop, stage, end = trial.run(
        "scaffold", spoiled, FAULTS[fault], 7, failures=FailureConfig(below="skip"), strategies=strategies, cohort=2
    )
    states = loop.store.client_states("federated")
    kept = [states.load(client, end.accepted.get(client, ())) for client in stage.clients]
    for name, control in end.slots["control"].items():
        mean = sum((slots["control"][name].double() for slots in kept if slots), torch.zeros(())) / 3
        torch.testing.assert_close(control.double(), mean, atol=1e-7, rtol=1e-5)
    assert any(float(tensor.abs().max()) > 1e-5 for tensor in end.slots["control"].values())


def test_a_skipped_round_does_not_change_client_state(trial: Trial) -> None:
    """In the second round only two of the three required updates arrive."""
    policy = FailureConfig(below="skip", min_updates=3)
    method, *_ = trial.run("scaffold", {(1, "b"): 1}, FAULTS["NaN"], 3, failures=policy)
    assert all(same(method.states[1, client], method.states[2, client]) for client in "abc")
    assert all(method.states[2, client] for client in "abc")


def test_a_client_asked_again_starts_from_the_same_state(trial: Trial) -> None:
    """The first answer in the second round is refused, the second accepted. The client ends as if nothing had failed."""
    whole = trial.run("scaffold", {}, FAULTS["lost"], 3, folder="whole", compressed=INT4)
    policy = FailureConfig(below="wait", min_updates=3, pause=0)
    again = trial.run("scaffold", {(1, "b"): 1}, FAULTS["lost"], 3, compressed=INT4, failures=policy)
    assert all(same(whole[0].states[key], again[0].states[key]) for key in whole[0].states)
    assert all(torch.equal(tensor, again[3].weights[name]) for name, tensor in whole[3].weights.items())


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("what", KEEPERS)
def test_an_interrupted_run_with_refused_updates_ends_the_same(trial: Trial, what: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies before a round's checkpoint is written, after clients have trained in the next round. Their pending state must not count."""
    name, compressed, _ = KEEPERS[what]
    spoiled = dict.fromkeys([(0, "a"), (1, "b"), (2, "c"), (2, "b"), (3, "b")], 1)
    whole = trial.run(name, spoiled, FAULTS["NaN"], 5, folder="whole", compressed=compressed)
    with cut_short(monkeypatch, cut):
        trial.run(name, spoiled, FAULTS["NaN"], 5, folder="parts", compressed=compressed)
    parts = trial.run(name, spoiled, FAULTS["NaN"], 5, folder="parts", compressed=compressed)
    for client in "abc":
        ends = [loop.store.client_states("federated").load(client, end.accepted[client]) for _, loop, _, end in (whole, parts)]
        assert same(*ends)
    assert whole[3].accepted == parts[3].accepted
    assert all(torch.equal(tensor, parts[3].weights[name]) for name, tensor in whole[3].weights.items())
    files = [
        {p.relative_to(trial.folder / f): p.read_bytes() for p in (trial.folder / f).rglob("*.safetensors")} for f in ("whole", "parts")
    ]
    assert files[0] == files[1]


def test_a_run_stopped_by_too_few_updates_resumes_with_unchanged_clients(trial: Trial) -> None:
    whole = trial.run("scaffold", {}, FAULTS["lost"], 3, folder="whole")
    policy = FailureConfig(min_updates=3)
    with pytest.raises(FederationError, match="2 usable updates, 3 needed"):
        trial.run("scaffold", {(1, "b"): 1}, FAULTS["lost"], 3, failures=policy)
    resumed = trial.run("scaffold", {}, FAULTS["lost"], 3, failures=policy)
    assert all(torch.equal(tensor, resumed[3].weights[name]) for name, tensor in whole[3].weights.items())
