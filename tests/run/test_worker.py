"""Workers: what they answer, what a subclass may withhold, and what they keep from one task to the next. The tasks come as messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.algorithms import ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.data.modalities import profile
from fedmllm.data.test_copies import reduced_copy
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.errors import ConfigError
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.flower.facts import VALIDATION, Presence, Scores, read_message
from fedmllm.flower.frozen import Missing
from fedmllm.flower.messages import TaskFacts, expected, read_answer, write_question, write_task
from fedmllm.models.lora import frozen_weights, read_weights, write_weights
from fedmllm.run.resident import Resident
from fedmllm.run.worker import Worker, client_app, resident_worker
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Sample, Weights
from trained_runs import change

CLIENT = "client-00"
RESIDENT = Resident()
"""Holds model and data for all workers of this file, and for the tests' own side."""


def stirred(weights: Weights) -> Weights:
    """The server's weights in some later round: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    return {name: tensor + torch.randn(tensor.shape, generator=generator) / 8 for name, tensor in weights.items()}


class Server:
    """The server's side: writes tasks for one experiment, and reads their answers."""

    def __init__(self, experiment: Experiment, states: Path) -> None:
        self.experiment = experiment
        self.about = {"experiment": experiment.to_yaml(), "states": str(states)}
        with RESIDENT.model(experiment) as (vlm, _):
            method = build_algorithm(experiment.algorithm)
            state = method.init(read_weights(vlm.model), frozen_weights(vlm))
        broadcast = method.broadcast(replace(state, weights=stirred(state.weights)))
        self.assignment = Assignment(broadcast, method, 1e-3, experiment.seed, ClientStates(states))

    def present(self, worker: Worker, client: str = CLIENT) -> Presence | ClientFailure:
        return read_message(worker.present(write_question(client, self.about)), client, Presence)

    def train(self, worker: Worker, client: str = CLIENT) -> Answer:
        return read_answer(worker.answer(self.task(client)), client, expected(self.assignment, client))

    def score(self, worker: Worker, split: str, accepted: tuple[int, ...] = ()) -> Scores | ClientFailure:
        asked = replace(self.assignment, accepted={CLIENT: list(accepted)})
        content = write_task(asked, "federated", CLIENT, self.about | {"tested": split}, Missing())
        return read_message(worker.score(content), CLIENT, Scores)

    def task(self, client: str = CLIENT) -> bytes:
        return write_task(self.assignment, "federated", client, self.about, Missing())


def opened(kind: type[Worker] = Worker) -> Worker:
    worker = kind()
    worker.resident = RESIDENT
    return worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = opened()
    yield found
    found.close()


@pytest.fixture
def server(tiny: Experiment, tmp_path: Path) -> Server:
    return Server(tiny, tmp_path / "clients")


@pytest.fixture
def personal(tiny: Experiment, tmp_path: Path) -> Server:
    return Server(change(tiny, algorithm={"name": "ditto"}), tmp_path / "clients")


def test_a_worker_reports_the_clients_share_of_the_experiments_split(server: Server, worker: Worker) -> None:
    experiment = server.experiment
    clients = spread(RESIDENT.dataset(experiment), experiment.federation, experiment.seed).clients
    for name, samples in clients.items():
        counted = Presence(client=name, num_samples=len(samples), profile=dict(profile(samples)), rank=None, trial=True)
        assert server.present(worker, name) == counted


def test_an_unknown_client_is_named_with_those_that_there_are(server: Server, worker: Worker) -> None:
    found = server.present(worker, "nobody")
    assert isinstance(found, ClientFailure)
    assert found.reason == "LookupError: 'nobody' is not a client of this worker, which has client-00, client-01, client-02"


