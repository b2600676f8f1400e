"""What the version of the code depends on, by which a sweep knows its finished cells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedmllm
from fedmllm.sweeps import code_version as module
from run_folders import small


def test_comments_and_docstrings_do_not_change_the_code_version() -> None:
    plain = module._meaning("def f(x):\n    return x + 1\n")
    assert module._meaning('"""A."""\n\ndef f(x):\n    """B."""\n    # C\n    return (x + 1)\n') == plain
    assert module._meaning("def f(x):\n    return x + 2\n") != plain


PACKAGE = Path(fedmllm.__file__).parent


def counted_modules() -> set[str]:
    """Modules that are part of the code's version."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in module.code_files()}


def test_the_code_version_counts_modules_that_affect_scores_only() -> None:
    """run/stages sets the baselines' length. Exports, plans and the embedded model's training do not affect scores."""
    decide = {
        "run/train",
        "run/stages",
        "run/splits",
        "run/summary",
        "config",
        "randomness",
        "data/federated",
        "data/datasets/mixture",
        "data/fingerprint",
    }
    assert decide <= counted_modules()
    assert counted_modules().isdisjoint(
        {"data/export", "models/plan", "models/nano/pretrain", "flower/superlink", "reports/figures", "cli/tables", "cli/main"}
    )
    assert all(module._module_file(name) is not None for name in module._WITHOUT_EFFECT)


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
    shown = {name.removeprefix("fedmllm.").replace(".", "/") for name in module._WITHOUT_EFFECT}
    assert "training/local" in loaded
    # Modules that only display results may import others that only display.
    assert {name for name in loaded - counted_modules() - shown if not name.startswith(("run/", "flower/"))} == set()


@pytest.mark.slow
def test_a_changed_embedded_model_changes_the_code_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = module.code_version()
    shutil.copytree(module.NANO_FOLDER, tmp_path / "nano")
    monkeypatch.setattr(module, "NANO_FOLDER", tmp_path / "nano")
    (tmp_path / "nano" / "README.md").write_text("other words")
    assert module.code_version.__wrapped__() == before
    with (tmp_path / "nano" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert module.code_version.__wrapped__() != before
