"""Secure aggregation over sites: what each site checks, what leaves it, and what a server cannot do."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Message

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.engine.base import SecureStage
from fedmllm.engine.secure import FACTS
from fedmllm.errors import ConfigError, FederationError
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.facts import Presence, read_message
from fedmllm.flower.messages import write_question
from fedmllm.flower.sessions import StageFacts, read_down, read_stage, read_up, write_stage
from fedmllm.packing import pack, unpack
from fedmllm.privacy.secagg.messages import STAGES, Opening, RoundId, largest
from fedmllm.reports.run_report import write_report
from fedmllm.run.federation import settings
from fedmllm.run.reader import read_run
from fedmllm.sites import keys
from fedmllm.sites.commands import site_app
from fedmllm.types import ClientFailure
from secure_sites import RESIDENT, Sites, SitesGrid, connected


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["stage"] == "federated"]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def simulated(experiment: Experiment) -> Experiment:
    engine = experiment.engine.model_copy(update={"name": "in_process", "server": None})
    return experiment.model_copy(update={"engine": engine})


def sent(sites: Sites, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (sites.file(name).parent / "sent.jsonl").read_text().splitlines()]


def test_sites_end_as_the_simulation_and_send_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: sums of integers have no order."""
    sites = Sites(tmp_path / "federation", 4)
    experiment = sites.experiment()
    with connected(monkeypatch, sites):
        result = train(experiment, tmp_path / "there", resident=RESIDENT)
    train(simulated(experiment), tmp_path / "here", resident=RESIDENT, report=False)
    here, there = adapter(tmp_path / "here"), adapter(tmp_path / "there")
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())
    assert [(record["skipped"], record["refused"]) for record in records(tmp_path / "there")] == [(False, [])] * 2
    _, *messages = sent(sites, "client-00")
    answer, *steps = messages[:6]
    assert (answer["kind"], answer["held"], answer["tensors"], answer["bytes"]) == ("answer", True, [], 0)
    assert [(row["kind"], row["round"], row["step"]) for row in steps] == [("session", 1, step) for step in STAGES]
    assert len(messages) == 12
    _states_what_the_server_saw(result, tmp_path / "there")


def _states_what_the_server_saw(result: Any, folder: Path) -> None:
    said = "the server saw updates only in sums over at least 3 clients (2 rounds, 0 skipped)"
    assert result.secure.summary == said
    assert "simulation" not in result.secure.limits
    assert json.loads((folder / "result.json").read_text())["secure"]["sums"] == 2
    assert read_run(folder).result == result
    card = (folder / "adapter" / "README.md").read_text()
    assert said in card
    assert "This run used no differential privacy." in card
    assert said in write_report(folder).read_text()


def losing(name: str, step: str) -> Any:
    return lambda facts, message: None if (facts.client, facts.step) == (name, step) else message


def test_four_sites_tolerate_one_that_leaves_and_three_tolerate_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (4, 3):
        sites = Sites(tmp_path / f"federation-{count}", count)
        with connected(monkeypatch, sites, losing("client-01", "masked")):
            train(sites.experiment(1), tmp_path / f"run-{count}", resident=RESIDENT, report=False)
    (four,), (three,) = records(tmp_path / "run-4"), records(tmp_path / "run-3")
    reason = "left secure aggregation in stage masked: no answer within the deadline of 0.5 s"
    assert four["refused"] == three["refused"] == [{"client": "client-01", "reason": reason}]
    assert (four["skipped"], four[FACTS]["clients"]) == (False, 3)
    assert three["skipped"]
    assert "needs at least 3 clients after stage masked, but 2 are left; the round is skipped" in three[FACTS]["failed"]


def test_a_site_that_restarts_after_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Sites(tmp_path / "federation", 4)
    grids: list[SitesGrid] = []

    def restart(facts: StageFacts, message: Message) -> Message:
        if (facts.client, facts.step) == ("client-01", "keys"):
            grids[0].workers["client-01"] = sites.worker("client-01")
        return message

    with connected(monkeypatch, sites, restart) as grid:
        grids.append(grid)
        train(sites.experiment(1), tmp_path / "run", resident=RESIDENT, report=False)
    (record,) = records(tmp_path / "run")
    assert [row["client"] for row in record["refused"]] == ["client-01"]
    assert "client-01 holds no update: it restarted after it had trained" in record["refused"][0]["reason"]
    assert not record["skipped"]


