"""A leaderboard accepts sweeps exactly as they were trained, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmllm.errors import RunError
from fedmllm.sweeps.code_version import code_version
from fedmllm.sweeps.grid import Cell, Grid, cells
from fedmllm.sweeps.leaderboard import Leaderboard, read_leaderboard, submit
from fedmllm.sweeps.runner import Places, open_sweep, run_sweep
from run_folders import SMALL

GRID: dict[str, Any] = SMALL | {"methods": ["fedavg", "ditto"], "scenarios": ["missing-0.3"], "baselines": []}
CELLS = cells(Grid.model_validate(GRID))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    open_sweep(Grid.model_validate(GRID), folder)
    assert all(outcome.score is not None for outcome in run_sweep(CELLS, folder))
    return folder


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy of the sweep, for tests that change it."""
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_unchanged_sweep_is_accepted(sweep: Path) -> None:
    board = read_leaderboard(submit(CELLS, sweep))
    assert board.code == code_version()
    assert [entry.method for entry in board.entries] == ["fedavg", "ditto"]
    first, personalized = board.entries
    result = json.loads((Places.of(sweep, CELLS[0]).folder / "result.json").read_text())
    assert (first.score, first.bytes_up) == (result["scores"]["federated"], result["bytes_up"])
    assert (first.num_samples, personalized.num_samples) == (8, 16)
    assert first.split == personalized.split
    assert first.settings != personalized.settings


def result(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "result.json", change)


def other_settings(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["training"]["local_epochs"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def other_answers(folder: Path) -> None:
    edit(folder / "predictions.json", lambda p: p["guesses"][0].reverse())


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a better score": (
        result(lambda r: r["scores"].update(federated=0.999)),
        "result.json: score is 0.999, computed from rounds and answers it is",
    ),
    "fewer bytes": (result(lambda r: r.update(bytes_up=1)), "bytes_up is 1, computed from rounds and answers it is"),
    "hidden failures": (result(lambda r: r["details"]["federated"].update(failures=3)), "failures is 3"),
    "other answers": (other_answers, "result.json: score is"),
    "another test": (
        lambda folder: edit(folder / "predictions.json", lambda p: p.update(truth=[1 - label for label in p["truth"]])),
        "does not answer the test samples",
    ),
    "another split": (lambda folder: edit(folder / "manifest.json", lambda m: m["clients"][0]["samples"].pop()), "is not the split"),
    "other settings": (other_settings, "training.local_epochs: 2 and 1"),
    "a round less": (
        lambda folder: (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().split("\n")[0] + "\n") and None,
        "does not have exactly the rounds 1 to 2",
    ),
    "no result": (lambda folder: (folder / "result.json").unlink(), "not finished by this version of the code"),
    "no answers": (lambda folder: (folder / "predictions.json").unlink(), "the cell cannot be read"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_changed_cell_is_refused(kind: str, sweep: Path) -> None:
    tamper, reason = TAMPERED[kind]
    tamper(Places.of(sweep, CELLS[0]).folder)
    with pytest.raises(RunError) as caught:
        submit(CELLS, sweep)
    assert reason in str(caught.value)
    assert "nano / claims / 0 / missing-0.3 / fedavg: " in str(caught.value)
    assert "ditto" not in str(caught.value)
    assert not (sweep / "leaderboard.json").exists()


def test_cells_of_another_code_version_are_refused(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.sweeps.grid.code_version", lambda: "other")
    fresh = [Cell(c.model, c.dataset, c.seed, c.scenario, c.method, c.experiment) for c in CELLS]
    with pytest.raises(RunError, match=r"2 check\(s\) failed"):
        submit(fresh, sweep)


@pytest.mark.parametrize(
    ("change", "place"),
    [({"score": 1.5}, "score"), ({"score": float("nan")}, "score"), ({"settings": "abc"}, "settings"), ({"surprise": 1}, "surprise")],
)
def test_leaderboard_files_are_validated(change: dict[str, Any], place: str, sweep: Path) -> None:
    path = submit(CELLS, sweep)
    edit(path, lambda board: board["entries"][0].update(change))
    with pytest.raises(RunError, match=place):
        read_leaderboard(path)
    assert set(Leaderboard.model_json_schema()["required"]) == {"code", "versions", "entries"}
