"""Secure aggregation between real processes over TLS: three, four and five sites, one of which is killed between two stages."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")


from federation_processes import Processes, ended, rounds
from fedmllm.engine.secure import FACTS

DEADLINE = 60


def experiment(count: int, rounds: int) -> dict[str, Any]:
    return {
        "data": {"dataset": "digits-claims", "num_train": 20 * count, "num_test": 12},
        "federation": {"num_clients": count, "clients_per_round": count, "num_rounds": rounds, "min_partition_size": 8},
        "training": {"batch_size": 8, "learning_rate": 6.0e-3},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": "cpu", "parallel_clients": 1},
        "failures": {"deadline": DEADLINE, "below": "skip"},
        "privacy": {"secure_aggregation": True},
    }


def wait_for_step(processes: Processes, site: str, step: str, seconds: float = 240) -> None:
    """Wait until a site has answered a step of the second round's session; ``train`` is its training."""
    path, until = processes.site(site).parent / "sent.jsonl", time.monotonic() + seconds
    while time.monotonic() < until:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        if any(row.get("round") == 2 and row.get("step", "train") == step for row in rows):
            return
        time.sleep(0.002)
    raise TimeoutError(f"{site} has not answered {step} of round 2")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "before", "after"), [(3, "train", "keys"), (4, "train", "keys"), (5, "shares", "masked")])
def test_a_site_that_is_killed_between_two_stages(count: int, before: str, after: str, tmp_path: Path) -> None:
    """The last site is suspended so that the stage cannot end before the first one is killed.

    Of three sites none may leave: the round is skipped. Of four one may. Of five one may, and its vector, which arrived, stays in the sum.
    """
    names = [f"client-{number:02}" for number in range(count)]
    settings: dict[str, Any] = {name: {"secure_aggregation": True, "min_clients": 3} for name in names}
    with Processes(tmp_path / "federation", settings) as processes:
        run = processes.train(experiment(count, 2), tmp_path / "there")
        wait_for_step(processes, names[-1], before)
        # A site notes an answer before it sends it.
        time.sleep(1.5)
        suspended = processes.worker(names[-1])
        os.kill(suspended, signal.SIGSTOP)
        try:
            wait_for_step(processes, names[0], after)
            time.sleep(5)
            processes.kill(processes.folder / f"{names[0]}.out", "worker")
        finally:
            os.kill(suspended, signal.SIGCONT)
        ended(run, 600)
        first, second = (json.loads(line) for line in rounds(tmp_path / "there"))
        assert (first["skipped"], first["refused"], first[FACTS]["clients"]) == (False, [], count)
        _assert_named(count, names[0], second)
    result = json.loads((tmp_path / "there" / "result.json").read_text())["secure"]
    assert (result["sums"], result["skipped"], result["simulated"]) == ((1, 1, False) if count == 3 else (2, 0, False))


def _assert_named(count: int, killed: str, record: dict[str, Any]) -> None:
    if count == 5:
        assert (record["skipped"], record["refused"], record[FACTS]["left_later"]) == (False, [], [killed])
        assert record[FACTS]["clients"] == 5
        return
    assert [row["client"] for row in record["refused"]] == [killed]
    # On a loaded machine the suspended site may have answered one stage more.
    stage = re.match(r"left secure aggregation in stage (shares|masked): ", record["refused"][0]["reason"])
    assert stage is not None
    assert record["skipped"] == (count == 3)
    if count == 3:
        assert f"needs at least 3 clients after stage {stage[1]}, but 2 are left; the round is skipped" in record[FACTS]["failed"]