def test_a_site_never_masks_twice_for_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a server that forgets the round, and sites that restart, get no second vector."""
    sites, run = Sites(tmp_path / "federation", 3), tmp_path / "run"
    for resume in (False, True):
        with connected(monkeypatch, sites):
            train(sites.experiment(1), run, resume=resume, resident=RESIDENT, report=False)
        for name in ("federated.safetensors", "masked.jsonl"):
            (run / "checkpoints" / name).unlink(missing_ok=True)
        (run / "result.json").unlink()
    (record,) = records(run)
    assert record["skipped"]
    assert all("a client masks one vector for each round, and did so for round 0" in row["reason"] for row in record["refused"])
    assert len((sites.folder / "sites" / "client-00" / "masked.jsonl").read_text().splitlines()) == 1


def with_roster(roster: str) -> Any:
    """Replace the list of sites on its way."""

    def change(facts: StageFacts, message: Message) -> Message:
        if facts.step == "keys":
            groups, values = unpack(enclosed(message.content))
            message.content = enclose(pack(groups, {**values, "roster": roster}))
        return message

    return change


def test_a_server_cannot_invent_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that the server signed with an authority of its own, and a list without a signature."""
    sites = Sites(tmp_path / "federation", 3)
    forged = Sites(tmp_path / "forged", 3).server.roster()[0]
    for number, roster in enumerate((forged, "{}")):
        with connected(monkeypatch, sites, with_roster(roster)):
            train(sites.experiment(1), tmp_path / f"run-{number}", resident=RESIDENT, report=False)
    (first,), (second,) = records(tmp_path / "run-0"), records(tmp_path / "run-1")
    assert all("not signed by the authority whose ca.crt this site holds" in row["reason"] for row in first["refused"])
    assert all("not a signed list of sites" in row["reason"] for row in second["refused"])
    assert len(first["refused"]) == len(second["refused"]) == 3
    assert not (sites.folder / "sites" / "client-00" / "masked.jsonl").exists()
    assert [row["failure"][:16] for row in sent(sites, "client-00") if row["kind"] == "session"] == ["FederationError:"] * 2


def presence(sites: Sites, name: str, experiment: Experiment) -> Presence | ClientFailure:
    worker = sites.worker(name)
    found = read_message(worker.present(write_question(name, {"experiment": settings(experiment), "run": "r"})), name, Presence)
    worker.close()
    return found


def test_a_site_that_requires_secure_aggregation_refuses_a_plain_run(tmp_path: Path) -> None:
    sites = Sites(tmp_path / "federation", 3, {"client-01": {"secure_aggregation": True, "min_clients": 3}})
    plain = sites.experiment(privacy={})
    found = presence(sites, "client-01", plain)
    assert isinstance(found, ClientFailure)
    assert "secure_aggregation: this site does not show its updates to the server; set privacy.secure_aggregation=true" in found.reason
    assert isinstance(presence(sites, "client-00", plain), Presence)
    assert isinstance(presence(sites, "client-01", sites.experiment()), Presence)


def test_a_site_refuses_sums_smaller_than_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Sites(tmp_path / "federation", 3, {"client-01": {"min_clients": 4}, "client-02": {"min_clients": 3}})
    found = presence(sites, "client-01", sites.experiment())
    assert isinstance(found, ClientFailure)
    assert "min_clients: this site takes part in sums of at least 4 clients, but a round has 3" in found.reason
    # The experiment asks for two only. After one has left, this site does not take part.
    two = Sites(tmp_path / "two", 3, {"client-02": {"min_clients": 3}})
    with connected(monkeypatch, two, losing("client-00", "keys")):
        train(two.experiment(1, privacy={"secure_aggregation": True, "min_clients": 2}), tmp_path / "run", resident=RESIDENT, report=False)
    (record,) = records(tmp_path / "run")
    assert record["skipped"]
    (reason,) = (row["reason"] for row in record["refused"] if row["client"] == "client-02")
    assert "a session needs at least 3 clients (min_clients 3" in reason


def test_a_rank_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Sites(tmp_path / "federation", 3, {"client-01": {"rank": 4}})
    with connected(monkeypatch, sites), pytest.raises(ConfigError, match=r"different ranks cannot be added.*client-01"):
        train(sites.experiment(1), tmp_path / "run", resident=RESIDENT)


