"""The clients of a run: simulated ones, and sites, which answer here from the same process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmllm.algorithms import build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError, FederationError
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.engine import FlowerEngine
from fedmllm.flower.facts import Presence, write_message
from fedmllm.flower.messages import read_task
from fedmllm.flower.superlink import SuperLink
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.run import federation as module
from fedmllm.run import roll_call
from fedmllm.run.federation import Federation, federation, settings
from fedmllm.run.resident import Resident
from fedmllm.sites import keys
from fedmllm.types import ClientUpdate, Holding
from loopback import LoopbackGrid
from trained_runs import change

RESIDENT = Resident()
NAMES = ("client-00", "client-01", "client-02")
STAGE = Stage("federated", dict.fromkeys(NAMES, ()), 2, 2)


class Sites(LoopbackGrid):
    """Sites that are connected and answer with their presence."""

    def __init__(self, presences: Mapping[str, Presence]) -> None:
        app = ClientApp()

        @app.query()
        def query(message: Message, context: Context) -> Message:
            found = presences[read_task(enclosed(message.content)).facts.client]
            return Message(enclose(write_message(found)), reply_to=message)

        super().__init__(app)
        self._names = list(presences)

    def online(self, names: Sequence[str]) -> dict[str, int]:
        return {name: NAMES.index(name) + 1 for name in names if name in self._names}


def present(name: str, **changes: Any) -> Presence:
    """A site with data of its own."""
    return Presence(client=name, num_samples=7, profile={"image": 7}, rank=None, trial=False).model_copy(update=changes)


def three(**changes: Any) -> dict[str, Presence]:
    return {name: present(name, **changes) for name in NAMES}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "federation"
    keys.init(folder, "127.0.0.1:8000", NAMES)
    return folder / "server" / "server.yaml"


Over = Callable[..., AbstractContextManager[Federation]]


@pytest.fixture
def links() -> list[SuperLink]:
    return []


@pytest.fixture
def over(tiny: Experiment, server: Path, links: list[SuperLink], monkeypatch: pytest.MonkeyPatch) -> Over:
    """Opens the federation of an experiment over these sites."""
    monkeypatch.setattr(roll_call, "_POLL", 0.02)

    def opened(sites: Mapping[str, Presence], **sections: Any) -> AbstractContextManager[Federation]:
        @contextmanager
        def serving(link: SuperLink) -> Iterator[Sites]:
            links.append(link)
            yield Sites(sites)

        monkeypatch.setattr(module, "serving", serving)
        values = {"engine": {"name": "flower", "server": str(server)}, "failures": {"deadline": 5}}
        return federation(change(tiny, **(values | sections)), RESIDENT)

    return opened


def test_a_simulated_federation_is_the_experiments_split(tiny: Experiment, tmp_path: Path, vlm: Any, encoder: Any) -> None:
    here = InProcessEngine(vlm, encoder, tiny.training)
    with federation(tiny, RESIDENT) as found:
        assert found.data == spread(RESIDENT.dataset(tiny), tiny.federation, tiny.seed)
        assert (found.ranks, found.grid, found.trial) == ({}, None, False)
        with found.engine(STAGE, tmp_path, here) as engine:
            assert engine is here
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("over_sites", "asked"), [(False, ("ray",)), (True, ())])
def test_a_missing_flower_is_an_error_before_anything_else(
    over_sites: bool, asked: tuple[str, ...], tiny: Experiment, over: Over, links: list[SuperLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a simulation needs Ray."""

    def missing(*modules: str) -> None:
        raise ConfigError(f"not installed: {modules}")

    monkeypatch.setattr(module, "require_flower", missing)
    opened = over(three()) if over_sites else federation(change(tiny, engine={"name": "flower"}), RESIDENT)
    with pytest.raises(ConfigError) as caught, opened:
        pass
    assert str(caught.value) == f"not installed: {asked}"
    assert links == []


