"""A site's own privacy limits between real processes over TLS: they hold over all runs, whatever the server asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from federation_processes import Processes, ended, rounds
from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.privacy.accounting import epsilon
from fedmllm.privacy.sample_level import releases

SETTINGS: dict[str, Any] = {
    "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 12},
    "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 2, "min_partition_size": 8},
    "training": {"batch_size": 8, "learning_rate": 6.0e-3},
    "evaluation": {"every": 0, "baselines": []},
    "engine": {"device": "cpu", "parallel_clients": 1},
    "failures": {"deadline": 120},
}


@pytest.mark.slow
def test_a_site_refuses_what_exceeds_its_budget_in_this_run_and_in_the_next(tmp_path: Path) -> None:
    """The site's budget is enough for one round. The server asks for no privacy at all."""
    experiment = Experiment.parse(SETTINGS)
    size = len(federate(experiment.data, experiment.federation, experiment.seed).clients["client-00"])
    one, two = (epsilon([releases(1.0, experiment.training, size, count)], 1e-5) for count in (1, 2))
    limits = {"privacy": {"target_epsilon": (one + two) / 2, "noise_multiplier": 1.0}}
    with Processes(tmp_path / "federation", {"client-00": limits, "client-01": {}}) as processes:
        ledger = processes.site("client-00").parent / "privacy.jsonl"
        ended(processes.train(SETTINGS, tmp_path / "first"), 600)
        first, second = (json.loads(line) for line in rounds(tmp_path / "first"))
        assert first["refused"] == []
        assert first["losses"].keys() == {"client-01"}  # the private site withholds its loss
        (refused,) = second["refused"]
        assert refused["client"] == "client-00"
        assert "the privacy budget of client-00 is spent" in refused["reason"]
        assert len(ledger.read_text().splitlines()) == 1
        ended(processes.train(SETTINGS, tmp_path / "next"), 600)
        for line in rounds(tmp_path / "next"):
            assert [row["client"] for row in json.loads(line)["refused"]] == ["client-00"]
        assert len(ledger.read_text().splitlines()) == 1
