"""Plugins: a file outside the package can add everything that settings choose from, in every process that reads the settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedmllm import registry
from fedmllm.algorithms import ALGORITHMS, STRATEGIES
from fedmllm.api import train
from fedmllm.cli.main import app
from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS
from fedmllm.data.datasets.base import HEADLINES
from fedmllm.data.quality import PARTS
from fedmllm.data.scenarios import SCENARIOS
from fedmllm.engine.schedules import SCHEDULES
from fedmllm.errors import ConfigError
from fedmllm.evaluation.metrics import METRICS
from fedmllm.flower.settings import SiteConfig
from fedmllm.models.families import FAMILIES
from fedmllm.run.resident import Resident
from fedmllm.run.tracking import TRACKERS
from fedmllm.run.worker import Worker
from fedmllm.sites.client import SiteWorker
from fedmllm.sweeps.code_version import plugin_version
from fedmllm.sweeps.grid import cells, load_grid
from fedmllm.sweeps.runner import open_sweep, run_sweep
from tiny_families import folder_of

PLUGIN = '''
"""Half a step. Nobody, nowhere, 2026."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

import fedmllm
from fedmllm import weights as W
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.strategies import Strategy
from fedmllm.data.datasets import DATASETS
from fedmllm.data.datasets.base import DatasetEntry
from fedmllm.data.scenarios import Scenario
from fedmllm.data.quality import PartEntry
from fedmllm.engine.schedules.synchronous import Synchronous
from fedmllm.models.families.generic import ModelFamily
from fedmllm.training.terms import LossTerm


@fedmllm.register_method("half_step")
@dataclass(frozen=True)
class HalfStep(FedAvg):
    """FedAvg that takes a share of each step."""

    share: float = 0.5

    def server_step(self, state, aggregate):
        return state.after(W.add(state.weights, aggregate.update, self.share))


@dataclass(frozen=True)
class Ridge(LossTerm):
    weight: float

    def value(self, now, received, progress):
        return self.weight * torch.stack([tensor.square().sum() for tensor in now.values()]).sum()


@fedmllm.register_strategy("ridge")
@dataclass(frozen=True)
class RidgeStrategy(Strategy):
    """Pulls weights to zero."""

    weight: float = 0.1

    def rule(self, rule, broadcast, client):
        return rule.with_term(Ridge(self.weight))


@fedmllm.register_schedule("as_usual")
@dataclass(frozen=True)
class AsUsual(Synchronous):
    """The synchronous schedule."""


def upper(sample, others, strength, rng):
    return replace(sample, content={**sample.content, "text": sample.content["text"].upper()})


fedmllm.register_corruption("shouted", PartEntry(upper, ("text",), "capital letters", 1, (1, 1)))
fedmllm.register_dataset("my-claims", DatasetEntry("claims again", lambda request: DATASETS["digits-claims"].load(request)))
fedmllm.register_scenario("everything", Scenario(lambda setting: lambda client, sample: tuple(sample.content), "all of it", "", "nothing", lambda level: False))
fedmllm.register_family("mine", ModelFamily())


@fedmllm.register_metric("answered")
def answered(predictions):
    return sum(p.answer is not None for p in predictions) / len(predictions)


@fedmllm.register_headline("sure")
def sure(prediction):
    """The probability of the correct option."""
    return prediction.probabilities[prediction.sample.label]


@fedmllm.register_tracker("lines")
@contextmanager
def lines(folder, experiment, name):
    with (folder / "lines.txt").open("a") as file:
        yield lambda numbers, round_num: print(json.dumps([round_num, len(numbers)]), file=file)