def test_a_simulations_clients_take_turns_on_its_nodes(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many nodes as clients train at once, here two for three clients, and twice as many messages as workers."""
    made: list[tuple[Any, ...]] = []

    @contextmanager
    def simulation(app: ClientApp, *arguments: Any) -> Iterator[Any]:
        made.append((LoopbackGrid(app), *arguments))
        yield made[0][0], [1, 2]

    monkeypatch.setattr(module, "simulation", simulation)
    monkeypatch.setattr(module, "require_flower", lambda *modules: None)
    experiment = change(tiny, engine={"name": "flower", "worker_cpus": 1.0, "worker_gpus": 0.5, "parallel_clients": 1})
    method = build_algorithm(experiment.algorithm)
    with RESIDENT.model(experiment) as (vlm, _):
        state = method.init(read_weights(vlm.model), frozen_weights(vlm))
        here = InProcessEngine(vlm, RESIDENT.encoder(experiment), experiment.training)
    assignment = Assignment(method.broadcast(state), method, 1e-3, 0, ClientStates(tmp_path / "unused"))
    with federation(experiment, RESIDENT) as found, found.engine(STAGE, tmp_path, here) as engine:
        assert isinstance(engine, FlowerEngine)
        assert (engine.remote, engine.ahead) == (False, 2 * (os.cpu_count() or 1))
        engine.submit(assignment, found.data.clients)
        answers = list(engine.completed())
    assert all(isinstance(answer, ClientUpdate) for answer in answers)
    ((grid, *arguments),) = made
    assert arguments == [2, 1.0, 0.5]
    assert [message.metadata.dst_node_id for message in grid.sent] == [1, 2, 1]
    facts = [read_task(enclosed(message.content)).facts for message in grid.sent]
    assert {one.about["states"] for one in facts} == {str(tmp_path / "checkpoints" / "federated-clients")}
    assert {one.about["experiment"] for one in facts} == {settings(experiment)}


def test_sites_with_data_of_their_own_are_known_by_what_they_report(over: Over, links: list[SuperLink]) -> None:
    """One withholds its samples, and one is not there yet. Both are clients, because they may answer later."""
    sites = {"client-00": present("client-00"), "client-02": present("client-02", num_samples=None, profile={})}
    with over(sites, failures={"deadline": 0.1}) as found:
        assert found.data.clients == dict.fromkeys(NAMES, ())
        assert found.data.reported == {"client-00": Holding(7, {"image": 7}), "client-02": Holding(None, {})}
        assert not found.trial
        assert found.grid is not None
    # The server does not retry the SuperLink longer than a round may take.
    assert [link.patience for link in links] == [0.1]


def test_the_links_own_patience_stays_below_a_long_deadline(over: Over, links: list[SuperLink]) -> None:
    with over(three(), failures={"deadline": 1e6}):
        assert [link.patience for link in links] == [SuperLink.patience]


def test_in_a_trial_the_sites_share_the_experiments_split(over: Over, tiny: Experiment) -> None:
    """Settings that need the clients' samples are then possible."""
    with over(three(trial=True), evaluation={"baselines": ["local", "centralized"], "client_samples": 5}) as found:
        assert found.trial
        assert found.data.clients == spread(RESIDENT.dataset(tiny), tiny.federation, tiny.seed).clients


def test_a_trial_of_some_sites_only_is_an_error(over: Over) -> None:
    sites = three() | {"client-01": present("client-01", trial=True)}
    with (
        pytest.raises(FederationError, match="only some sites have data of their own: client-00, client-02; set data in every site"),
        over(sites),
    ):
        pass


def test_too_few_sites_for_a_round_are_an_error(over: Over) -> None:
    with (
        pytest.raises(FederationError, match="1 sites are ready, 2 are needed"),
        over({"client-00": present("client-00")}, failures={"deadline": 0.1, "min_updates": 2}),
    ):
        pass


def test_sites_may_set_ranks_up_to_the_experiments(over: Over) -> None:
    sites = three() | {"client-01": present("client-01", rank=8)}
    with over(sites, algorithm={"name": "flexlora"}) as found:
        assert found.ranks == {"client-01": 8}
    with (
        pytest.raises(ConfigError, match="fedavg needs the same rank at all clients, but these sites set their own: client-01"),
        over(sites),
    ):
        pass
    larger = sites | {"client-02": present("client-02", rank=9)}
    with (
        pytest.raises(ConfigError, match=r"lora\.r: 8 is the largest possible rank, but sites set larger ones: \{'client-02': 9\}"),
        over(larger, algorithm={"name": "flexlora"}),
    ):
        pass


PRIOR = {"name": "fedavg", "strategies": [{"name": "label_calibration", "parameters": {"global_prior": True}}]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"federation": {"num_clients": 4}}, r"federation\.num_clients: 4, but .*server\.yaml names 3 sites; make the numbers equal"),
        ({"failures": {"deadline": None}}, r"failures\.deadline: null, but a run with sites needs a limit in seconds"),
        (
            {"algorithm": {"name": "ditto"}, "evaluation": {"client_samples": 5}},
            "personalized models of ditto stay at the sites, so evaluation.client_samples and the baseline fine_tuned cannot use them",
        ),
        ({"algorithm": {"name": "ditto"}, "evaluation": {"baselines": ["fine_tuned"]}}, "personalized models of ditto stay at the sites"),
    ],
)
def test_settings_that_do_not_fit_the_sites_are_refused_before_they_are_asked(
    sections: dict[str, Any], message: str, over: Over, links: list[SuperLink]
) -> None:
    with pytest.raises(ConfigError, match=message), over(three(trial=True), **sections):
        pass
    assert links == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": PRIOR}, "needs the label counts of all clients, which sites do not report; omit global_prior"),
        (
            {"evaluation": {"baselines": ["zero_shot", "local", "centralized"]}},
            r"evaluation\.baselines: local, centralized need the sites' samples, which stay at the sites; keep only zero_shot",
        ),
        ({"evaluation": {"client_samples": 5}}, r"evaluation\.client_samples: needs the sites' samples, which stay at the sites; omit it"),
    ],
)
def test_settings_that_need_samples_are_refused_if_these_stay_at_the_sites(sections: dict[str, Any], message: str, over: Over) -> None:
    with pytest.raises(ConfigError, match=message), over(three(), **sections):
        pass
    with over(three(), evaluation={"baselines": ["zero_shot"]}) as found:
        assert set(found.data.reported) == set(NAMES)


