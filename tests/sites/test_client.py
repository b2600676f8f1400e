"""How a site's worker handles the server's settings, and what leaves the site."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from fedmllm.algorithms import AlgorithmConfig, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.data.prompts import Wording
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.in_process import Assignment
from fedmllm.errors import RunError
from fedmllm.flower.facts import Presence, read_message
from fedmllm.flower.frozen import Missing
from fedmllm.flower.messages import expected, read_answer, write_question, write_task
from fedmllm.flower.settings import SiteConfig
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.run.federation import settings
from fedmllm.run.resident import Resident
from fedmllm.sites.client import SiteWorker
from fedmllm.sites.supernode import Inbox
from fedmllm.types import ClientFailure, ClientUpdate

RESIDENT = Resident()
OWN = {"dataset": "digits-claims", "num_train": 12, "num_test": 4, "check_images": False}


@pytest.fixture
def experiment(embedded: Experiment) -> Experiment:
    return embedded


def worker(folder: Path, **values: Any) -> SiteWorker:
    found = SiteWorker(SiteConfig.model_validate({"name": "client-00", "server": "host:1", "device": "cpu", "folder": folder, **values}))
    found.resident = RESIDENT
    return found


def presence(site: SiteWorker, experiment: Experiment, name: str = "client-00") -> Presence | ClientFailure:
    reply = read_message(site.present(write_question(name, {"experiment": settings(experiment), "run": "r"})), name, Presence)
    site.close()
    return reply


def answer(site: SiteWorker, experiment: Experiment, run: str = "r", trial: bool = False) -> ClientUpdate | ClientFailure:
    with RESIDENT.model(experiment) as (vlm, _):
        method = build_algorithm(experiment.algorithm)
        state = method.init(read_weights(vlm.model), frozen_weights(vlm))
        assignment = Assignment(method.broadcast(state), method, 1e-3, 0, ClientStates(Path("unused")))
    content = write_task(assignment, "federated", "client-00", {"experiment": settings(experiment), "run": run, "trial": trial}, Missing())
    found = read_answer(site.answer(content), "client-00", expected(assignment, "client-00"))
    site.close()
    return found


def sent(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sent.jsonl").read_text().splitlines()]


def test_a_site_trains_on_its_own_data_with_its_own_modalities(experiment: Experiment, tmp_path: Path) -> None:
    reply = presence(worker(tmp_path, data=OWN, modalities=["image"]), experiment)
    assert reply == Presence(client="client-00", num_samples=12, profile={"image": 12}, rank=None, trial=False)


def test_a_site_without_data_trains_its_share_of_the_embedded_split(experiment: Experiment, tmp_path: Path) -> None:
    reply = presence(worker(tmp_path), experiment)
    assert isinstance(reply, Presence)
    assert reply.trial
    data = federate(experiment.data, experiment.federation, experiment.seed)
    assert reply.num_samples == len(data.clients["client-00"])


def test_each_run_reads_the_sites_current_data(experiment: Experiment, tmp_path: Path) -> None:
    """The server repeats its experiment with the same settings. The second run reads the rows added in between."""
    row, file = {"t": "words", "a": "x"}, tmp_path / "train.jsonl"
    columns = {"text": "t", "answer": "a"}
    options = {"train": "train.jsonl", "test_share": 0.25, "columns": columns, "question": "Which?", "choices": ["x", "y"]}
    site = worker(tmp_path, data={"dataset": "jsonl", "root": ".", "options": options})
    question, counts = write_question("client-00", {"experiment": settings(experiment), "run": "r"}), []
    for number in (8, 12):
        file.write_text(f"{json.dumps(row)}\n" * number)
        counts.append(read_message(site.present(question), "client-00", Presence).num_samples)
    site.close()
    assert counts == [6, 9]


def test_a_site_with_another_base_model_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    """The shapes are equal, so its updates would be averaged with the others."""
    reply = presence(worker(tmp_path, data=OWN), experiment.with_fingerprint("0" * 16))
    assert isinstance(reply, ClientFailure)
    assert "'nano' does not match model.fingerprint" in reply.reason


def test_everything_that_leaves_the_site_is_logged(experiment: Experiment, tmp_path: Path) -> None:
    site = worker(tmp_path, data=OWN)
    presence(site, experiment)
    found = answer(site, experiment)
    assert isinstance(found, ClientUpdate)
    first, second = sent(tmp_path)
    assert (first["kind"], first["num_samples"], first["profile"]) == ("presence", 12, {"image+text": 12})
    assert (second["run"], second["stage"], second["round"], second["bytes"]) == ("r", "federated", 1, found.num_bytes)
    assert sorted(second["tensors"]) == sorted(f"update/{name}" for name in found.update)
    assert second["metrics"] == found.metrics
    assert second["profile"] == dict(found.profile)


def test_withheld_facts_do_not_leave_the_site(experiment: Experiment, tmp_path: Path) -> None:
    site = worker(tmp_path, data=OWN, withhold=["metrics", "profile", "num_samples"])
    reply = presence(site, experiment)
    assert reply == Presence(client="client-00", num_samples=None, profile={}, rank=None, trial=False)
    found = answer(site, experiment)
    assert isinstance(found, ClientUpdate)
    assert (found.num_samples, found.metrics, found.profile) == (None, {}, {})
    assert [row["num_samples"] for row in sent(tmp_path)] == [None, None]


def with_method(experiment: Experiment, **algorithm: Any) -> Experiment:
    return experiment.model_copy(update={"algorithm": AlgorithmConfig.model_validate(algorithm)})


@pytest.mark.parametrize(("name", "every", "trained"), [("fedavg", 1, 200), ("ditto", 0, 200), ("ditto", 1, 180)])
def test_a_site_holds_rows_out_only_if_it_scores_a_model(
    name: str, every: int, trained: int, experiment: Experiment, tmp_path: Path
) -> None:
    for split, count in (("train", 200), ("test", 20)):
        rows = [json.dumps({"t": f"{split} {i}", "a": "xy"[i % 2]}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    columns = {"text": "t", "answer": "a"}
    options = {"train": "train.jsonl", "test": "test.jsonl", "columns": columns, "question": "Which?", "choices": ["x", "y"]}
    asked = with_method(experiment, name=name)
    asked = asked.model_copy(update={"evaluation": asked.evaluation.model_copy(update={"every": every})})
    reply = presence(worker(tmp_path, data={"dataset": "jsonl", "root": ".", "options": options}), asked)
    assert isinstance(reply, Presence)
    assert reply.num_samples == trained


def test_withheld_steps_follow_from_the_number_of_samples(experiment: Experiment, tmp_path: Path) -> None:
    """The metrics are withheld. The server weights the update by the number of steps that 12 samples take."""
    nova, training = with_method(experiment, name="fednova"), experiment.training
    site = worker(tmp_path, data=OWN, withhold=["metrics", "profile"])
    assert isinstance(presence(site, nova), Presence)
    found, open_ = answer(site, nova), answer(worker(tmp_path, data=OWN), nova)
    assert isinstance(found, ClientUpdate)
    assert isinstance(open_, ClientUpdate)
    steps = training.local_epochs * math.ceil(12 / (training.batch_size * training.accumulation))
    assert found.metrics == {"steps": steps} == {"steps": open_.metrics["steps"]}
    assert steps > 1


@pytest.mark.parametrize(
    ("algorithm", "withheld", "reason"),
    [
        (
            {"name": "fednova"},
            ["metrics", "num_samples"],
            "(fednova) needs the number of training steps, but this site withholds both metrics and",
        ),
        ({"strategies": ["modality_coverage"]}, ["profile"], "(fedavg, modality_coverage) needs the number of samples by modality"),
        (
            {"strategies": [{"name": "adaptive_regularization", "parameters": {"adaptivity": 2.0}}]},
            ["profile"],
            "(fedavg, adaptive_regularization) needs the number of samples by modality",
        ),
    ],
)
def test_a_method_that_needs_withheld_facts_is_refused_before_the_first_round(
    experiment: Experiment, tmp_path: Path, algorithm: dict[str, Any], withheld: list[str], reason: str
) -> None:
    asked = with_method(experiment, **algorithm)
    site = worker(tmp_path, data=OWN, withhold=withheld)
    for reply in (presence(site, asked), answer(site, asked)):
        assert isinstance(reply, ClientFailure)
        assert reply.reason.startswith("ConfigError: withhold: the method " + reason)
    assert isinstance(presence(site, experiment), Presence)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"name": "/etc"}}, "ConfigError: the experiment trains '/etc'; set model in site.yaml to its folder at this site"),
        (
            {"data": {"dataset": "jsonl", "root": "/etc", "options": {"columns": {"question": "q", "answer": "a", "text": "t"}}}},
            "only trial runs on embedded data",
        ),
    ],
)
def test_the_servers_settings_cannot_name_a_path_at_the_site(
    experiment: Experiment, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    reply = presence(worker(tmp_path), Experiment.parse(experiment.model_dump(mode="json", exclude_none=True) | changes))
    assert isinstance(reply, ClientFailure)
    assert reason in reply.reason


def test_the_server_cannot_enable_remote_code_at_the_site(experiment: Experiment, tmp_path: Path) -> None:
    asked = experiment.model_copy(update={"model": experiment.model.model_copy(update={"trust_remote_code": True, "revision": "main"})})
    here = worker(tmp_path, model="/models/qwen").experiment(settings(asked))
    assert (here.model.name, here.model.trust_remote_code, here.model.revision) == ("/models/qwen", False, None)
    assert here.engine.device == "cpu"


def test_sites_use_the_servers_wording(experiment: Experiment, tmp_path: Path) -> None:
    """The server sends its wordings. The site's own wordings are not used."""
    own, other = (Wording(templates={"any": f"{word} {{text}} {{question}} {{options}}"}) for word in ("Server.", "Site."))
    data = experiment.data.model_copy(update={"prompt": "mine", "wordings": {"mine": own}})
    site = OWN | {"prompt": "mine", "wordings": {"mine": other.model_dump()}}
    here = worker(tmp_path, data=site).experiment(settings(experiment.model_copy(update={"data": data})))
    assert here.data.wording == own
    assert here.data.num_train == 12