def test_a_worker_trains_as_the_engine_in_this_process(server: Server, worker: Worker) -> None:
    """Bit for bit, from the weights that the server sent."""
    found = server.train(worker)
    worker.close()
    experiment = server.experiment
    with RESIDENT.model(experiment) as (vlm, _):
        engine = InProcessEngine(vlm, RESIDENT.encoder(experiment), experiment.training)
        samples = spread(RESIDENT.dataset(experiment), experiment.federation, experiment.seed).clients[CLIENT]
        engine.submit(server.assignment, {CLIENT: samples})
        (alone,) = engine.completed()
    assert isinstance(found, ClientUpdate)
    assert isinstance(alone, ClientUpdate)
    assert found.update.keys() == alone.update.keys()
    assert all(torch.equal(tensor, alone.update[name]) for name, tensor in found.update.items())
    assert any(tensor.any() for tensor in found.update.values())
    assert (found.num_samples, found.metrics, found.profile) == (alone.num_samples, alone.metrics, alone.profile)


def test_an_error_is_the_clients_failure_and_the_worker_continues(server: Server, worker: Worker) -> None:
    for failed in (server.train(worker, "nobody"), server.present(worker, "nobody")):
        assert isinstance(failed, ClientFailure)
        assert failed.reason.startswith("LookupError: ")
    broken = copy(server)
    broken.about = server.about | {"experiment": "seed: -x"}
    found = broken.train(worker)
    assert isinstance(found, ClientFailure)
    assert found.reason.startswith("ConfigError: the experiment has 1 error:")
    assert isinstance(server.train(worker), ClientUpdate)


def test_other_settings_replace_the_run(server: Server, worker: Worker, tiny: Experiment, tmp_path: Path) -> None:
    """The second run has other samples and a smaller rank; the third is the first again."""
    other = Server(change(tiny, data={"num_train": 40}, lora={"r": 2}), tmp_path / "other")
    first, second, third = (one.train(worker) for one in (server, other, server))
    for update, one in ((first, server), (second, other), (third, server)):
        assert isinstance(update, ClientUpdate)
        assert update.num_samples == one.present(worker).num_samples  # type: ignore[union-attr]
    assert second.num_samples != first.num_samples  # type: ignore[union-attr]
    assert all(torch.equal(third.update[name], tensor) for name, tensor in first.update.items())  # type: ignore[union-attr]


def test_a_closed_worker_leaves_the_model_without_adapters(server: Server) -> None:
    worker = opened()
    server.present(worker)
    worker.close()
    assert not any("lora_" in name for name, _ in RESIDENT._plain(server.experiment).model.named_parameters())
    worker.close()


def test_threads_follow_the_workers_cpus(tiny: Experiment, tmp_path: Path, worker: Worker) -> None:
    servers = {threads: Server(change(tiny, engine={"worker_cpus": cpus}), tmp_path) for cpus, threads in ((2.0, 2), (0.5, 1))}
    try:
        for threads, server in servers.items():
            server.present(worker)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("split", ["", VALIDATION, "image"])
def test_a_personalized_model_is_scored_as_in_this_process(split: str, personal: Server, worker: Worker) -> None:
    """After a training that the server accepted, on either split or a copy of the test split."""
    assert isinstance(personal.train(worker), ClientUpdate)
    found = personal.score(worker, split, accepted=(0,))
    worker.close()
    assert isinstance(found, Scores)
    experiment, data = personal.experiment, RESIDENT.dataset(personal.experiment)
    held = data.validation if split == VALIDATION else reduced_copy(data.test, split, experiment.seed) if split else data.test
    with RESIDENT.model(experiment) as (vlm, _):
        write_weights(vlm.model, personal.assignment.states.load(CLIENT, [0])["personal"])
        own = evaluate(vlm, held, RESIDENT.encoder(experiment), data.metric, experiment.evaluation, experiment.seed)
    assert (found.round_num, found.metric) == (0, data.metric)
    assert found.metrics == own


def test_a_model_that_the_server_has_not_accepted_does_not_count(personal: Server, worker: Worker) -> None:
    """The client then has the global model, as before its first training."""
    before = personal.score(worker, "")
    personal.train(worker)
    assert personal.score(worker, "") == before
    assert personal.score(worker, "", accepted=(0,)) != before


