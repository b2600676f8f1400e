"""Rounds with client-level privacy: the ledger comes first, and nothing that depends on a client's data is written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import ServerState
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.privacy.bands import BandedNoise
from fedmllm.privacy.client_level import WITHHELD, ClientPrivacy
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Sample
from scripted import Clients, Scripted, cut_short, unscored

SAMPLE = Sample("s", "?", "a", {"text": "t"})
NAMES = [f"client-{number}" for number in range(8)]


@dataclass
class Honest(Scripted):
    """Every client moves each entry by 0.01. Clients in ``broken`` fail."""

    broken: tuple[str, ...] = ()
    asked: list[list[str]] = field(default_factory=list)
    seen: list[Assignment] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
        self.asked.append(sorted(clients))
        self.seen.append(assignment)
        self.events.append("task")
        for name in clients:
            if name in self.broken:
                yield ClientFailure(name, "ValueError: sample 17 says 'the patient'")
            else:
                yield ClientUpdate(name, {"w": torch.full((4,), 0.01)}, 1, {"loss": 2.125}, profile={"image": 1})


class Watched(Ledger):
    """A ledger that also notes in the engine's events when it is written."""

    events: list[str]

    def spend(self, *args: object, **about: object) -> None:
        super().spend(*args, **about)  # type: ignore[arg-type]
        self.events.append("ledger")


def private_loop(folder: Path, engine: Scripted, rate: float = 1.0, ledger: Ledger | None = None) -> Loop:
    privacy = ClientPrivacy(1.0, 0.5, 4, Noise(), ledger or Ledger(folder / "privacy.jsonl"), rate)
    return Loop(FedAvg(), engine, TrainingConfig(learning_rate=1e-3), unscored(), RunStore(folder), 0, privacy=privacy)


def stage(rounds: int, sampling: str = "cyclic") -> Stage:
    return Stage("federated", {name: [SAMPLE] for name in NAMES}, rounds, 4, sampling=sampling)  # type: ignore[arg-type]


def start() -> ServerState:
    return ServerState({"w": torch.zeros(4)})


def test_each_round_is_in_the_ledger_before_the_state_that_it_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ledger = Honest(), Watched(tmp_path / "privacy.jsonl")
    ledger.events = engine.events
    save = RunStore.save_state

    def saved(store: RunStore, name: str, state: ServerState) -> None:
        time.sleep(0.05)  # a slow disk: the next task must still come after this
        save(store, name, state)
        engine.events.append("saved")

    monkeypatch.setattr(RunStore, "save_state", saved)
    run_stage(private_loop(tmp_path, engine, ledger=ledger), stage(3), start())
    assert engine.events == ["task", "ledger", "saved"] * 3
    assert [(line["round"], line["clients"]) for line in ledger.lines()] == [(n + 1, asked) for n, asked in enumerate(engine.asked)]


def test_cyclic_cohorts_are_disjoint_and_take_turns(tmp_path: Path) -> None:
    engine = Honest()
    run_stage(private_loop(tmp_path, engine), stage(4), start())
    first, second, *rest = engine.asked
    assert sorted(first + second) == NAMES
    assert rest == [first, second]


