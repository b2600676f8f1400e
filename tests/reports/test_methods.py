from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, STRATEGIES
from fedmllm.cli.main import main
from fedmllm.cli.tables import methods_view
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.reports.methods import catalog, costs
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Record


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model, whose adapted modules are all square."""
    return nano


@pytest.fixture(scope="module")
def rows() -> Record:
    """The catalog as it is read from JSON."""
    return dict(json.loads(json.dumps(catalog())))


def test_the_catalog_is_complete_with_summaries_and_sources(rows: Record) -> None:
    assert set(rows) == {"methods", "strategies"}
    assert (set(rows["methods"]), set(rows["strategies"])) == (set(ALGORITHMS), set(STRATEGIES))
    for row in (*rows["methods"].values(), *rows["strategies"].values()):
        for text in (row["summary"], row["title"], row["reference"]):
            assert text
            assert "\n" not in text
            assert "``" not in text
        assert row["reference"].startswith(row["title"])


def test_the_parameters_are_the_defaults(rows: Record) -> None:
    for kind, index in (("methods", ALGORITHMS), ("strategies", STRATEGIES)):
        for name, row in rows[kind].items():
            assert index[name](**row["parameters"]) == index[name]()
    assert rows["methods"]["fedavgm"]["parameters"] == {"beta1": 0.9, "server_learning_rate": 1.0, "reference": False}
    assert rows["methods"]["fedavg"]["parameters"] == rows["strategies"]["agnostic_prompt"]["parameters"] == {}


@pytest.mark.parametrize(
    ("kind", "name", "title"),
    [
        ("methods", "fedavg", "Communication-Efficient Learning of Deep Networks from Decentralized Data"),
        ("methods", "fedyogi", "Adaptive Federated Optimization"),
        ("methods", "ditto", "Ditto: Fair and Robust Federated Learning Through Personalization"),
        ("strategies", "agnostic_prompt", "FedMLLM: Empowering Federated Fine-Tuning of Multimodal LLMs"),
    ],
)
def test_a_title_ends_where_the_authors_begin(rows: Record, kind: str, name: str, title: str) -> None:
    assert rows[kind][name]["title"] == title


BY_HAND: dict[str, dict[str, Any]] = {
    "fedavg": {"kind": "classic", "up": "1", "down": "1", "client_state": {}, "server_state": [], "exact": False, "streams": True},
    # Clients send the update and the change of their control. The server sends the weights and its control.
    "scaffold": {"up": "2", "down": "2", "client_state": {"control": 1.0}, "server_state": ["control"], "streams": True},
    "fedadam": {"up": "1", "down": "1", "server_state": ["momentum", "second_moment"]},
    # With square modules, B alone is half of an adapter.
    "ffa_lora": {"kind": "lora", "up": "0.5", "down": "0.5", "exact": True, "heterogeneous_ranks": False},
    "rolora": {"up": "0.5", "down": "1", "exact": True},
    # A round's stack is as large as its clients' adapters. Before the first round there is none.
    "flora": {"up": "1", "down": "0, then K", "exact": True, "heterogeneous_ranks": True, "streams": False},
    "fedex_lora": {"up": "1", "down": "1, then 1 + K", "server_state": ["base", "base_step"]},
    "fedsa_lora": {"kind": "personalized", "up": "0.5", "down": "0.5", "client_state": {"own": 0.5}, "personalized": True},
    "ditto": {"up": "1", "down": "1", "client_state": {"personal": 1.0}, "personalized": True},
    # With one Byzantine client, 2 + 3.
    "krum": {"kind": "robust", "smallest_cohort": 5, "streams": False},
    "yoco": {"kind": "one-shot", "up": "1", "down": "1", "server_state": ["signs", "base"], "client_state": {}},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_properties_and_costs_match_a_hand_computation(rows: Record, name: str) -> None:
    row = rows["methods"][name]
    assert {key: row[key] for key in BY_HAND[name]} == BY_HAND[name]


def test_the_catalog_says_what_strategies_change(rows: Record) -> None:
    found = {name: (row["changes"], row["published"]) for name, row in rows["strategies"].items()}
    assert found["adaptive_regularization"] == (["client"], True)
    assert found["agnostic_prompt"] == (["prompt"], True)
    assert found["modality_coverage"] == (["weight"], False)


def adapters(text: str, round_num: int, cohort: int) -> float:
    """The value of a notation such as ``1, then 1 + K``."""
    terms = text.split(", then ")[min(round_num, text.count(", then "))].split(" + ")
    return sum(float(term.removesuffix("K") or 1) * cohort if term.endswith("K") else float(term) for term in terms)


def test_the_notation_of_costs_is_evaluated_correctly() -> None:
    assert [adapters("1, then 0.5 + 2 K", round_num, 3) for round_num in (0, 1, 2)] == [1.0, 6.5, 6.5]
    assert adapters("0, then K", 1, 4) == 4.0


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_costs_equal_those_of_a_run_on_the_embedded_model(
    name: str, vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path
) -> None:
    """Three rounds of the real engine, whose clients take no steps. All adapted modules of the embedded model are square."""
    method, training, cohort = ALGORITHMS[name](), TrainingConfig(local_epochs=0), len(federation.clients)
    clients = {client: samples[:1] for client, samples in federation.clients.items()}
    weights, store = read_weights(vlm.model), RunStore(tmp_path)
    loop = Loop(method, InProcessEngine(vlm, encoder, training), training, Split(lambda weights, base: {"score": 0.0}), store, 0)
    start = method.init(weights, frozen_weights(vlm))
    end = run_stage(loop, Stage("federated", clients, 3, cohort), start)
    adapter, row = W.num_bytes(weights), costs(method)
    for round_num, line in enumerate(store.records("federated")):
        for way in ("up", "down"):
            assert line[f"bytes_{way}"] == adapters(row[way], round_num, cohort) * cohort * adapter
    kept = store.client_states("federated").load(first := next(iter(clients)), end.accepted[first])
    assert {slot: W.num_bytes(tensors) / adapter for slot, tensors in kept.items()} == row["client_state"]
    assert list(end.slots) == row["server_state"]


def test_the_list_shows_a_methods_costs(rows: Record) -> None:
    out = StringIO()
    Console(file=out, width=200).print(methods_view(rows))
    text = [line.strip() for line in out.getvalue().splitlines()]
    assert "personalized; one model per client; streams; up 0.5; down 0.5; each client keeps 0.5 (own)" in text
    assert "robust; up 1; down 1; at least 5 clients per round" in text
    assert "robust; up 1; down 1; at least 3 clients per round" in text
    assert any("FedAvg in which every client also trains a personalized model" in line for line in text)
    assert "strategy; changes how clients train; part of FedMLLM(method)" in text
    assert "parameters  beta1: 0.9, server_learning_rate: 1.0, reference: false" in text


def test_the_command_in_text_and_as_json(rows: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fedmllm(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedmllm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    assert json.loads(fedmllm("methods", "--json")) == rows
    text = fedmllm("methods")
    lines = text.splitlines()
    assert {*ALGORITHMS, *STRATEGIES} <= set(lines)
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 80