'''
INDEXES: dict[str, dict[str, Any]] = {
    **{"method": ALGORITHMS, "strategy": STRATEGIES, "schedule": SCHEDULES, "dataset": DATASETS, "family": FAMILIES},
    **{"scenario": SCENARIOS, "heterogeneity": PARTS, "metric": METRICS, "headline": HEADLINES, "tracker": TRACKERS},  # type: ignore[dict-item]
}
NAMES = {
    **{"method": "half_step", "strategy": "ridge", "schedule": "as_usual", "dataset": "my-claims", "family": "mine"},
    **{"scenario": "everything", "heterogeneity": "shouted", "metric": "answered", "headline": "sure", "tracker": "lines"},
}


@pytest.fixture(autouse=True)
def restore_indexes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {kind: dict(rows) for kind, rows in INDEXES.items()}
    for name in ("_ORIGINS", "_LOADED"):
        monkeypatch.setattr(registry, name, {})
    monkeypatch.setattr(registry, "_ALLOWED", [])
    modules = set(sys.modules)
    plugin_version.cache_clear()
    registry.installed_plugins.cache_clear()
    yield
    for kind, rows in INDEXES.items():
        rows.clear()
        rows.update(before[kind])
    for name in set(sys.modules) - modules:
        if not name.startswith(("fedmllm", "torch", "transformers")):
            del sys.modules[name]
    plugin_version.cache_clear()
    registry.installed_plugins.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


SECTIONS: dict[str, Any] = {
    "data": {"dataset": "digits-claims", "num_train": 30, "num_test": 8, "check_images": False},
    "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 2, "partition": "iid", "min_partition_size": 3},
    "training": {"batch_size": 4, "learning_rate": 3e-3},
    "evaluation": {"every": 0, "baselines": []},
    "engine": {"device": "cpu"},
}


def write_experiment(folder: Path, **sections: Any) -> Path:
    values = {"plugins": ["mine.py"], "model": {"name": folder_of("llava")}, "algorithm": {"name": "half_step"}, **SECTIONS, **sections}
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    return folder / "own.yaml"


def load_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_can_use_everything_that_a_file_adds(folder: Path) -> None:
    """The file's path is relative to the experiment's file, and absolute in the run's saved settings."""
    file = write_experiment(
        folder,
        algorithm={"name": "half_step", "parameters": {"share": 0.25}, "strategies": ["ridge"]},
        schedule={"name": "as_usual"},
        data=SECTIONS["data"] | {"dataset": "my-claims"},
        federation=SECTIONS["federation"] | {"scenario": "everything", "heterogeneity": ["shouted"]},
    )
    experiment = Experiment.load(file)
    assert experiment.plugins == (str(folder / "mine.py"),)
    result = train(experiment, folder / "run", track=["lines"])
    assert all(name in INDEXES[kind] and registry.origin_of(kind, name) == "mine" for kind, name in NAMES.items())
    assert result.details["federated"]["answered"] == 1.0
    assert len((folder / "run" / "lines.txt").read_text().splitlines()) == 2
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["plugins"] == [str(folder / "mine.py")]
    assert train(experiment, folder / "run", resume=True).scores == result.scores


def test_a_headline_score_of_a_file_scores_a_run(folder: Path) -> None:
    added = 'fedmllm.register_dataset("sure-claims", DatasetEntry("", lambda r: replace(DATASETS["digits-claims"].load(r), metric="sure")))'
    (folder / "mine.py").write_text(PLUGIN + added)
    file = write_experiment(folder, data=SECTIONS["data"] | {"dataset": "sure-claims"}, evaluation={"every": 1, "baselines": ["local"]})
    result = train(Experiment.load(file), folder / "run")
    asked = json.loads((folder / "run" / "predictions.json").read_text())
    details = result.details["federated"]
    assert (result.metric, asked["metrics"], set(asked["truth"])) == ("sure", ["sure"], {1})
    assert result.scores["federated"] == details["score"] == pytest.approx(sum(asked["guesses"][0]) / 8)
    assert result.standard_errors["federated"] > 0
    assert 0 < result.scores["local_mean"] < 1
    # The options are classes, so these are reported as always.
    assert {"accuracy", "balanced_accuracy", "macro_f1"} <= details.keys()
    assert "sure" in (folder / "run" / "report.html").read_text()


def test_a_files_method_is_used(folder: Path) -> None:
    """With one client and one round it takes half of FedAvg's step."""
    federation = SECTIONS["federation"] | {"num_clients": 1, "clients_per_round": 1, "num_rounds": 1}
    half, whole = (
        Experiment.load(write_experiment(folder, federation=federation)),
        Experiment.load(write_experiment(folder, federation=federation, algorithm={"name": "fedavg"})),
    )
    resident = Resident()
    for name, experiment in (("half", half), ("whole", whole)):
        train(experiment, folder / name, resident=resident, report=False)
    first, second = load_adapter_weights(folder / "half"), load_adapter_weights(folder / "whole")
    b = next(key for key in first if "lora_B" in key)
    torch.testing.assert_close(first[b], second[b] / 2)


def test_a_worker_imports_the_plugins_in_its_settings(folder: Path) -> None:
    """A new process in another folder."""
    settings = Experiment.load(write_experiment(folder)).to_yaml()
    code = (
        "import sys; from fedmllm.run.worker import Worker; e = Worker().experiment(sys.stdin.read()); "
        "from fedmllm.algorithms import build_algorithm; print(build_algorithm(e.algorithm).share)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=settings, cwd="/", capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.strip() == "0.5", done.stderr
    assert isinstance(Worker().experiment(settings), Experiment)


@pytest.mark.slow
def test_a_plugins_method_trains_the_same_on_ray(folder: Path) -> None:
    pytest.importorskip("ray")
    ends = []
    for engine in ("in_process", "flower"):
        experiment = Experiment.load(write_experiment(folder), [f"engine.name={engine}", "engine.parallel_clients=1"])
        train(experiment, folder / engine, report=False)
        ends.append(load_adapter_weights(folder / engine))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-5, rtol=0)


GRID = {
    "methods": {"half": {"algorithm": {"name": "half_step"}}, "fedavg": {"algorithm": {"name": "fedavg"}}},
    **{"scenarios": ["aligned-5.0"], "datasets": {"claims": {}}, "seeds": [0], "baselines": []},
}


def grid(folder: Path) -> Path:
    base = SECTIONS | {"federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 1, "min_partition_size": 3}}
    values = GRID | {"base": base | {"plugins": ["mine.py"]}, "models": {"tiny": {"model": {"name": folder_of("llava")}}}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(values))
    return folder / "grid.yaml"


def test_a_cells_key_depends_on_its_plugins_code(folder: Path) -> None:
    """Neither its comments nor its location count."""
    keys = [cell.key for cell in cells(load_grid(grid(folder)))]
    assert plugin_version((str(folder / "mine.py"),))
    plugin_version.cache_clear()
    (folder / "mine.py").write_text(PLUGIN + "\n# a comment\n")
    assert [cell.key for cell in cells(load_grid(grid(folder)))] == keys
    plugin_version.cache_clear()
    (folder / "mine.py").write_text(PLUGIN.replace("share: float = 0.5", "share: float = 0.4"))
    assert not {cell.key for cell in cells(load_grid(grid(folder)))} & set(keys)


def test_a_cells_key_does_not_depend_on_other_plugins(folder: Path) -> None:
    (folder / "other.py").write_text("")
    alone = plugin_version((str(folder / "mine.py"),))
    registry.load_plugins([str(folder / "other.py")])
    plugin_version.cache_clear()
    assert plugin_version((str(folder / "mine.py"),)) == alone


@pytest.mark.slow
def test_a_parallel_sweep_trains_a_plugins_method(folder: Path) -> None:
    whole = load_grid(grid(folder))
    open_sweep(whole, folder / "sweep")
    outcomes = run_sweep(cells(whole), folder / "sweep", jobs=2, threads=1)
    assert [outcome.error for outcome in outcomes] == [""] * 2 or all(outcome.score is not None for outcome in outcomes), outcomes


def test_a_site_imports_only_the_plugins_in_its_own_settings(folder: Path, tmp_path: Path) -> None:
    settings = Experiment.load(write_experiment(folder, model={"name": "nano"})).to_yaml()
    registry._LOADED.clear()
    for name, rows in INDEXES.items():
        rows.pop(NAMES[name], None)
    registry._ORIGINS.clear()
    sys.modules.pop("mine")
    requested = yaml.safe_load(settings) | {"plugins": [str(folder / "mine.py")]}
    (folder / "site.yaml").write_text(yaml.safe_dump({"name": "client-00", "server": "127.0.0.1:9092"}))
    with pytest.raises(ConfigError, match="'half_step' is not a known method"):
        SiteWorker(SiteConfig.load(folder / "site.yaml")).experiment(yaml.safe_dump(requested))
    assert "mine" not in sys.modules
    (folder / "site.yaml").write_text(yaml.safe_dump({"name": "client-00", "server": "127.0.0.1:9092", "plugins": ["mine.py"]}))
    assert SiteWorker(SiteConfig.load(folder / "site.yaml")).experiment(yaml.safe_dump(requested)).algorithm.name == "half_step"


def test_a_restricted_process_imports_no_other_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: pytest.fail("installed plugins are not imported at a site"))
    registry.restrict([])
    with pytest.raises(ConfigError, match=r"mine.py' is not in this site's own settings"):
        Experiment.load(write_experiment(folder))


def test_installed_plugins_need_not_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", "mine", group)])
    assert Experiment.parse({"algorithm": {"name": "half_step"}}).plugins == ()
    assert plugin_version(())


def test_the_listing_shows_a_methods_origin(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["methods", "--json", "--plugin", str(folder / "mine.py")])
    rows = json.loads(shown.output)
    assert rows["methods"]["half_step"]["origin"] == rows["strategies"]["ridge"]["origin"] == "mine"
    assert (rows["methods"]["half_step"]["parameters"], rows["strategies"]["ridge"]["changes"]) == ({"share": 0.5}, ["client"])
    assert "origin" not in rows["methods"]["fedavg"]
    assert "from        mine" in CliRunner().invoke(app, ["methods", "--plugin", str(folder / "mine.py")]).output


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("raise ValueError('broken')", "mine.py cannot be imported: ValueError: broken"),
        (
            "import fedmllm\nfedmllm.register_method('fedavg')(fedmllm.algorithms.fedavg.FedAvg)",
            "registers method 'fedavg', but fedmllm already has one",
        ),
        ("import fedmllm\n@fedmllm.register_method('m')\nclass M: ...", "M must be a frozen dataclass"),
        (
            "import fedmllm\nfrom dataclasses import dataclass\nfrom fedmllm.algorithms.fedavg import FedAvg\n"
            "@fedmllm.register_method('m')\n@dataclass(frozen=True)\nclass M(FedAvg):\n    kind: str = 'lora'",
            "M.kind describes the class and is not a hyperparameter; write it without an annotation",
        ),
        (
            "import fedmllm\nfrom dataclasses import dataclass\nfrom fedmllm.algorithms.fedavg import FedAvg\n"
            "@fedmllm.register_method('m')\n@dataclass(frozen=True)\nclass M(FedAvg):\n    mu: float",
            "M.mu needs a default",
        ),
        ("import fedmllm\nfedmllm.register_metric('My Metric')(len)", "'My Metric' cannot name a metric"),
        (
            "import fedmllm\nfedmllm.register_scenario('all-of-it', None)",
            "'all-of-it' cannot name a scenario; use lowercase letters, digits, _ and .",
        ),
        (
            "import fedmllm\nfedmllm.register_metric('accuracy')(len)",
            "mine registers metric 'accuracy', but fedmllm already has one; choose another name",
        ),
        ("import fedmllm\nfedmllm.register_metric('score_mine')(len)", "'score_mine' cannot name a metric"),
        ("import fedmllm\nfedmllm.register_headline('auc')(len)", "mine registers headline 'auc', but fedmllm already has one"),
        ("import fedmllm\nfedmllm.register_corruption('blur2', None)", "'blur2' cannot name a heterogeneity; use lowercase letters and _"),
    ],
)
def test_an_invalid_plugin_is_a_settings_error(folder: Path, code: str, part: str) -> None:
    (folder / "mine.py").write_text(code)
    done = CliRunner().invoke(app, ["data", "show", str(write_experiment(folder))], catch_exceptions=True)
    assert isinstance(done.exception, ConfigError)
    assert part in str(done.exception)
    assert "mine" not in sys.modules


def test_early_registrations_cannot_replace_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_INDEXES", {})
    monkeypatch.setattr(registry, "_WAITING", {})
    registry.register("metric", "early", len)
    assert registry.index("metric", {"accuracy": max}) == {"accuracy": max, "early": len}
    registry.register("method", "fedavg", len)
    with pytest.raises(ConfigError, match="builtins registers method 'fedavg', but fedmllm already has one; choose another name"):
        registry.index("method", {"fedavg": max})


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_packages_methods_have_only_intended_hyperparameters(name: str) -> None:
    from fedmllm.algorithms.base import ServerAverage

    registry.require_hyperparameters(ALGORITHMS[name], tuple(ServerAverage.__annotations__))


def test_a_missing_plugin_is_named_with_a_remedy(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.py is not a file; give its path relative to the experiment's file"):
        Experiment.load(write_experiment(folder, plugins=["gone.py"]))
    with pytest.raises(ConfigError, match="plugins: no_such_module cannot be imported: ModuleNotFoundError"):
        Experiment.load(write_experiment(folder, plugins=["no_such_module"]))