def test_a_round_that_is_repeated_after_a_crash_counts_twice_and_has_fresh_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference of two releases with the same noise would reveal the updates."""
    engine = Honest()
    with cut_short(monkeypatch, after=1):
        run_stage(private_loop(tmp_path, engine), stage(3), start())
    states = [assignment.broadcast.weights for assignment in engine.seen]
    end = run_stage(private_loop(tmp_path, engine), stage(3), start())
    assert [line["round"] for line in Ledger(tmp_path / "privacy.jsonl").lines()] == [1, 2, 2, 3]
    assert end.round_num == 3
    assert len(states) == 2
    assert torch.equal(engine.seen[2].broadcast.weights["w"], states[1]["w"])  # the durable state after round 1


def test_clients_learn_nothing_about_others_beside_the_weights(tmp_path: Path) -> None:
    engine = Honest()
    run_stage(private_loop(tmp_path, engine), stage(2), start())
    assert all(not a.broadcast.population.profile and a.broadcast.population.num_clients == 8 for a in engine.seen)


def test_a_failed_client_is_named_without_its_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Honest(broken=("client-3",))
    run_stage(private_loop(tmp_path, engine), stage(2), start())
    refused = [row for record in RunStore(tmp_path).records() for row in record["refused"]]
    assert refused == [{"client": "client-3", "reason": WITHHELD}]
    assert "the patient" in caplog.text
    assert "client-3" not in [name for line in Ledger(tmp_path / "privacy.jsonl").lines() for name in line["clients"]]


def test_an_update_of_any_norm_is_clipped_and_not_refused(tmp_path: Path) -> None:
    """A refusal would reveal that a client has a large norm."""

    class Large(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for name in clients:
                yield ClientUpdate(name, {"w": torch.full((4,), 1e6)}, 1)

    state = run_stage(private_loop(tmp_path, Large()), stage(1), start())
    assert RunStore(tmp_path).records()[0]["refused"] == []
    assert float(state.weights["w"].norm()) < 1 + 6 * 0.5 * 2 / 4


def test_no_file_of_a_run_with_secret_cohorts_names_a_client(tmp_path: Path) -> None:
    engine, told = Honest(broken=("client-3",)), []
    loop = private_loop(tmp_path, engine, rate=0.5)
    loop = Loop(**{**vars(loop), "observer": type(loop.observer)(answered=told.append)})
    state = run_stage(loop, stage(20, "poisson"), start())
    assert len({len(asked) for asked in engine.asked}) > 1  # the size of the cohort varies
    assert state.accepted == {}
    assert told == []
    for path in tmp_path.rglob("*"):
        assert "client-" not in path.name
        assert path.is_dir() or b"client-" not in path.read_bytes()
    differing = ("round", "learning_rate", "seconds", "score", "scores")
    lines = [{k: v for k, v in record.items() if k not in differing} for record in RunStore(tmp_path).records()]
    assert all(line == lines[0] for line in lines)
    assert lines[0]["bytes_down"] == 4 * 16


def test_an_empty_cohort_still_releases_noise(tmp_path: Path) -> None:
    state = run_stage(private_loop(tmp_path, Honest(), rate=1e-9), stage(1, "poisson"), start())
    assert float(state.weights["w"].abs().min()) > 0
    assert len(Ledger(tmp_path / "privacy.jsonl").lines()) == 1


def test_banded_noise_begins_anew_after_a_skipped_round(tmp_path: Path) -> None:
    """After it a client may take part sooner than every b releases."""
    engine = Honest(broken=tuple(NAMES[:4]))
    loop = private_loop(tmp_path, engine)
    assert loop.privacy is not None
    noise = BandedNoise(2, Noise())
    private = replace(loop.privacy, banded=noise, cohort=4)
    policy = FailureConfig(min_updates=4, below="skip")
    run_stage(replace(loop, privacy=private, failures=policy), stage(1), start())
    assert RunStore(tmp_path).records()[0]["skipped"]
    assert not noise._earlier
    assert not (tmp_path / "privacy.jsonl").exists()
    run_stage(replace(loop, privacy=private, store=RunStore(tmp_path / "other")), stage(2), start())
    assert len(noise._earlier) == 1


TRAINER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_private_rounds import Honest, private_loop, stage, start
from fedmllm.engine.rounds import run_stage
folder = Path(sys.argv[1])

class Public(Honest):
    '''Everything that clients receive is published before they answer.'''
    def answers(self, assignment, clients):
        with (folder / "published").open("a") as file:
            file.write(f"{{assignment.broadcast.round_num}} {{assignment.broadcast.weights['w'].tolist()}}\\n")
        return super().answers(assignment, clients)

print("ready", flush=True)
run_stage(private_loop(folder, Public()), stage(100000), start())
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_never_lower_the_cost(tmp_path: Path) -> None:
    """A run is killed and resumed 20 times. Each state that anyone saw has a line of its own in the ledger, and no line is ever lost."""
    draw, before = random.Random(0), 0
    script = TRAINER.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        after = len(Ledger(tmp_path / "privacy.jsonl").lines())
        assert after >= before
        before = after
    published = set((tmp_path / "published").read_text().splitlines())
    seen = [int(line.split()[0]) for line in published if line.endswith("]")]
    spent = [line["round"] for line in Ledger(tmp_path / "privacy.jsonl").lines()]
    assert len(spent) > 20
    assert all(seen.count(number) <= spent.count(number) for number in set(seen) - {0})
