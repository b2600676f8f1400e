"""What a client keeps is committed when its update was accepted: one that is refused, late or lost leaves the client as it was."""

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
"""What becomes of an answer after its client has trained. What the last two look like is what ``flower.engine`` makes of silence and of an error."""


@dataclass
class Way(Scripted):
    """Trains for real, then spoils the answers that it is told to, by round and client, each so often."""

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
class Seen:
    """A method that notes what its clients begin a turn with, and what they were sent."""

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
    """Loops on a tiny model, on three clients of two samples."""

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
    ) -> tuple[Seen, Loop, Stage, ServerState]:
        config = AlgorithmConfig(name=name, strategies=tuple(StrategyConfig(name=strategy) for strategy in strategies))
        method, training = Seen(build_algorithm(config)), TrainingConfig(learning_rate=3e-3, schedule="constant")
        way = Way(InProcessEngine(self.vlm, self.encoder, training), change, dict(spoiled))
        loop = Loop(
            method, way, training, Split(lambda w, b: {"score": 0.0}), RunStore(self.folder / folder), 0, transforms=compression(compressed)
        )  # type: ignore[arg-type]
        if failures is not None:
            loop = replace(loop, failures=failures)
        stage = Stage("federated", self.clients, rounds, cohort)
        return method, loop, stage, run_stage(loop, stage, method.init(self.start, frozen_weights(self.vlm)))


@pytest.fixture
def trial(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path) -> Trial:
    # Clients of one, two and three samples, some of which miss a modality.
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
def test_a_client_whose_update_was_not_accepted_keeps_what_it_had(trial: Trial, what: str, fault: str) -> None:
    """The update of b fails in the first round, and twice later: it begins with nothing, then with what it kept from the second round."""
    name, compressed, kinds = KEEPERS[what]
    spoiled = dict.fromkeys([(0, "b"), (2, "b"), (3, "b")], 1)
    method, *_ = trial.run(name, spoiled, FAULTS[fault], rounds=5, compressed=compressed)
    begun = {client: [method.states[i, client] for i in range(5)] for client in "abc"}
    assert begun["b"][0] == begun["b"][1] == {}
    assert begun["b"][2].keys() == kinds
    assert same(begun["b"][2], begun["b"][3])
    assert same(begun["b"][3], begun["b"][4])
    assert not any(same(one, other) for client in "ac" for one, other in itertools.pairwise(begun[client]))


@pytest.mark.parametrize("fault", ["too large", "lost"])
def test_a_personal_model_is_that_of_the_last_accepted_turn(trial: Trial, fault: str) -> None:
    """In the last round that of b fails, and c's does in both."""
    whole, _, _, _ = trial.run("ditto", {}, FAULTS[fault], rounds=2, folder="whole")
    _, loop, stage, end = trial.run("ditto", dict.fromkeys([(1, "b"), (0, "c"), (1, "c")], 1), FAULTS[fault], rounds=2)
    models = personal_models(loop, stage, end)
    assert same({"personal": models["b"]}, whole.states[1, "b"])
    assert same({"personal": models["c"]}, {"personal": end.weights})


@pytest.mark.parametrize(("fault", "strategies"), [("NaN", ()), ("lost", ()), ("late", ("modality_coverage",))])
def test_the_servers_control_is_the_mean_of_all_clients_controls(trial: Trial, fault: str, strategies: Sequence[str]) -> None:
    """Whoever is drawn, whoever's update fails, and whatever a strategy makes of the updates' weights."""
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


def test_a_round_that_is_skipped_leaves_its_clients_as_they_were(trial: Trial) -> None:
    """Two of three answers came well in the second round; it needs three."""
    policy = FailureConfig(below="skip", min_updates=3)
    method, *_ = trial.run("scaffold", {(1, "b"): 1}, FAULTS["NaN"], 3, failures=policy)
    assert all(same(method.states[1, client], method.states[2, client]) for client in "abc")
    assert all(method.states[2, client] for client in "abc")


def test_a_client_that_is_asked_again_begins_where_it_began(trial: Trial) -> None:
    """Its first answer of the second round is refused, its second taken: it ends as if nothing had been."""
    whole = trial.run("scaffold", {}, FAULTS["lost"], 3, folder="whole", compressed=INT4)
    policy = FailureConfig(below="wait", min_updates=3, pause=0)
    again = trial.run("scaffold", {(1, "b"): 1}, FAULTS["lost"], 3, compressed=INT4, failures=policy)
    assert all(same(whole[0].states[key], again[0].states[key]) for key in whole[0].states)
    assert all(torch.equal(tensor, again[3].weights[name]) for name, tensor in whole[3].weights.items())


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("what", KEEPERS)
def test_with_updates_refused_a_run_that_was_cut_short_ends_alike(
    trial: Trial, what: str, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a round trains whose predecessor's checkpoint was not written any more: what was pending then counts for nothing."""
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


def test_a_run_that_stopped_for_want_of_updates_goes_on_with_its_clients_as_they_were(trial: Trial) -> None:
    whole = trial.run("scaffold", {}, FAULTS["lost"], 3, folder="whole")
    policy = FailureConfig(min_updates=3)
    with pytest.raises(FederationError, match="2 usable updates, 3 needed"):
        trial.run("scaffold", {(1, "b"): 1}, FAULTS["lost"], 3, failures=policy)
    resumed = trial.run("scaffold", {}, FAULTS["lost"], 3, failures=policy)
    assert all(torch.equal(tensor, resumed[3].weights[name]) for name, tensor in whole[3].weights.items())
