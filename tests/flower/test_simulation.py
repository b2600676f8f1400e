"""Flower's simulation on a real Ray in a subprocess: failures to start and failures to end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedmllm[flower]'")

from fedmllm.flower import simulation

SCRIPT = """
import logging, time
from pathlib import Path
from fedmllm.flower import simulation
from fedmllm.flower.carrier import FlowerCarrier, ask
from fedmllm.flower.installed import require_flower

logging.basicConfig(level=logging.WARNING)
require_flower("ray")

from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep({seconds})
    return Message(message.content, reply_to=message)

{before}
with simulation.simulation(app, 1, 1.0, 0.0) as (grid, nodes):
    begun = time.monotonic()
    {within}
    for _, answer in ask(FlowerCarrier(grid), "train", [("a", b"hello")], {{"a": nodes[0]}}, {deadline}):
        print(answer, flush=True)
print("ended")
"""


def test_rays_folder_has_a_short_name_for_any_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for length, short in ((39, None), (40, Path("/tmp")), (120, Path("/tmp"))):
        monkeypatch.setenv("TMPDIR", "/" + "x" * (length - 1))
        with simulation._short_folder() as folder:
            assert (folder and folder.parent) == short
            # Ray adds the folder, the session's folder and the sockets' folder, with names of its own.
            assert len(f"{folder or os.environ['TMPDIR'] + '/ray'}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107
        assert folder is None or not folder.exists()


def ran(seconds: float = 0.0, deadline: float | None = None, before: str = "", within: str = "", **environment: str) -> Any:
    """The process of a simulation with one client that works for ``seconds``, and whose answer has a deadline."""
    code = SCRIPT.format(seconds=seconds, deadline=deadline, before=before, within=within)
    own = {name: value for name, value in os.environ.items() if name not in ("RAY_TMPDIR", "TMPDIR")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=own | environment)


@pytest.mark.slow
def test_a_temporary_folder_with_a_name_too_long_for_sockets_is_replaced_with_a_warning(tmp_path: Path) -> None:
    """Without the check, Ray's error is lost in a thread, and the run waits for its first client forever."""
    folder = tmp_path / ("x" * (119 - len(str(tmp_path))))
    folder.mkdir()
    run = ran(TMPDIR=str(folder))
    assert [line for line in run.stdout.splitlines() if not line.startswith("\x1b")] == ["b'hello'", "ended"], run.stderr
    assert f"the name of Ray's temporary folder may have at most 39 bytes, {folder} has 120; using /tmp/ray-" in run.stderr
    assert not (folder / "ray").exists()
    (used,) = (line.split("; using ")[1].split(" instead")[0] for line in run.stderr.splitlines() if "bytes" in line)
    assert not Path(used).exists()


@pytest.mark.slow
def test_a_backend_that_does_not_start_is_an_immediate_error(tmp_path: Path) -> None:
    before = f"given = simulation._backend; simulation._backend = lambda *o: given(1, 0, Path({str(tmp_path / ('x' * 120))!r}))"
    run = ran(before=before)
    assert run.returncode == 1
    assert (
        run.stderr.rstrip()
        .splitlines()[-1]
        .startswith(
            "fedmllm.errors.FederationError: Flower's simulation did not start: OSError: validate_socket_filename failed: AF_UNIX path length"
        )
    )


@pytest.mark.slow
def test_a_backend_that_has_ended_is_an_immediate_error() -> None:
    """Without the check, a run without a deadline waits for the client's answer forever."""
    before = "running, started = [], simulation._Simulation.started\n"
    before += "simulation._Simulation.started = lambda self: (running.append(self), started(self))[1]"
    run = ran(before=before, within="running[0].end()")
    assert run.returncode == 1, run.stderr
    assert run.stderr.rstrip().splitlines()[-1] == "fedmllm.errors.FederationError: Flower's simulation ended: it was stopped"


@pytest.mark.slow
def test_a_client_that_does_not_end_is_killed_with_the_simulation() -> None:
    start = time.monotonic()
    run = ran(600, 1.0, "simulation._END = 1.0")
    assert "ClientFailure(client='a', reason='no answer within the deadline of 1 s', reached=True)\n" in run.stdout
    assert "Clients are still training after 1 s; killing their workers" in run.stderr
    assert time.monotonic() - start < 150