def test_a_run_name_cannot_leave_the_sites_folder(experiment: Experiment, tmp_path: Path) -> None:
    found = answer(worker(tmp_path, data=OWN), experiment, run="../../elsewhere")
    assert isinstance(found, ClientFailure)
    assert "not a valid name" in found.reason


@pytest.mark.parametrize(
    ("own", "trial", "reason"),
    [
        (
            {"data": OWN, "rank": 4},
            False,
            "ConfigError: rank: this site trains at rank 4, the task has rank None; the server did not know that",
        ),
        ({"data": OWN}, True, "ConfigError: data: this site has data of its own, the server did not know that when the run started"),
        ({}, False, "ConfigError: data: this site has no data of its own, the server did not know that when the run started"),
    ],
)
def test_a_late_site_refuses_a_task_that_does_not_match_its_settings(
    experiment: Experiment, tmp_path: Path, own: dict[str, Any], trial: bool, reason: str
) -> None:
    found = answer(worker(tmp_path, **own), experiment, trial=trial)
    assert isinstance(found, ClientFailure)
    assert found.reason.startswith(reason)


def test_messages_of_foreign_errors_stay_at_the_site(experiment: Experiment, tmp_path: Path) -> None:
    class Broken(SiteWorker):
        def clients(self, experiment: Experiment) -> Any:
            raise OSError("/wards/7/patient-123.png is damaged")

    site = Broken(SiteConfig.model_validate({"name": "client-00", "server": "host:1", "folder": tmp_path}))
    reply = presence(site, experiment)
    assert reply == ClientFailure("client-00", "OSError; see the site's log")


