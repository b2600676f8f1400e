"""A grid of experiments in one file: the product of methods, scenarios, datasets, models and seeds, and rows beside it."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

import fedmllm
from fedmllm.config import Experiment
from fedmllm.data.fingerprint import content_key
from fedmllm.errors import ConfigError, listing
from fedmllm.evaluation.evaluate import EvaluationConfig
from fedmllm.explain import rule
from fedmllm.models.load import NANO_FOLDER, model_source
from fedmllm.registry import resolved, sources
from fedmllm.settings_file import GRID, read_settings

Sections = dict[str, Any]
"""Part of an experiment: sections with some of their settings."""
_RUN = "fedmllm.run.train"
"""The module that computes a cell."""
_NO_MATTER = frozenset(
    {"fedmllm.engine.observer", *(f"fedmllm.run.{name}" for name in ("card", "folders", "roll_call", "tracking"))}
    | {f"fedmllm.flower.{name}" for name in ("installed", "run_grid", "settings", "simulation", "superlink")}
)
"""What a run imports to show its numbers, or to reach its clients: none of it changes them."""


def _named(*place: str) -> BeforeValidator:
    """A list of names is short for a mapping of each to the sections that choose it."""

    def sections(name: str) -> Sections:
        value: Any = name
        for key in reversed(place):
            value = {key: value}
        return dict(value)

    def read(values: Any) -> Any:
        if not isinstance(values, Sequence) or isinstance(values, str):
            return values
        return {str(name): sections(name) for name in values}

    return BeforeValidator(read)


Methods = Annotated[dict[str, Sections], _named("algorithm", "name")]
Datasets = Annotated[dict[str, Sections], _named("data", "dataset")]
Models = Annotated[dict[str, Sections], _named("model", "name")]


class Rows(BaseModel):
    """Further methods, on a part of the grid: where a list is left out, on all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    methods: Methods = Field(min_length=1)
    """By name as printed, their sections; a list of names is short for methods at their defaults."""
    scenarios: tuple[str, ...] = ()
    """Of the grid's."""
    datasets: tuple[str, ...] = ()
    """Names of the grid's."""
    models: tuple[str, ...] = ()
    """Names of the grid's."""
    seeds: tuple[int, ...] = ()
    """Of the grid's."""


class Grid(BaseModel):
    """A sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: Sections = {}
    """Sections that all experiments share."""
    methods: Methods = Field(min_length=1)
    """By name as printed, their sections, e.g. ``{FedProx: {algorithm: {name: fedprox}}}``; or a list of names. Others are compared with the first."""
    scenarios: tuple[str, ...] = Field(min_length=1)
    """Scenarios."""
    datasets: Datasets = Field(min_length=1)
    """By name as printed, their sections; or a list of names."""
    models: Models = {"nano": {}}
    """By name as printed, their sections; or a list of names."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds."""
    baselines: tuple[str, ...] = EvaluationConfig.model_fields["baselines"].default
    """Trained once for each scenario, dataset, model and seed, beside the first method."""
    rows: tuple[Rows, ...] = ()
    """Methods beside the grid."""
    published: dict[str, dict[str, tuple[float, ...]]] = {}
    """Numbers of others in percent, to be printed below ours: by dataset and method, one for each scenario in their order."""

    @model_validator(mode="after")
    def _parts_are_of_the_grid(self) -> Grid:
        for rows in self.rows:
            for name in ("scenarios", "datasets", "models", "seeds"):
                if unknown := set(getattr(rows, name)) - set(getattr(self, name)):
                    raise ValueError(f"rows: {name} {sorted(unknown)} are not the grid's; it has {list(getattr(self, name))}")
            if twice := rows.methods.keys() & self.methods.keys():
                raise ValueError(f"rows: {sorted(twice)} are methods of the grid already; rename or remove them")
        for dataset, methods in self.published.items():
            if dataset not in self.datasets:
                raise ValueError(f"published: {dataset!r} is no dataset of the grid; it has {list(self.datasets)}")
            for method, numbers in methods.items():
                if len(numbers) != len(self.scenarios):
                    raise ValueError(f"published: {dataset}: {method}: {len(numbers)} numbers for {len(self.scenarios)} scenarios")
        return self


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid, by the names of what it is made of."""

    model: str
    dataset: str
    seed: int
    scenario: str
    method: str
    experiment: Experiment
    content: str = ""
    """Of the folders of model and data, as far as they are here; see ``content_key``."""

    @property
    def labels(self) -> dict[str, str | int]:
        """The names."""
        return {name: getattr(self, name) for name in ("model", "dataset", "seed", "scenario", "method")}

    @cached_property
    def key(self) -> str:
        """Names the cell's folder: a digest of its settings in full, of the code that computes, and of the files of model and data."""
        # Plugins count by what is in them, not by where they are.
        settings = self.experiment.model_copy(update={"plugins": tuple(Path(name).name for name in self.experiment.plugins)})
        return hashlib.sha256(
            f"{settings.to_yaml()}{code_version()}{plugin_version(self.experiment.plugins)}{self.content}".encode()
        ).hexdigest()[:16]


