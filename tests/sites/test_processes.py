"""Real processes on this machine: training over sites ends as in one process, strangers are refused, and killed processes are restarted."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from federation_processes import ENVIRONMENT, Processes, ended, rounds
from fedmllm.flower.installed import QUIET
from fedmllm.flower.settings import ServerConfig, SiteConfig
from fedmllm.flower.superlink import SuperLink
from fedmllm.sites import keys
from fedmllm.sites.start import supernode

SITES = ("client-00", "client-01", "client-02")
EXPERIMENT: dict[str, Any] = {
    "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 12},
    "federation": {"num_clients": 3, "clients_per_round": 3, "num_rounds": 2, "scenario": "missing-0.3", "min_partition_size": 10},
    "training": {"batch_size": 8, "learning_rate": 6.0e-3},
    "evaluation": {"every": 0, "baselines": []},
    "compression": {"name": "int8"},
    "engine": {"device": "cpu", "parallel_clients": 1},
    "failures": {"deadline": 200, "below": "wait", "min_updates": 3, "pause": 2, "attempts": 60},
}


def assert_same_adapter(here: Path, there: Path) -> None:
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (here, there))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)


def in_one_process(processes: Processes, experiment: dict[str, Any], output: Path) -> None:
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(experiment))
    processes.run("train", str(file), "--output", str(output), "--track", "none")


def refused(command: list[str], words: str, seconds: float = 60) -> str:
    """The output of a process that must be refused, up to the expected word."""
    process = subprocess.Popen(command, env={**ENVIRONMENT, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until, said = time.monotonic() + seconds, ""
    assert process.stdout is not None
    while words not in said and time.monotonic() < until and (line := process.stdout.readline()):
        said += line
    process.kill()
    process.communicate()
    return said


@pytest.mark.slow
def test_training_over_sites_equals_one_process_and_strangers_are_refused(tmp_path: Path) -> None:
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        run = processes.train(EXPERIMENT, tmp_path / "there")
        in_one_process(processes, EXPERIMENT, tmp_path / "here")
        ended(run)
        assert_same_adapter(tmp_path / "here", tmp_path / "there")
        here, there = ([json.loads(line) for line in rounds(tmp_path / name)] for name in ("here", "there"))
        # A slow site may delay the run, but must not change its result.
        for ours, theirs in zip(here, there, strict=True):
            assert [theirs[key] for key in ("clients", "num_samples", "bytes_up")] == [
                ours[key] for key in ("clients", "num_samples", "bytes_up")
            ]
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        _assert_strangers_are_refused(processes, tmp_path)


def _assert_strangers_are_refused(processes: Processes, folder: Path) -> None:
    site = SiteConfig.load(processes.site("client-00"))
    keys.init(folder / "others", processes.address, ["client-00"])
    other = SiteConfig.load(folder / "others" / "sites" / "client-00" / "site.yaml").model_copy(update={"port": site.port + 1000})
    # Its own key with the right authority: the SuperLink does not admit it.
    (folder / "others" / "sites" / "client-00" / "ca.crt").write_bytes((site.folder / "ca.crt").read_bytes())
    assert "failed to activate" in (said := refused(list(supernode(other).command), "activate").lower()), said
    # The right key with another authority: the SuperNode does not trust the server.
    (other.folder / "ca.crt").write_bytes((folder / "others" / "authority" / "ca.crt").read_bytes())
    (other.folder / "site.key").write_bytes((site.folder / "site.key").read_bytes())
    assert "certificate" in (said := refused(list(supernode(other).command), "certificate").lower()), said
    # Without the server's secret nobody can serve a run.
    link = ServerConfig.load(processes.server).link
    stranger = SuperLink(link.address, link.certificate, folder / "others" / "server" / "secret", link.keys, patience=5)
    with pytest.raises(ConnectionError, match="refused the call: Client error '401 Unauthorized'"):
        stranger.begin()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["worker", "SuperNode", "SuperLink"])
def test_a_killed_process_is_restarted_and_the_run_ends_the_same(what: str, tmp_path: Path) -> None:
    experiment = EXPERIMENT | {"federation": EXPERIMENT["federation"] | {"num_rounds": 5}}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        run = processes.train(experiment, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 2 and run.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        processes.kill(processes.folder / f"{'server' if what == 'SuperLink' else 'client-01'}.out", what)
        in_one_process(processes, experiment, tmp_path / "here")
        ended(run, 500)
        assert_same_adapter(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_a_killed_server_resumes_to_the_same_end(tmp_path: Path) -> None:
    experiment = EXPERIMENT | {"federation": EXPERIMENT["federation"] | {"num_rounds": 4}, "algorithm": {"name": "scaffold"}}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        run = processes.train(experiment, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 2 and run.poll() is None:
            time.sleep(0.05)
        run.kill()
        run.communicate()
        ended(processes.train(experiment, tmp_path / "there", "--resume"))
        in_one_process(processes, experiment, tmp_path / "here")
        assert_same_adapter(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_a_run_without_its_superlink_stops_at_its_deadline(tmp_path: Path) -> None:
    experiment = EXPERIMENT | {"federation": EXPERIMENT["federation"] | {"num_rounds": 50}, "failures": {"deadline": 40}}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        run = processes.train(experiment, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 2 and run.poll() is None:
            time.sleep(0.05)
        processes.started["server"].kill()
        processes.kill(processes.folder / "server.out", "SuperLink")
        start = time.monotonic()
        output, _ = run.communicate(timeout=300)
        # One deadline for the round, not one for each of the three clients. The second one is for a loaded machine.
        assert time.monotonic() - start < 2 * 40
    assert run.returncode == 1
    assert "no usable update" in output
    assert "the SuperLink at 127.0.0.1" in output
    assert "cannot be reached" in output


@pytest.mark.slow
def test_a_buffered_schedule_over_sites_steps_with_the_first_updates(tmp_path: Path) -> None:
    """A step takes two of three updates. In any order every site takes part, and some updates are stale."""
    schedule = {"name": "buffered", "parameters": {"buffer": 2}}
    experiment = EXPERIMENT | {"schedule": schedule, "federation": EXPERIMENT["federation"] | {"num_rounds": 6}}
    policy = EXPERIMENT["failures"] | {"min_updates": 2}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        ended(processes.train(experiment | {"failures": policy}, tmp_path / "there"))
    records = [json.loads(line) for line in rounds(tmp_path / "there")]
    assert [len(record["staleness"]) for record in records] == [2] * 6
    assert {client for record in records for client in record["losses"]} == set(SITES)
    assert sum(sum(record["staleness"].values()) for record in records) >= 1
    assert not any(record["refused"] for record in records)


@pytest.mark.slow
def test_a_suspended_server_continues_with_a_new_run(tmp_path: Path) -> None:
    """Flower ends a run whose server sends no heartbeat for a minute."""
    experiment = EXPERIMENT | {"federation": EXPERIMENT["federation"] | {"num_rounds": 4}, "algorithm": {"name": "scaffold"}}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        run = processes.train(experiment, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 2 and run.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        run.send_signal(signal.SIGSTOP)
        time.sleep(70)
        run.send_signal(signal.SIGCONT)
        output = ended(run)
        assert "Traceback" not in output
        # Clients are asked again only if they were at work when the server fell asleep.
        with closing(sqlite3.connect(f"file:{processes.server.parent / 'state.db'}?mode=ro", uri=True)) as database:
            assert database.execute("SELECT COUNT(*) FROM run").fetchone() == (2,)
        in_one_process(processes, experiment, tmp_path / "here")
        assert_same_adapter(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_a_site_that_leaves_is_named_after_the_deadline(tmp_path: Path) -> None:
    policy = {"deadline": 60, "below": "skip", "min_updates": 2}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}) as processes:
        experiment = EXPERIMENT | {"failures": policy, "federation": EXPERIMENT["federation"] | {"num_rounds": 4}}
        deadline = {"failures": {"deadline": 200, "below": "wait", "min_updates": 2, "pause": 2, "attempts": 60}}
        run = processes.train(experiment | deadline, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 1 and run.poll() is None:
            time.sleep(0.05)
        processes.started["client-02"].terminate()
        ended(run)
        last = json.loads(rounds(tmp_path / "there")[-1])
        assert [row["client"] for row in last["refused"]] == ["client-02"]
        assert last["num_samples"] > 0


@pytest.mark.slow
def test_a_run_starts_without_a_missing_site_and_includes_it_later(tmp_path: Path) -> None:
    policy = {"deadline": 60, "below": "skip", "min_updates": 2}
    with Processes(tmp_path / "federation", {name: {} for name in SITES}, later=["client-02"]) as processes:
        experiment = EXPERIMENT | {"failures": policy, "federation": EXPERIMENT["federation"] | {"num_rounds": 20}}
        run = processes.train(experiment | {"training": EXPERIMENT["training"] | {"local_epochs": 4}}, tmp_path / "there")
        while len(rounds(tmp_path / "there")) < 1 and run.poll() is None:
            time.sleep(0.05)
        processes.up("client-02")
        output = ended(run)
    assert "starting without client-02" in output
    first, *_, last = (json.loads(line) for line in rounds(tmp_path / "there"))
    assert first["refused"] == [{"client": "client-02", "reason": "not connected"}]
    assert sorted(last["losses"]) == list(SITES)