def test_a_site_does_not_train_another_client(experiment: Experiment, tmp_path: Path) -> None:
    reply = presence(worker(tmp_path, data=OWN), experiment, "client-01")
    assert isinstance(reply, ClientFailure)
    assert reply.reason == "LookupError; see the site's log"


def test_a_port_used_by_another_process_is_named(tmp_path: Path) -> None:
    """Flower's interface on that port rejects the secret."""

    class Other:
        def AcquireTask(self, request: object) -> None:
            answer = httpx.Response(401, request=httpx.Request("POST", "http://127.0.0.1:9094/"))
            raise httpx.HTTPStatusError("no", request=answer.request, response=answer)

    site = SiteConfig.model_validate({"name": "client-00", "server": "host:1", "folder": tmp_path})
    with pytest.raises(
        RunError, match=r"port 9094 of this machine is not this site's SuperNode \(status 401\); stop it, or set another port in site\.yaml"
    ):
        Inbox(site, Other()).next()


LIMITS = {"target_epsilon": 50.0, "noise_multiplier": 1.0, "clip_norm": 0.5}


def spent(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()]


def with_privacy(experiment: Experiment, **values: Any) -> Experiment:
    return Experiment.parse({**experiment.model_dump(mode="json"), "privacy": values})


def test_a_site_with_limits_adds_noise_in_runs_that_ask_for_none(experiment: Experiment, tmp_path: Path) -> None:
    """It trains privately and withholds metrics and profile, and its ledger was written."""
    reply = answer(worker(tmp_path, data=OWN, privacy=LIMITS), experiment)
    assert isinstance(reply, ClientUpdate)
    assert (reply.metrics, reply.profile) == ({}, {})
    assert [(line["client"], line["noise_multiplier"]) for line in spent(tmp_path)] == [("client-00", 1.0)]
    again = answer(worker(tmp_path, data=OWN, privacy=LIMITS), experiment)
    assert isinstance(again, ClientUpdate)
    assert any(not again.update[name].equal(tensor) for name, tensor in reply.update.items())  # fresh noise
    reported = presence(worker(tmp_path, data=OWN, privacy=LIMITS), experiment)
    assert isinstance(reported, Presence)
    assert reported.profile == {}


