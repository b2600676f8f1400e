"""The Python API, on a run that is trained once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import fedmllm
from fedmllm.algorithms import ALGORITHMS, build_algorithm
from fedmllm.config import Experiment
from fedmllm.reports.progress import Display
from fedmllm.run.results import RunResult


@pytest.fixture(scope="module")
def result(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return fedmllm.train(tiny, tmp_path_factory.mktemp("api") / "run")


def test_every_public_name_exists_and_is_documented() -> None:
    for name in fedmllm.__all__:
        thing = getattr(fedmllm, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name


def test_a_result_has_its_run_folder(result: RunResult) -> None:
    assert result.folder is not None
    assert (result.folder / "report.html").is_file()
    assert "folder" not in json.loads((result.folder / "result.json").read_text())


def test_evaluate_gives_the_runs_score(result: RunResult) -> None:
    assert result.folder is not None
    assert fedmllm.evaluate(result.folder)["score"] == result.scores["federated"]


def test_predict_answers_questions_about_pictures_and_texts(result: RunResult, tmp_path: Path) -> None:
    """A path, a picture and text alone, with and without options."""
    assert result.folder is not None
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    asked: list[dict[str, Any]] = [
        {"question": "Is it misleading?", "image": tmp_path / "white.png", "text": "the total is 5", "options": ["no", "yes"]},
        {"question": "Is it misleading?", "image": Image.new("RGB", (16, 16), "white"), "options": ["no", "yes"]},
        {"question": "What is the total?", "text": "the total is 5"},
    ]
    adapter = fedmllm.load_adapter(result.folder)
    first, second, third = adapter.predict(asked)
    assert {first.answer, second.answer} <= {"no", "yes"}
    assert sum(first.probabilities) == pytest.approx(1)
    assert third.probabilities == ()
    assert fedmllm.predict(result.folder, asked[:1])[0].probabilities == pytest.approx(first.probabilities)


def test_progress_is_shown_in_terminals_or_on_request(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fedmllm.train(tiny, tmp_path / "quiet", report=False)
    assert "federated round" not in capsys.readouterr().out
    fedmllm.train(tiny, tmp_path / "shown", report=False, progress=True)
    assert "federated round 2/2" in capsys.readouterr().out
    monkeypatch.setattr("fedmllm.api._shows", lambda progress: True if progress is None else progress)
    monkeypatch.setattr(Display, "__enter__", lambda display: pytest.fail("not to be shown"))
    fedmllm.train(tiny, tmp_path / "silent", report=False, progress=False)


def test_a_sweep_resumes_and_has_a_report(tiny: Experiment, tmp_path: Path) -> None:
    base = yaml.safe_load(tiny.to_yaml())
    for section in ("model", "seed"):
        del base[section]
    base["federation"] = {**base["federation"], "num_rounds": 1}
    del base["federation"]["scenario"]
    grid = {"base": base, "methods": ["fedavg", "fedprox"], "scenarios": ["aligned-5.0"], "datasets": {"claims": {}}, "seeds": [0]}
    grid |= {"models": {"tiny": {"model": {"name": tiny.model.name}}}, "baselines": []}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    outcomes = fedmllm.sweep(tmp_path / "grid.yaml", tmp_path / "sweep")
    assert [outcome.cell.method for outcome in outcomes] == ["fedavg", "fedprox"]
    assert all(outcome.score is not None for outcome in outcomes), outcomes
    assert fedmllm.sweep(tmp_path / "grid.yaml", tmp_path / "sweep") == []
    assert fedmllm.report(tmp_path / "sweep") == tmp_path / "sweep" / "report.html"


ROOT = Path(__file__).parents[1]


def test_the_python_pages_snippets_work(
    result: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All snippets of the page but the first, which trains the quickstart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ALGORITHMS, "cooling", None)
    del ALGORITHMS["cooling"]
    page = (ROOT / "docs" / "python.md").read_text().partition("## Use the adapter without fedmllm")[0]
    _, *snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(snippets).replace("runs/mine", str(result.folder)).replace("experiments/", f"{ROOT}/experiments/")
    names: dict[str, Any] = {"fedmllm": fedmllm, "result": result}
    exec(code, names)
    assert names["answer"].answer in ("no", "yes")
    assert build_algorithm(names["experiment"].algorithm).decay == 0.3  # type: ignore[attr-defined]
    assert capsys.readouterr().out.startswith(str(result.folder))


def test_the_notebook_has_its_output_and_is_small() -> None:
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "print" not in "".join(cell["source"]) for cell in code)
    assert (ROOT / "examples" / "notebook.ipynb").stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_runs_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ALGORITHMS, "cooling", None)
    del ALGORITHMS["cooling"]
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace('"num_rounds": 4', '"num_rounds": 1'), names)
    assert set(names["results"]) == {"fedavg", "fedprox", "cooling"}


def test_the_report_of_a_run_can_be_written_again(result: RunResult) -> None:
    assert result.folder is not None
    (result.folder / "report.html").unlink()
    assert fedmllm.report(result.folder).read_text().lower().startswith("<!doctype html>")
