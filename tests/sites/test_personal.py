"""Personalized methods over sites: each site keeps and scores its own model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmllm import api as run
from fedmllm.config import Experiment
from fedmllm.engine.checkpoint import ClientStates, RunStore
from fedmllm.errors import FederationError
from fedmllm.flower.carrier import enclosed
from fedmllm.flower.settings import SiteConfig
from fedmllm.packing import unpack
from fedmllm.run import federation
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.worker import client_app
from fedmllm.sites import keys
from fedmllm.sites.client import SiteWorker
from loopback import LoopbackGrid, Tamper

RESIDENT = Resident()
NAMES = ("client-00", "client-01", "client-02")
SETTINGS: dict[str, Any] = {
    "data": {"dataset": "digits-claims", "num_train": 45, "num_test": 10, "check_images": False},
    "federation": {"num_clients": 3, "clients_per_round": 2, "num_rounds": 2, "scenario": "missing-0.3", "min_partition_size": 3},
    "training": {"batch_size": 4, "learning_rate": 6e-3},
    "evaluation": {"every": 1, "baselines": [], "tested": ["image"]},
    "failures": {"deadline": 60},
    "engine": {"device": "cpu", "parallel_clients": 1},
}
OWN = {"data": {"dataset": "digits-claims", "num_train": 12, "num_test": 6, "check_images": False}}


class Sites(LoopbackGrid):
    """One worker for each site, all in this process."""

    def __init__(self, workers: Mapping[str, SiteWorker], tamper: Tamper) -> None:
        self._names = list(workers)
        app, apps = ClientApp(), {i: client_app(lambda worker=worker: worker) for i, worker in enumerate(workers.values())}  # type: ignore[misc]

        def passed(message: Message, context: Context) -> Message:
            return apps[context.node_id](message, context)

        app.train()(passed), app.query()(passed), app.evaluate()(passed)
        super().__init__(app, tamper)

    def online(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._names.index(name) for name in names}


@pytest.fixture
def over_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def trained(folder: Path, own: Mapping[str, Mapping[str, Any]], tamper: Tamper = lambda reply: reply, **sections: Any) -> RunResult:
        if not (tmp_path / "federation").exists():
            keys.init(tmp_path / "federation", "127.0.0.1:8000", NAMES)
        workers = {}
        for name in NAMES:
            values = {"name": name, "server": "127.0.0.1:8000", "device": "cpu", **own.get(name, {})}
            workers[name] = SiteWorker(SiteConfig.model_validate({**values, "folder": tmp_path / "federation" / "sites" / name}))

        @contextmanager
        def serving(link: object) -> Iterator[Sites]:
            yield Sites(workers, tamper)

        monkeypatch.setattr(federation, "serving", serving)
        engine = SETTINGS["engine"] | {"name": "flower", "server": str(tmp_path / "federation" / "server" / "server.yaml")}
        try:
            return run.train(Experiment.parse(SETTINGS | {"engine": engine} | sections), folder, resident=RESIDENT, report=False)
        finally:
            for worker in workers.values():
                worker.close()

    return trained


def scored(folder: Path) -> list[Any]:
    return [(record["scores"], record["validation"]) for record in RunStore(folder).records("federated")]


@pytest.mark.parametrize("name", [pytest.param("ditto", marks=pytest.mark.slow), "fedsa_lora"])
def test_personalized_models_stay_at_their_sites_and_score_as_in_one_process(name: str, over_sites: Any, tmp_path: Path) -> None:
    here = run.train(Experiment.parse(SETTINGS | {"algorithm": {"name": name}}), tmp_path / "here", resident=RESIDENT, report=False)
    there = over_sites(tmp_path / "there", {}, algorithm={"name": name})
    assert (there.scores, there.tested, there.standard_errors) == (here.scores, here.tested, here.standard_errors)
    assert scored(tmp_path / "there") == scored(tmp_path / "here")
    assert not (tmp_path / "there" / "adapters").exists()
    for client in NAMES:
        (kept,) = (tmp_path / "federation" / "sites" / client / "adapters").iterdir()
        ours = load_file(tmp_path / "here" / "adapters" / client / "adapter_model.safetensors")
        theirs = load_file(kept / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize("name", [pytest.param("ditto", marks=pytest.mark.slow), "fedsa_lora"])
def test_a_site_whose_answer_is_lost_keeps_its_previous_model(name: str, over_sites: Any, tmp_path: Path) -> None:
    """All sites train in the last of two rounds, and one answer is lost. That site keeps the model of the first round."""
    every = {"algorithm": {"name": name}, "federation": SETTINGS["federation"] | {"clients_per_round": 3}}

    def lose(reply: Message) -> Message | None:
        facts = unpack(enclosed(reply.content))[1]
        return None if (facts["client"], facts.get("round_num")) == ("client-01", 1) and "num_samples" in facts else reply

    over_sites(tmp_path / "there", {}, lose, **every, failures={"deadline": 0.5})
    (record,) = [r for r in RunStore(tmp_path / "there").records("federated") if r["refused"]]
    assert (record["round"], [row["client"] for row in record["refused"]]) == (2, ["client-01"])
    kept = {client: ClientStates(next((tmp_path / "federation" / "sites" / client / "state").iterdir()) / "federated") for client in NAMES}
    kind = {"ditto": "personal", "fedsa_lora": "own"}[name]
    for client, states in kept.items():
        (folder,) = (tmp_path / "federation" / "sites" / client / "adapters").iterdir()
        model = load_file(folder / "adapter_model.safetensors")
        for i in (0, 1):
            own = states.load(client, [i])[kind]
            equal = all(torch.equal(model[key], tensor) for key, tensor in own.items())
            assert equal == (i == (0 if client == "client-01" else 1))


def test_a_site_scores_its_model_on_its_own_test_data_and_logs_the_scores(over_sites: Any, tmp_path: Path) -> None:
    own = dict.fromkeys(NAMES, OWN) | {"client-01": OWN | {"withhold": ["metrics"]}}
    result = over_sites(
        tmp_path / "there", own, algorithm={"name": "fedsa_lora"}, federation=SETTINGS["federation"] | {"clients_per_round": 3}
    )
    lines = {name: (tmp_path / "federation" / "sites" / name / "sent.jsonl").read_text().splitlines() for name in NAMES}
    facts = {name: [row for row in map(json.loads, rows) if row["kind"] == "scores"] for name, rows in lines.items()}
    assert [(row["round"], row["tested"]) for row in facts["client-00"]] == [
        (1, "validation"),
        (2, "validation"),
        (2, ""),
        (2, "image"),
    ]
    assert facts["client-01"] == []
    scores = [facts[name][2]["metrics"] for name in ("client-00", "client-02")]
    assert result.scores["federated"] == pytest.approx(sum(row["score"] for row in scores) / 2)
    assert result.details["federated"]["num_samples"] == sum(row["num_samples"] for row in scores) == 12
    assert (tmp_path / "federation" / "sites" / "client-01" / "adapters").exists()


def test_a_run_without_any_sites_score_is_an_error(over_sites: Any, tmp_path: Path) -> None:
    own = {name: OWN | {"withhold": ["metrics"]} for name in NAMES}
    with pytest.raises(
        FederationError,
        match=r"after round 1 no client returned a score for its personalized model:\n  - client-00: the site withholds its scores",
    ):
        over_sites(tmp_path / "there", own, algorithm={"name": "ditto"})


def test_a_run_without_any_sites_validation_part_is_an_error(over_sites: Any, tmp_path: Path) -> None:
    rows = [{"text": f"case {i}", "answer": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "train": "rows.jsonl",
        "columns": {"text": "text", "answer": "answer"},
        "question": "Which?",
        "choices": ["a", "b"],
        "metric": "auc",
        "test_share": 0.5,
    }
    own = {name: {"data": {"dataset": "jsonl", "root": str(tmp_path), "options": options}} for name in NAMES}
    with pytest.raises(FederationError, match=r"client-00: ConfigError; see the site's log|the data have no validation split"):
        over_sites(tmp_path / "there", own, algorithm={"name": "ditto"})


@pytest.mark.slow
def test_scores_of_another_metric_are_not_averaged(over_sites: Any, tmp_path: Path) -> None:
    triage = {"data": OWN["data"] | {"dataset": "digits-triage"}}
    result = over_sites(tmp_path / "there", {NAMES[0]: triage, NAMES[1]: OWN, NAMES[2]: OWN}, algorithm={"name": "ditto"})
    assert result.details["federated"]["num_samples"] == 12
    reasons = r"client-00: the client scored macro_f1, the experiment's metric is auc"
    with pytest.raises(FederationError, match=reasons):
        over_sites(tmp_path / "none", dict.fromkeys(NAMES, triage), algorithm={"name": "ditto"})