def load_grid(path: Path) -> Grid:
    """Read a grid from YAML.

    Raises:
        ConfigError: if it is missing, no YAML, or breaks a rule.
    """
    values, _ = read_settings(path, GRID)
    if isinstance(base := values.get("base"), dict) and "plugins" in base:
        base["plugins"] = resolved(base["plugins"], path.parent)
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc']))}: {rule(e, (Rows if 'rows' in e['loc'] else Grid).model_fields)}" for e in error.errors()
        ]
        raise ConfigError(f"{path}: the grid has {len(problems)} error{'s' * (len(problems) > 1)}:\n{listing(problems)}") from None


def names(grid: Grid) -> dict[str, Any]:
    """What a grid is made of, in its order, and what others have published about it."""
    methods = [*grid.methods, *(name for rows in grid.rows for name in rows.methods)]
    parts = {"models": grid.models, "datasets": grid.datasets, "scenarios": grid.scenarios, "seeds": grid.seeds}
    published = {
        dataset: {method: dict(zip(grid.scenarios, numbers, strict=True)) for method, numbers in rows.items()}
        for dataset, rows in grid.published.items()
    }
    return {"methods": list(dict.fromkeys(methods)), **{name: list(values) for name, values in parts.items()}, "published": published}


def cells(grid: Grid) -> list[Cell]:
    """All experiments, those alike in model, data and seed one after another.

    Raises:
        ConfigError: naming the cells whose settings contradict each other.
    """
    found, problems, contents = [], [], dict[tuple[Path, ...], str]()
    for labels, sections in _products(grid):
        try:
            experiment = Experiment.parse(sections)
            if (sources := _sources(experiment)) not in contents:
                contents[sources] = content_key(*sources)
            found.append(Cell(**labels, experiment=experiment, content=contents[sources]))
        except ConfigError as error:
            problems.append(f"{' / '.join(map(str, labels.values()))}: {error}")
    if problems:
        raise ConfigError(f"{len(problems)} experiment(s) of the grid cannot be run:\n{listing(problems)}")
    return found


def _sources(experiment: Experiment) -> tuple[Path, ...]:
    """Folders and files of model and data that are here; the embedded model counts as code."""
    model = Path(model_source(experiment.model.name))
    named = (*experiment.data.sources, *(() if model == NANO_FOLDER else (model,)))
    return tuple(path for path in named if path.exists())


def _products(grid: Grid) -> Iterator[tuple[dict[str, Any], Sections]]:
    """Names and merged sections of every cell."""
    for model, dataset, seed in product(grid.models, grid.datasets, grid.seeds):
        for scenario in grid.scenarios:
            for method, sections in grid.methods.items():
                baselines = list(grid.baselines) if method == next(iter(grid.methods)) else []
                yield _cell(grid, (model, dataset, seed, scenario, method), sections, baselines)
            for rows in grid.rows:
                if all(
                    not chosen or own in chosen
                    for own, chosen in (
                        *((model, rows.models), (dataset, rows.datasets)),
                        *((seed, rows.seeds), (scenario, rows.scenarios)),
                    )
                ):
                    for method, sections in rows.methods.items():
                        yield _cell(grid, (model, dataset, seed, scenario, method), sections, [])


def _cell(grid: Grid, names: tuple[str, str, int, str, str], own: Sections, baselines: list[str]) -> tuple[dict[str, Any], Sections]:
    model, dataset, seed, scenario, _ = names
    last = {"federation": {"scenario": scenario}, "evaluation": {"baselines": baselines}, "seed": seed}
    labels = dict(zip(("model", "dataset", "seed", "scenario", "method"), names, strict=True))
    return labels, merged(grid.base, grid.models[model], grid.datasets[dataset], own, last)


def merged(*layers: Mapping[str, Any]) -> Sections:
    """Sections of several layers, a setting from the last that has it."""
    result: Sections = {}
    for layer in layers:
        for name, value in layer.items():
            result[name] = {**result.get(name, {}), **value} if isinstance(value, Mapping) else value
    return result


@cache
def code_version() -> str:
    """A digest of what scores depend on beside settings and data: the code that a run imports, comments and docstrings left out, and the
    embedded model."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(_meaning(path.read_text(encoding="utf-8")).encode())
    for path in sorted(path for path in NANO_FOLDER.iterdir() if path.suffix != ".md"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def plugin_version(plugins: tuple[str, ...]) -> str:
    """A digest of the plugins' code, installed ones included, as in ``code_version``; empty without any."""
    meanings = [_meaning(path.read_text(encoding="utf-8")) for path in sources(plugins)]
    return hashlib.sha256("".join(meanings).encode()).hexdigest()[:12] if meanings else ""


def code_files() -> list[Path]:
    """The package's modules that a run imports, directly or through others, and all datasets, which are imported by their names."""
    package = Path(fedmllm.__file__).parent
    found: set[Path] = set()
    waiting = [_module_file(_RUN), *sorted((package / "data" / "datasets").rglob("*.py"))]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found.add(path)
            waiting += [_module_file(name) for name in sorted(_imported(path))]
    return sorted(found)


def _imported(path: Path) -> set[str]:
    """Modules of this package that a module imports, inside its functions too; names that are no modules are among them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("fedmllm.") and name not in _NO_MATTER}


def _module_file(name: str) -> Path | None:
    """Where a module's code is; None for a name that is none."""
    place = Path(fedmllm.__file__).parent.joinpath(*name.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _meaning(source: str) -> str:
    """A module without what only people read."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str))
            ]
            node.body = kept  # type: ignore[attr-defined]
    return ast.dump(tree)
