"""Grids: their cells, their mistakes, and what a cell's key depends on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedmllm
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


def test_comments_and_docstrings_do_not_change_the_code_version() -> None:
    plain = module._meaning("def f(x):\n    return x + 1\n")
    assert module._meaning('"""A."""\n\ndef f(x):\n    """B."""\n    # C\n    return (x + 1)\n') == plain
    assert module._meaning("def f(x):\n    return x + 2\n") != plain


PACKAGE = Path(fedmllm.__file__).parent


def counted_modules() -> set[str]:
    """Modules that are part of the code's version."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in module.code_files()}


def test_the_code_version_counts_modules_that_affect_scores_only() -> None:
    """run/train sets the baselines' length. Exports, plans and the embedded model's training do not affect scores."""
    decide = {"run/train", "run/summary", "config", "randomness", "data/federated", "data/datasets/mixture", "data/fingerprint"}
    assert decide <= counted_modules()
    assert counted_modules().isdisjoint(
        {"data/export", "models/plan", "models/nano/pretrain", "flower/superlink", "reports/figures", "cli/tables", "cli/main"}
    )
    assert all(module._module_file(name) is not None for name in module._NO_MATTER)


@pytest.mark.slow
def test_every_module_that_a_cell_loads_is_counted_or_excluded(tmp_path: Path) -> None:
    """Checked in a process that trains a cell on several datasets."""
    parts = [{"dataset": "digits-vqa", "num_train": 16, "num_test": 4}, {"dataset": "digits-cards", "num_train": 16, "num_test": 4}]
    data = {"dataset": "mixture", "num_train": None, "num_test": None, "options": {"parts": parts}}
    experiment = small(datasets={"mix": {"data": data}})[0].experiment
    (tmp_path / "e.yaml").write_text(experiment.to_yaml())
    program = (
        "import sys; from fedmllm.run.train import train; from fedmllm.config import Experiment; "
        f"train(Experiment.load({str(tmp_path / 'e.yaml')!r}), {str(tmp_path / 'run')!r}); "
        "print(*(name for name, m in sys.modules.items() if name.startswith('fedmllm.') and not hasattr(m, '__path__')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    loaded = {name.removeprefix("fedmllm.").replace(".", "/") for name in done.stdout.split()}
    shown = {name.removeprefix("fedmllm.").replace(".", "/") for name in module._NO_MATTER}
    assert "training/local" in loaded
    # Modules that only display results may import others that only display.
    assert {name for name in loaded - counted_modules() - shown if not name.startswith(("run/", "flower/"))} == set()


def test_a_changed_embedded_model_changes_the_code_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = module.code_version()
    shutil.copytree(module.NANO_FOLDER, tmp_path / "nano")
    monkeypatch.setattr(module, "NANO_FOLDER", tmp_path / "nano")
    (tmp_path / "nano" / "README.md").write_text("other words")
    assert module.code_version.__wrapped__() == before
    with (tmp_path / "nano" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert module.code_version.__wrapped__() != before
