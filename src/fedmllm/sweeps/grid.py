"""A grid of experiments in one file: the product of methods, scenarios, datasets, models and seeds, plus additional rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedmllm.config import Experiment
from fedmllm.data.fingerprint import content_key
from fedmllm.errors import ConfigError, listing
from fedmllm.evaluation.evaluate import EvaluationConfig
from fedmllm.explain import rule
from fedmllm.models.source import NANO_FOLDER, model_source
from fedmllm.registry import resolved
from fedmllm.settings_file import GRID, read_settings
from fedmllm.sweeps.code_version import code_version, plugin_version

Sections = dict[str, Any]
"""Sections of an experiment with some of their settings."""


def _named(*place: str) -> BeforeValidator:
    """Return a validator that expands a list of names to a mapping from each name to the sections that select it."""

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
    """Additional methods on a subset of the grid. A list that is left out means all of the grid's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    methods: Methods = Field(min_length=1)
    """The methods' sections by the name to print; or a list of method names, for their defaults."""
    scenarios: tuple[str, ...] = ()
    """Scenarios of the grid."""
    datasets: tuple[str, ...] = ()
    """Names of datasets of the grid."""
    models: tuple[str, ...] = ()
    """Names of models of the grid."""
    seeds: tuple[int, ...] = ()
    """Seeds of the grid."""


class Grid(BaseModel):
    """A sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: Sections = {}
    """Sections that all experiments share."""
    methods: Methods = Field(min_length=1)
    """The methods' sections by the name to print, e.g. ``{FedProx: {algorithm: {name: fedprox}}}``; or a list of method names. The first method is the
    reference for comparisons."""
    scenarios: tuple[str, ...] = Field(min_length=1)
    """Scenarios."""
    datasets: Datasets = Field(min_length=1)
    """The datasets' sections by the name to print; or a list of dataset names."""
    models: Models = {"nano": {}}
    """The models' sections by the name to print; or a list of model names."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds."""
    baselines: tuple[str, ...] = EvaluationConfig.model_fields["baselines"].default
    """Baselines, trained once for each scenario, dataset, model and seed, in the run of the first method."""
    rows: tuple[Rows, ...] = ()
    """Additional methods on a subset of the grid."""
    published: dict[str, dict[str, tuple[float, ...]]] = {}
    """Published results in percent, to print below the grid's own: by dataset and method, one number per scenario in the order of the scenarios."""

    @model_validator(mode="after")
    def _parts_are_of_the_grid(self) -> Grid:
        for rows in self.rows:
            for name in ("scenarios", "datasets", "models", "seeds"):
                if unknown := set(getattr(rows, name)) - set(getattr(self, name)):
                    raise ValueError(f"rows: {name} {sorted(unknown)} are not in the grid, which has {list(getattr(self, name))}")
            if twice := rows.methods.keys() & self.methods.keys():
                raise ValueError(f"rows: {sorted(twice)} are already methods of the grid; rename or remove them")
        for dataset, methods in self.published.items():
            if dataset not in self.datasets:
                raise ValueError(f"published: {dataset!r} is not a dataset of the grid, which has {list(self.datasets)}")
            for method, numbers in methods.items():
                if len(numbers) != len(self.scenarios):
                    raise ValueError(f"published: {dataset}: {method}: {len(numbers)} numbers for {len(self.scenarios)} scenarios")
        return self


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid, with the grid's names for its model, dataset, scenario and method."""

    model: str
    dataset: str
    seed: int
    scenario: str
    method: str
    experiment: Experiment
    content: str = ""
    """Digest of the local files of model and data; see ``content_key``."""

    @property
    def labels(self) -> dict[str, str | int]:
        """The cell's model, dataset, seed, scenario and method by these names."""
        return {name: getattr(self, name) for name in ("model", "dataset", "seed", "scenario", "method")}

    @cached_property
    def key(self) -> str:
        """The name of the cell's folder: a digest of its complete settings, of the code that results depend on, and of the files of model and data."""
        # Plugins count by what is in them, not by where they are.
        settings = self.experiment.model_copy(update={"plugins": tuple(Path(name).name for name in self.experiment.plugins)})
        return hashlib.sha256(
            f"{settings.to_yaml()}{code_version()}{plugin_version(self.experiment.plugins)}{self.content}".encode()
        ).hexdigest()[:16]


def load_grid(path: Path) -> Grid:
    """Read a grid from YAML.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has invalid settings.
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
    """Return the names of a grid's methods, models, datasets, scenarios and seeds in its order, and the published results."""
    methods = [*grid.methods, *(name for rows in grid.rows for name in rows.methods)]
    parts = {"models": grid.models, "datasets": grid.datasets, "scenarios": grid.scenarios, "seeds": grid.seeds}
    published = {
        dataset: {method: dict(zip(grid.scenarios, numbers, strict=True)) for method, numbers in rows.items()}
        for dataset, rows in grid.published.items()
    }
    return {"methods": list(dict.fromkeys(methods)), **{name: list(values) for name, values in parts.items()}, "published": published}


def cells(grid: Grid) -> list[Cell]:
    """Return all experiments. Those with the same model, data and seed are adjacent.

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
        raise ConfigError(f"{len(problems)} experiment(s) of the grid have invalid settings:\n{listing(problems)}")
    return found


def _sources(experiment: Experiment) -> tuple[Path, ...]:
    """Return the local folders and files of model and data, without the embedded model, which counts as code."""
    model = Path(model_source(experiment.model.name))
    named = (*experiment.data.sources, *(() if model == NANO_FOLDER else (model,)))
    return tuple(path for path in named if path.exists())


def _products(grid: Grid) -> Iterator[tuple[dict[str, Any], Sections]]:
    """Yield names and merged sections of every cell."""
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
    """Merge sections of several layers. A setting comes from the last layer that has it."""
    result: Sections = {}
    for layer in layers:
        for name, value in layer.items():
            result[name] = {**result.get(name, {}), **value} if isinstance(value, Mapping) else value
    return result
