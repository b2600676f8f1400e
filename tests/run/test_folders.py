"""Run folders: the names of new ones, the one to resume, and what a run may not write to."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, manifest
from fedmllm.engine.observer import Observer
from fedmllm.errors import RunError
from fedmllm.models.load import fingerprint_of
from fedmllm.models.source import model_source
from fedmllm.run.folders import RUNS, check_folder, default_folder, known_model, open_folder, unfinished_folder
from fedmllm.run.scoring import score_adapter
from fedmllm.types import Record
from trained_runs import change


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which every run starts in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20250101-000000")
    return tmp_path


def begun(path: Path, finished: bool = False) -> Path:
    """A run folder with the files that tell whether the run has finished."""
    path.mkdir(parents=True)
    (path / "config.yaml").touch()
    if finished:
        (path / "result.json").touch()
    return path


def test_runs_of_one_second_get_folders_of_their_own(here: Path) -> None:
    assert [default_folder(name).name for name in ("a", "a", "b", "a")] == [
        *("a-20250101-000000", "a-20250101-000000-2", "b-20250101-000000", "a-20250101-000000-3"),
    ]
    assert len(list((here / RUNS).iterdir())) == 4


def test_the_newest_unfinished_run_of_exactly_that_name_is_found(here: Path) -> None:
    """Numbers of one second are compared as numbers. Finished runs, other names and folders without settings are no candidates."""
    for name in ("20240101-000000", "20250101-000000", "20250101-000000-2", "20250101-000000-10"):
        begun(RUNS / f"a-{name}")
    begun(RUNS / "a-20260101-000000", finished=True)
    begun(RUNS / "a-b-20260101-000000")
    begun(RUNS / "a-copy")
    (RUNS / "a-20270101-000000").mkdir()
    assert unfinished_folder("a") == RUNS / "a-20250101-000000-10"
    assert unfinished_folder("a-b") == RUNS / "a-b-20260101-000000"
    (RUNS / "a-20250101-000000-10" / "result.json").touch()
    assert unfinished_folder("a") == RUNS / "a-20250101-000000-2"


@pytest.mark.parametrize("name", ["a", "a.c"])
def test_without_an_unfinished_run_the_remedy_is_named(name: str, here: Path) -> None:
    """A name is no pattern: ``a.c`` is not ``abc``."""
    with pytest.raises(RunError, match=f"runs/{re.escape(name)}-.*: no unfinished run to resume; name the folder with --output"):
        unfinished_folder(name)
    begun(RUNS / "abc-20250101-000000")
    begun(RUNS / "a-20250101-000000", finished=True)
    with pytest.raises(RunError, match="no unfinished run to resume"):
        unfinished_folder(name)


def test_a_new_run_writes_to_a_new_or_empty_folder_only(tiny: Experiment, tmp_path: Path) -> None:
    """Drafts that a crash left begin with a dot and do not count."""
    check_folder(tmp_path / "new", tiny, resume=False)
    check_folder(tmp_path, tiny, resume=False)
    (tmp_path / ".draft").touch()
    check_folder(tmp_path, tiny, resume=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match="the run folder is not empty; choose another --output, or continue the run with --resume"):
        check_folder(tmp_path, tiny, resume=False)
    with pytest.raises(RunError, match=r"notes.txt is a file; choose another folder"):
        check_folder(tmp_path / "notes.txt" / "run", tiny, resume=False)
    assert not (tmp_path / "new").exists()


def test_only_a_run_with_the_same_settings_is_resumed(tiny: Experiment, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.yaml, so there is no run to resume; omit --resume"):
        check_folder(tmp_path, tiny, resume=True)
    (tmp_path / "config.yaml").write_text(tiny.to_yaml())
    check_folder(tmp_path, tiny, resume=True)
    with pytest.raises(RunError, match=r"cannot resume with different settings .*\n  - seed: 0 and 1$"):
        check_folder(tmp_path, tiny.model_copy(update={"seed": 1}), resume=True)


def test_a_runs_settings_hold_the_fingerprint_of_its_model(tiny: Experiment, tmp_path: Path) -> None:
    own = fingerprint_of(tiny.model)
    assert known_model(None, tiny, force=False).model.fingerprint == own
    (tmp_path / "config.yaml").write_text(tiny.with_fingerprint(own).to_yaml())
    assert known_model(tmp_path, tiny, force=False).model.fingerprint == own
    (tmp_path / "config.yaml").write_text(tiny.with_fingerprint("0" * 16).to_yaml())
    with pytest.raises(RunError, match=f"is not the model that the run started with \\(fingerprint then 0{{16}}, now {own}\\)"):
        known_model(tmp_path, tiny, force=False)
    assert known_model(tmp_path, tiny.with_fingerprint("0" * 16), force=True).model.fingerprint == own


def test_settings_and_samples_are_written_once_and_again_when_resuming(tiny: Experiment, federation: FederatedData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert open_folder(folder, "x", tiny, federation, resume=False) == folder
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert Experiment.load(folder / "config.yaml") == tiny
    assert json.loads(files["manifest.json"]) == manifest(federation, tiny.federation.scenario, tiny.seed)
    with pytest.raises(RunError, match="another run has just started there; choose another --output"):
        open_folder(folder, "x", tiny, federation, resume=False)
    open_folder(folder, "x", tiny, federation, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_changed_sample_of_a_client_is_named_when_resuming(tiny: Experiment, federation: FederatedData, tmp_path: Path) -> None:
    """A manifest without digests, which a crash or an older version left, is replaced."""
    open_folder(tmp_path, "x", tiny, federation, resume=False)
    client, samples = next(iter(federation.clients.items()))
    other = replace(federation, clients={**federation.clients, client: (replace(samples[0], answer="?"), *samples[1:])})
    with pytest.raises(RunError, match=rf"1 sample\(s\) differ; .*\n  - {client}: {samples[0].id} has different content$"):
        open_folder(tmp_path, "x", tiny, other, resume=True)
    for broken in ({"clients": [], "test": {"num_samples": 4}}, None):
        (tmp_path / "manifest.json").unlink() if broken is None else (tmp_path / "manifest.json").write_text(json.dumps(broken))
        open_folder(tmp_path, "x", tiny, other, resume=True)
        assert "samples" in json.loads((tmp_path / "manifest.json").read_text())["test"]


def test_a_used_folder_is_not_overwritten(finished: Path, tiny: Experiment) -> None:
    with pytest.raises(RunError, match="is not empty"):
        train(tiny, finished)


def test_resuming_with_other_settings_is_refused(finished: Path) -> None:
    changed = change(Experiment.load(finished / "config.yaml"), training={"learning_rate": 0.5})
    with pytest.raises(RunError, match=r"training\.learning_rate: 0\.001 and 0\.5"):
        train(changed, finished, resume=True)


@pytest.mark.parametrize("file", ["train.csv", "test.csv", "a.png"])
def test_resuming_with_other_data_is_refused(file: str, tmp_path: Path) -> None:
    """A row of either split or a picture changes between two sessions. The run's manifest does not change."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("p,t,a\n" + "".join(f"a.png,{split} {i},{'yes' if i % 2 else 'no'}\n" for i in range(8)))
    columns = {"image": "p", "text": "t", "answer": "a"}
    options = {"train": "train.csv", "test": "test.csv", "columns": columns, "question": "Is it?", "choices": ["no", "yes"]}
    experiment = Experiment.parse(
        {
            "data": {"dataset": "csv", "root": str(tmp_path), "options": options},
            "federation": {"num_clients": 1, "clients_per_round": 1, "num_rounds": 2, "partition": "iid"},
            "evaluation": {"every": 0, "baselines": []},
            "engine": {"device": "cpu"},
        }
    )

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "run", observer=Observer(round_done=stop))
    before, content = (tmp_path / "run" / "manifest.json").read_bytes(), (tmp_path / file).read_bytes()
    if file == "a.png":
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    else:
        (tmp_path / file).write_text((tmp_path / file).read_text().replace(" 5,", " five,"))
    expected = (
        r"16 sample\(s\) differ"
        if file == "a.png"
        else r"1 sample\(s\) differ; .*\n  - (client-00|test): (train|test)-7 has different content$"
    )
    with pytest.raises(RunError, match=expected):
        train(experiment, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    (tmp_path / file).write_bytes(content)
    train(experiment, tmp_path / "run", resume=True)


def test_nothing_to_resume(tmp_path: Path, tiny: Experiment) -> None:
    with pytest.raises(RunError, match="there is no run to resume"):
        train(tiny, tmp_path / "none", resume=True)


def test_a_run_resumes_on_its_own_base_model_only(tiny: Experiment, other_base: Path, tmp_path: Path) -> None:
    """The content of the model's folder changed after the run started."""
    base = Path(shutil.copytree(model_source("nano"), tmp_path / "base"))
    experiment = change(tiny, model={"name": str(base)})

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "run", observer=Observer(round_done=stop))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    shutil.copy(other_base / "model.safetensors", base)
    with pytest.raises(RunError, match="is not the model that the run started with"):
        train(experiment, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    train(experiment, tmp_path / "run", resume=True, force=True)
    score_adapter(tmp_path / "run")