def test_a_resumed_run_keeps_its_id_and_every_run_has_its_own(over: Over, tmp_path: Path, vlm: Any, encoder: Any, tiny: Experiment) -> None:
    """Sites keep their states by this id."""
    here, ids = InProcessEngine(vlm, encoder, tiny.training), []
    with over(three()) as found:
        for folder in ("first", "first", "second"):
            with found.engine(STAGE, tmp_path / folder, here) as engine:
                assert isinstance(engine, FlowerEngine)
                assert engine.remote
                assert (engine.about["trial"], engine.about["experiment"]) == (False, settings(found.experiment))
                ids.append(engine.about["run"])
    assert ids[0] == ids[1] != ids[2]


OWN = {
    "dataset": "jsonl",
    "root": "/srv/wards",
    "options": {"columns": {"text": "t", "answer": "a"}, "question": "?", "choices": ["x", "y"]},
}


def test_the_server_sends_none_of_its_paths_to_sites(tiny: Experiment) -> None:
    """Nor does it say what a site imports. A worker of a simulation is on this machine and needs both."""
    experiment = change(tiny, data=OWN | {"num_train": None, "num_test": None}).model_copy(update={"plugins": ("/srv/mine.py",)})
    simulated = settings(experiment)
    assert "/srv/wards" in simulated
    assert "/srv/mine.py" in simulated
    engine = experiment.engine.model_copy(update={"name": "flower", "server": Path("/srv/federation/server.yaml")})
    sent = settings(experiment.model_copy(update={"engine": engine}))
    assert "/srv" not in sent
    assert Experiment.from_yaml(settings(tiny)) == tiny