def test_a_site_that_adds_noise_reports_nothing_about_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server finds the noise multiplier for the budget; sites get it, because the scale of the sum depends on it."""
    sites = Sites(tmp_path / "federation", 3)
    privacy = {"secure_aggregation": True, "unit": "client", "noise": "clients", "target_epsilon": 8.0}
    experiment = sites.experiment(2, privacy=privacy, algorithm={"name": "ffa_lora"}, lora={"r": 2})
    with connected(monkeypatch, sites):
        result = train(experiment, tmp_path / "run", resident=RESIDENT, report=False)
    assert [record["skipped"] for record in records(tmp_path / "run")] == [False, False]
    assert result.privacy is not None
    assert result.privacy.epsilon <= 8
    assert result.secure is not None
    assert "epsilon also holds against the server if none of the clients in a sum collude with it" in result.secure.limits
    assert all((row["num_samples"], row["profile"]) == (None, {}) for row in sent(sites, "client-00") if row["kind"] != "session")
    assert all(row.get("metrics", {}) == {} for row in sent(sites, "client-00"))


# The signed list of sites.


def test_the_server_checks_its_list_of_sites_before_anything_else(tmp_path: Path) -> None:
    sites = Sites(tmp_path / "federation", 3)
    file, server = sites.folder / "server" / "roster.json", sites.server
    assert sorted(server.roster()[1]) == sites.names
    other = Sites(tmp_path / "other", 3)
    for content, said in (
        (other.server.roster()[0].encode(), "is not signed by the authority"),
        (None, "missing, but privacy.secure_aggregation needs the signed list of sites; run fedmllm site sign"),
    ):
        file.write_bytes(content) if content else file.unlink()
        with pytest.raises(ConfigError, match=said):
            train(sites.experiment(1), tmp_path / "run", resident=RESIDENT)
    assert not (tmp_path / "run").exists()


def test_a_site_with_its_own_key_joins_after_the_list_is_signed_again(tmp_path: Path) -> None:
    sites = Sites(tmp_path / "federation", 3)
    server = sites.folder / "server"
    made = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "site.key")]
    subprocess.run(made, check=True)
    (server / "client-03.pub").write_bytes((tmp_path / "site.key.pub").read_bytes())
    file = server / "server.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "sites": [*sites.names, "client-03"]}))
    with pytest.raises(ConfigError, match="the key of client-03 in the signed list is not the one in client-03"):
        sites.server.roster()
    signed = CliRunner().invoke(site_app, ["sign", str(sites.folder / "authority" / "ca.key"), str(file)])
    assert signed.exit_code == 0, signed.output
    assert sorted(sites.server.roster()[1]) == [*sites.names, "client-03"]


def test_only_the_authority_signs(tmp_path: Path) -> None:
    sites = Sites(tmp_path / "federation", 3)
    for key, said in (("server.key", "not the key of the authority"), ("ca.crt", "not the authority's private key")):
        with pytest.raises(ConfigError, match=said):
            keys.sign(sites.folder / "server" / key, sites.server)


def test_two_sites_with_one_key_are_not_signed(tmp_path: Path) -> None:
    sites = Sites(tmp_path / "federation", 3)
    server = sites.folder / "server"
    (server / "client-01.pub").write_bytes((server / "client-00.pub").read_bytes())
    with pytest.raises(FederationError, match="must have different keys, but client-00 and client-01"):
        keys.sign(sites.folder / "authority" / "ca.key", sites.server)


# Messages.

STAGE = SecureStage(RoundId("r", "federated", 0), "keys", {"a": Opening(bytes(16), RoundId("r", "federated", 0))}, largest(3, 0))


def test_messages_of_a_session_arrive_as_they_were_sent() -> None:
    facts, content = read_stage(write_stage(STAGE, "a", "list"))
    assert (facts.client, facts.run, facts.stage, facts.round_num, facts.step, facts.roster) == ("a", "r", "federated", 0, "keys", "list")
    assert read_down("keys", content, 3) == STAGE.messages["a"]
    assert not read_stage(write_stage(replace(STAGE, name="shares", messages={"a": STAGE.messages["a"]}), "a", "list"))[0].roster


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        pack({}, {}),
        pack({"message": {"content": torch.zeros(3)}}, {"client": "a"}),
        pack(
            {"message": {"content": torch.zeros(3, dtype=torch.uint8)}},
            {"client": "a", "run": "r", "stage": "s", "round_num": 0, "step": "x"},
        ),
        pack(
            {"other": {"content": torch.zeros(3, dtype=torch.uint8)}},
            {"client": "a", "run": "r", "stage": "s", "round_num": 0, "step": "keys"},
        ),
    ],
)
def test_other_messages_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"safetensors|one part|consists of bytes|validation error"):
        read_stage(content)


def test_an_answer_that_cannot_be_read_is_a_failure() -> None:
    _, opening = read_stage(write_stage(STAGE, "a", ""))
    for content, said in ((b"x", "cannot be read"), (opening, "expected 'PublicKeys'"), (bytes(STAGE.largest + 1), "expected at most")):
        found = read_up(content, "a", STAGE)
        assert isinstance(found, ClientFailure)
        assert said in found.reason
