"""Grids: their cells, their mistakes, and what a cell's key depends on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmllm.data.fingerprint import content_key
from fedmllm.errors import ConfigError
from fedmllm.sweeps import grid as module
from fedmllm.sweeps.grid import Grid, cells, load_grid
from run_folders import SMALL, small


def test_cells_are_the_product_and_the_additional_rows() -> None:
    grid = Grid.model_validate(
        SMALL
        | {
            "scenarios": ["aligned-0.5", "missing-0.4"],
            "datasets": ["digits-claims", "digits-triage"],
            "seeds": [0, 1, 2],
            "rows": [
                {"methods": ["flexlora"], "scenarios": ["missing-0.4"], "seeds": [1]},
                {
                    "methods": {"mild": {"algorithm": {"name": "fedprox", "parameters": {"proximal_mu": 0.1}}}},
                    "datasets": ["digits-claims"],
                },
            ],
        }
    )
    found = cells(grid)
    assert len(found) == 2 * 3 * 2 * 2 + 2 + 6
    assert len({cell.key for cell in found}) == len(found)
    by_method = {method: [cell for cell in found if cell.method == method] for method in ("fedavg", "fedprox", "flexlora", "mild")}
    assert {cell.scenario for cell in by_method["flexlora"]} == {"missing-0.4"}
    assert {cell.dataset for cell in by_method["mild"]} == {"digits-claims"}
    for cell in found:
        assert cell.experiment.seed == cell.seed
        assert cell.experiment.federation.scenario == cell.scenario
        assert cell.experiment.data.dataset == cell.dataset
        assert cell.experiment.data.num_train == 24
        assert cell.experiment.evaluation.baselines == (("zero_shot",) if cell.method == "fedavg" else ())
    assert by_method["mild"][0].experiment.algorithm.parameters == {"proximal_mu": 0.1}
    data = [(cell.dataset, cell.seed) for cell in found]
    assert sum(a != b for a, b in pairwise(data)) == 2 * 3 - 1


def test_changed_data_change_a_cells_key(tmp_path: Path) -> None:
    """Files with rows count by content, pictures by name and size. The folder's place does not matter."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train.csv").write_text("text,answer\nwords,a\nother,b\n")
        (tmp_path / place / "1.png").write_bytes(b"12")
    data = {
        "dataset": "csv",
        "root": str(tmp_path / "here"),
        "options": {"train": "train.csv", "columns": {"text": "text", "answer": "answer"}},
    }
    data["options"] |= {"question": "Which?", "choices": ["a", "b"]}
    grid = Grid.model_validate(SMALL | {"base": {"data": data}, "datasets": {"own": {}}, "seeds": [0]})
    before = cells(grid)[0]
    assert cells(grid)[0].key == before.key
    assert content_key(tmp_path / "there") == content_key(tmp_path / "here") == before.content
    (tmp_path / "here" / "train.csv").write_text("text,answer\nwords,b\nother,a\n")
    edited = cells(grid)[0]
    (tmp_path / "here" / "1.png").write_bytes(b"123")
    assert len({before.key, edited.key, cells(grid)[0].key}) == 3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"methods": []}, "methods"),
        ({"surprise": 1}, "surprise"),
        (
            {"rows": [{"methods": ["krum"], "scenarios": ["cross-5:5"]}]},
            "scenarios ['cross-5:5'] are not in the grid, which has ['aligned']",
        ),
        ({"rows": [{"methods": ["fedprox"]}]}, "['fedprox'] are already methods of the grid"),
        ({"published": {"dogs": {}}}, "'dogs' is not a dataset of the grid"),
        ({"published": {"claims": {"fedavg": [1.0, 2.0]}}}, "claims: fedavg: 2 numbers for 1 scenarios"),
    ],
)
def test_invalid_grids_are_refused(changes: Mapping[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SMALL | dict(changes)))
    with pytest.raises(ConfigError) as caught:
        load_grid(tmp_path / "grid.yaml")
    assert part in str(caught.value)
    assert "grid.yaml" in str(caught.value)


def test_all_invalid_experiments_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        small(methods=["fedavg", "krum", "nonsense"])
    assert "2 experiment(s)" in str(caught.value)
    assert "nano / claims / 0 / aligned / krum: " in str(caught.value)
    assert "nano / claims / 0 / aligned / nonsense: " in str(caught.value)


def test_a_key_depends_on_settings_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second), (again, _) = small(), small()
    assert first.key == again.key != second.key
    monkeypatch.setattr(module, "code_version", lambda: "other")
    assert small()[0].key != first.key