def test_a_missing_validation_split_is_named_with_the_remedy(tiny: Experiment, tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"t": f"case {i}", "a": "xy"[i % 2]}) + "\n" for i in range(40)))
    options = {"train": "rows.jsonl", "test_share": 0.5, "columns": {"text": "t", "answer": "a"}, "question": "?", "choices": ["x", "y"]}
    own = {"dataset": "jsonl", "root": str(tmp_path), "options": options, "validation_share": 0.0, "num_train": None, "num_test": None}
    sections: dict[str, Any] = {"algorithm": {"name": "ditto"}, "federation": {"scenario": "aligned", "min_partition_size": 1}}
    found = Server(change(tiny, data=own, **sections), tmp_path / "clients").score(worker, VALIDATION)
    assert isinstance(found, ClientFailure)
    assert found.reason.startswith("ConfigError: the data have no validation split; set data.validation_share above 0")


class Reserved(Worker):
    """Refuses round 7, scores two samples, and withholds a fact from every kind of message."""

    def require(self, facts: TaskFacts) -> None:
        if facts.round_num == 7:
            raise ConfigError("not in round 7")

    def test(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return (next(s for s in samples if s.label), next(s for s in samples if not s.label))

    def reported(self, presence: Presence) -> Presence:
        return presence.model_copy(update={"profile": {}})

    def sent(self, answer: Answer, facts: TaskFacts) -> Answer:
        return replace(answer, metrics={}) if isinstance(answer, ClientUpdate) else answer

    def scored(self, scores: Scores, facts: TaskFacts, model: ServerState) -> Scores | ClientFailure:
        if facts.about["tested"]:
            return ClientFailure(scores.client, f"withheld {scores.metrics['num_samples']:.0f}")
        self.save(model, Path(facts.about["states"]).parent / "saved" / "own")
        return scores

    def failed(self, client: str, error: Exception) -> ClientFailure:
        return ClientFailure(client, f"no: {error}")


def test_a_subclass_decides_what_leaves_the_worker(personal: Server, tmp_path: Path) -> None:
    worker = opened(Reserved)
    presence, update = personal.present(worker), personal.train(worker)
    assert isinstance(presence, Presence)
    assert isinstance(update, ClientUpdate)
    assert presence.profile == {}
    assert update.metrics == {}
    scores = personal.score(worker, "", accepted=(0,))
    assert isinstance(scores, Scores)
    assert scores.metrics["num_samples"] == 2
    assert personal.score(worker, VALIDATION) == ClientFailure(CLIENT, "withheld 2")
    saved = load_file(tmp_path / "saved" / "own" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in personal.assignment.states.load(CLIENT, [0])["personal"].items())
    late = replace(personal.assignment, broadcast=replace(personal.assignment.broadcast, round_num=7))
    content = write_task(late, "federated", CLIENT, personal.about | {"tested": ""}, Missing())
    assert read_answer(worker.answer(content), CLIENT, expected(late, CLIENT)) == ClientFailure(CLIENT, "no: not in round 7")
    assert read_message(worker.score(content), CLIENT, Scores) == ClientFailure(CLIENT, "no: not in round 7")
    worker.close()


def test_without_an_open_run_no_model_is_saved(tmp_path: Path, worker: Worker) -> None:
    worker.save(ServerState({}), tmp_path / "adapters" / "own")
    assert not (tmp_path / "adapters").exists()


def test_a_process_has_one_worker() -> None:
    assert resident_worker() is resident_worker()


def test_the_app_answers_each_kind_of_message(personal: Server, worker: Worker) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")
    from fedmllm.flower.carrier import ask
    from loopback import LoopbackGrid

    grid: Any = LoopbackGrid(client_app(lambda: worker))

    def answered(kind: str, content: bytes) -> bytes:
        ((_, answer),) = ask(grid, kind, [(CLIENT, content)], {CLIENT: 1}, None)
        assert isinstance(answer, bytes)
        return answer

    assert isinstance(read_message(answered("query", write_question(CLIENT, personal.about)), CLIENT, Presence), Presence)
    update = read_answer(answered("train", personal.task()), CLIENT, expected(personal.assignment, CLIENT))
    assert isinstance(update, ClientUpdate)
    content = write_task(personal.assignment, "federated", CLIENT, personal.about | {"tested": ""}, Missing())
    assert isinstance(read_message(answered("evaluate", content), CLIENT, Scores), Scores)
