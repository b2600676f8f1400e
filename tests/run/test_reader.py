"""Run folders read back: every file is validated, and a broken one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmllm.errors import RunError
from fedmllm.run.reader import Round, read_run
from run_folders import Folder, round_line


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def break_result(folder: Path) -> None:
    record = json.loads((folder / "result.json").read_text())
    del record["seconds"]
    record["scores"]["federated"] = "high"
    (folder / "result.json").write_text(json.dumps(record))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.yaml").unlink(), r"config\.yaml: cannot be read \(No such file"),
    "binary config": (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe"), r"config\.yaml: cannot be read \(not UTF-8 text"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: cannot be read"),
    "manifest is no object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        r"manifest\.json: does not match the format of this version",
    ),
    "manifest lacks all": (lambda f: (f / "manifest.json").write_text("{}"), r"(?s)manifest\.json.*clients: Field required"),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), r"metrics\.jsonl: cannot be read"),
    "metrics line is no JSON": (lambda f: (f / "metrics.jsonl").write_text("{}}\n"), r"(?s)metrics\.jsonl, line 1: .*Invalid JSON"),
    "metrics line lacks all": (lambda f: (f / "metrics.jsonl").write_text('{"round": 1}\n'), r"(?s)line 1: .*stage: Field required"),
    "loss is NaN": (
        lambda f: (f / "metrics.jsonl").write_text(json.dumps(round_line("federated", 1, loss=float("nan"))) + "\n"),
        r"(?s)line 1: .*loss: Input should be a finite number",
    ),
    "result cut short": (lambda f: (f / "result.json").write_text('{"experiment": "x'), r"result\.json: .*"),
    "result with wrong types": (break_result, r"(?s)result\.json: .*scores\.federated: .*seconds: Field required.*--resume"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_named(folder: Folder, name: str) -> None:
    break_it, message = BREAKS[name]
    break_it(folder.write())
    with pytest.raises(RunError, match=message):
        read_run(folder.path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="name a complete folder that fedmllm train wrote"):
        read_run(tmp_path / "nowhere")


def test_an_incomplete_last_line_is_left_out(folder: Folder) -> None:
    whole = read_run(folder.write())
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "federated", "rou')
    assert read_run(folder.path) == whole


def test_a_run_is_read_completely(folder: Folder) -> None:
    """The lines keep their order. Only those of rounds with training have what a round trains, and only federated ones are the run's rounds."""
    run = read_run(folder.write())
    assert (run.name, run.config) == ("run", folder.config)
    assert [client.num_samples for client in run.manifest.clients] == [10, 11, 12, 13]
    assert [(line.stage, line.round) for line in run.lines] == [(line["stage"], line["round"]) for line in folder.lines]
    assert not isinstance(run.lines[0], Round)
    assert [line.round for line in run.rounds] == [1, 2, 3, 4, 5, 6]
    assert [line.loss for line in run.rounds] == [2 / n for n in range(1, 7)]
    assert run.result is not None
    assert run.result.to_record().items() >= folder.result.items()


def test_an_unfinished_run_has_no_result(folder: Folder) -> None:
    folder.result = None
    assert read_run(folder.write()).result is None


def test_learning_curves_show_the_validation_split_where_it_was_scored(folder: Folder) -> None:
    """Runs of earlier versions have scores on the test split only."""
    folder.lines = [round_line("federated", 1, 0.5), round_line("federated", 2, 0.6, validation={"score": 0.7}), round_line("federated", 3)]
    assert [line.watched for line in read_run(folder.write()).lines] == [0.5, 0.7, None]


def test_a_line_with_an_unknown_number_format_is_named_by_its_number(folder: Folder) -> None:
    """The types are strict: a number in quotes is no number."""
    folder.lines = [round_line("federated", 1), round_line("federated", 2, num_samples="60")]
    with pytest.raises(RunError, match=r"(?s)metrics\.jsonl, line 2: .*num_samples: Input should be a valid integer"):
        read_run(folder.write())
