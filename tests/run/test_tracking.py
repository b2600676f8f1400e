"""The values that trackers receive, TensorBoard's files read back, and refused settings."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.run.tracking import TRACKERS, Log, numbers, require_trackers, tracked

RECORD = {
    **{"stage": "federated", "round": 3, "clients": ["a", "b"], "score": 0.5, "scores": {"score": 0.5, "failures": 2, "auc_hard": 0.25}},
    **{"loss": float("nan"), "learning_rate": 1e-3, "bytes_up": 8, "refused": [{"client": "a", "reason": "not finite"}]},
    "seconds": {"train": 2.0},
}


def test_a_round_as_numbers() -> None:
    """Values that are not finite are left out; refused updates are counted."""
    expected = {
        "score": 0.5,
        "failures": 2.0,
        "auc_hard": 0.25,
        "learning_rate": 1e-3,
        "bytes_up": 8.0,
        "refused": 1.0,
        "halvings": 0.0,
        "skipped": 0.0,
        "seconds_train": 2.0,
    }
    assert numbers(RECORD) == {f"federated/{name}": value for name, value in expected.items()}
    values = numbers(RECORD | {"losses": {"a": 0.5, "b": float("nan")}})
    assert values["federated/loss of a"] == 0.5
    assert values.keys() - numbers(RECORD).keys() == {"federated/loss of a"}
    assert "federated/loss of 0" not in numbers(RECORD | {"losses": {str(i): 0.5 for i in range(51)}})
    zero_shot = {"stage": "zero_shot", "round": 0, "score": 0.25, "scores": {"score": 0.25}, "seconds": {"evaluate": 1.0}}
    assert numbers(zero_shot) == {"zero_shot/score": 0.25, "zero_shot/seconds_evaluate": 1.0}


def test_tensorboard_reads_what_a_run_wrote(tiny: Experiment, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    experiment = tiny.model_copy(update={"evaluation": tiny.evaluation.model_copy(update={"baselines": ("zero_shot",)})})
    result = train(experiment, tmp_path / "run", track=["tensorboard"], report=False)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scores, validation = read.Scalars("federated/score"), read.Scalars("federated/validation score")
    assert [event.step for event in scores] == [2]
    assert [event.step for event in validation] == [1, 2]
    assert validation[-1].value == pytest.approx(result.validation["score"], abs=1e-6)
    assert scores[-1].value == pytest.approx(result.scores["federated"], abs=1e-6)
    assert [event.step for event in read.Scalars("zero_shot/score")] == [0]
    assert all(math.isfinite(event.value) for event in read.Scalars("federated/loss"))
    assert "missing-0.3" in read.Tensors("experiment/text_summary")[0].tensor_proto.string_val[0].decode()


def test_an_interruption_waits_until_the_round_is_tracked(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt while a tracker holds its lock would leave its thread, and so the process, waiting forever."""
    written: list[int] = []

    @contextmanager
    def slow(*settings: object) -> Iterator[Log]:
        def log(values: Mapping[str, float], round_num: int) -> None:
            signal.raise_signal(signal.SIGINT)
            written.append(round_num)

        yield log

    monkeypatch.setitem(TRACKERS, "tensorboard", slow)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), tracked(["tensorboard"], tmp_path, tiny, "tiny") as tell:
        tell(RECORD)
    assert written == [3]
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_tracked_by_default(tiny: Experiment, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", report=False)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_weights_and_biases_offline(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: make test-tracking")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with tracked(["wandb"], tmp_path, tiny, "tiny") as tell:
        tell(RECORD)
        tell({**RECORD, "stage": "centralized", "round": 1})
        summary, project = dict(wandb.run.summary), wandb.run.project
        assert wandb.run.config["federation.scenario"] == "missing-0.3"
    assert (summary["federated/score"], summary["centralized/auc_hard"], summary["round"], project) == (0.5, 0.25, 1, "fedmllm")
    assert wandb.run is None
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from MLflow's use of SQLAlchemy
def test_mlflow_in_a_folder(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: make test-tracking")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracked(["mlflow"], tmp_path, tiny, "tiny") as tell:
        tell(RECORD)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics["federated/score"] == 0.5
    assert run.data.params["federation.scenario"] == "missing-0.3"


def test_unknown_and_missing_trackers_are_refused_before_anything_is_written(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'tensorbord' is not a tracker; use tensorboard, wandb, mlflow or none"):
        train(tiny, tmp_path / "run", track=["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(ConfigError, match=f"{name} is not installed; run pip install {name}, or choose another tracker or none"):
            require_trackers([name])
    assert not (tmp_path / "run").exists()