@pytest.mark.parametrize(("asked", "used"), [(0.5, 1.0), (3.0, 3.0)])
def test_a_server_can_ask_a_site_for_more_noise_but_not_for_less(asked: float, used: float, experiment: Experiment, tmp_path: Path) -> None:
    requested = with_privacy(experiment, unit="sample", noise_multiplier=asked, clip_norm=9.0, noise_seed=1)
    for _ in range(2):
        assert isinstance(answer(worker(tmp_path, data=OWN, privacy=LIMITS), requested), ClientUpdate)
    assert {line["noise_multiplier"] for line in spent(tmp_path)} == {used}


def test_a_server_cannot_choose_the_noise_of_a_site(experiment: Experiment, tmp_path: Path) -> None:
    """A noise seed is for tests of a simulation. With it the server could subtract the noise."""
    requested = with_privacy(experiment, unit="sample", noise_multiplier=1.0, noise_seed=1)
    first, second = (answer(worker(tmp_path, data=OWN), requested) for _ in range(2))
    assert isinstance(first, ClientUpdate)
    assert isinstance(second, ClientUpdate)
    assert any(not first.update[name].equal(tensor) for name, tensor in second.update.items())


def test_a_task_over_the_budget_of_a_site_is_refused_in_every_run(experiment: Experiment, tmp_path: Path) -> None:
    limits = {**LIMITS, "target_epsilon": 7.0}
    replies = [answer(worker(tmp_path, data=OWN, privacy=limits), experiment, run=f"r{number}") for number in range(6)]
    accepted = sum(isinstance(reply, ClientUpdate) for reply in replies)
    assert 0 < accepted < 6
    refused = replies[-1]
    assert isinstance(refused, ClientFailure)
    assert "RunError" in refused.reason
    assert len(spent(tmp_path)) == accepted
