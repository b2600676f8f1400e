"""One file says the whole experiment: the rooms' own configurations composed, loaded, overridden, checked and saved."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmllm.algorithms import ALGORITHMS, STRATEGIES, AlgorithmConfig, build_algorithm
from fedmllm.data.settings import DataConfig, FederationConfig
from fedmllm.engine.compression import CompressionConfig
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.schedules import SchedulingConfig, build_schedule
from fedmllm.engine.settings import EngineConfig
from fedmllm.errors import ConfigError, listing
from fedmllm.evaluation.evaluate import EvaluationConfig
from fedmllm.explain import rule
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.registry import load_plugins, resolved
from fedmllm.settings_file import Path_, read_settings
from fedmllm.training.settings import TrainingConfig

_FINGERPRINT = ("model", "fingerprint")
_LOG = logging.getLogger(__name__)
RENAMED: dict[Path_, str] = {("engine", "together"): "parallel_clients"}
"""Former names of settings, which experiments may still use, with their current names in the same section."""


class Experiment(BaseModel):
    """Everything a run depends on. Immutable; ``load`` reads it from YAML, ``to_yaml`` writes it back in full."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    federation: FederationConfig = FederationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    compression: CompressionConfig = CompressionConfig()
    schedule: SchedulingConfig = SchedulingConfig()
    failures: FailureConfig = FailureConfig()
    seed: int = Field(0, ge=0)
    """All random numbers derive from it."""
    plugins: tuple[str, ...] = ()
    """Python files and modules of your own that add methods, datasets and more; a file's path is relative to the experiment's file."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """Replace former names of settings."""
        for (section, former), name in RENAMED.items():
            inner = values.get(section) if isinstance(values, Mapping) else None
            if isinstance(inner, Mapping) and former in inner and name not in inner:
                _tell_renamed(section, former, name)
                values = {**values, section: {name if key == former else key: value for key, value in inner.items()}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _with_plugins(cls, values: Any) -> Any:
        """Import plugins first: the other settings may choose what they add."""
        named = values.get("plugins", ()) if isinstance(values, Mapping) else ()
        if isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named):
            load_plugins(named)
        return values

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a YAML file and apply ``key.path=value`` overrides.

        Raises:
            ConfigError: naming every setting that breaks a rule, with its line or override.
        """
        values, places = read_settings(Path(path))
        given = dict.get(values, "plugins")
        for override in overrides:
            _apply(override, values, places)
        if "plugins" in values:
            values["plugins"] = resolved(values["plugins"], Path(path).parent if values["plugins"] is given else Path())
        return cls.parse(values, places)

    @classmethod
    def from_yaml(cls, text: str) -> Experiment:
        """The opposite of ``to_yaml``.

        Raises:
            ConfigError: naming every setting that breaks a rule.
        """
        return cls.parse(yaml.safe_load(text))

    @classmethod
    def parse(cls, values: Mapping[str, Any], places: Mapping[Path_, str] | None = None) -> Experiment:
        """Check settings given as nested mappings.

        Args:
            values: the sections.
            places: where each setting was written, for error messages.

        Raises:
            ConfigError: naming every setting that breaks a rule.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(detail, places or {}) for detail in error.errors()]
            raise ConfigError(f"the experiment has {len(problems)} error{'s' * (len(problems) > 1)}:\n{listing(problems)}") from None

    @model_validator(mode="after")
    def _epochs_and_baselines(self) -> Experiment:
        for name in ("local", "fine_tuned", "calibrated_local"):
            if self.training.local_epochs == 0 and name in self.evaluation.baselines:
                raise ValueError(f"evaluation.baselines: {name} with training.local_epochs 0 trains nothing; leave one of them out")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Experiment:
        method, cohort = build_algorithm(self.algorithm), self.federation.clients_per_round
        if self.lora.client_ranks and not method.heterogeneous_ranks:
            able = [name for name, cls in ALGORITHMS.items() if cls.heterogeneous_ranks]
            raise ValueError(f"lora.client_ranks: {self.algorithm.name} needs one rank everywhere; leave it out, or use {', '.join(able)}")
        if method.changes_frozen and self.model.quantization != "none":
            raise ValueError(
                f"model.quantization: {self.algorithm.name} adds to the frozen weights, which {self.model.quantization} cannot hold exactly; "
                "use none, or another method"
            )
        if method.changes_frozen and self.lora.dora and self.model.dtype != "float32":
            raise ValueError(
                f"lora.dora: {self.algorithm.name} adds to the frozen weights, which {self.model.dtype} cannot hold exactly and DoRA takes the "
                "length of; set model.dtype to float32, or lora.dora to false"
            )
        build_schedule(self.schedule).require(method, self.algorithm.name, self.federation.num_clients, cohort)
        if cohort < method.smallest_cohort:
            raise ValueError(
                f"federation.clients_per_round: {self.algorithm.name} with these parameters needs {method.smallest_cohort} clients or more "
                f"per round, is {cohort}"
            )
        for name in self.algorithm.strategy_names:
            if STRATEGIES[name].wording not in (None, self.data.prompt):
                raise ValueError(f"data.prompt: algorithm.strategies has {name}, data.prompt is {self.data.prompt}; change one of them")
        return self

    @property
    def updates_per_round(self) -> int:
        """Number of updates that the server steps on: the cohort, or the buffer of a schedule that has one."""
        return build_schedule(self.schedule).updates(self.federation.clients_per_round)

    def with_fingerprint(self, fingerprint: str | None) -> Experiment:
        """The same on one model only, or on any for None."""
        return self.model_copy(update={"model": self.model.model_copy(update={"fingerprint": fingerprint})})

    def to_yaml(self) -> str:
        """The experiment in full, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@cache
def _tell_renamed(section: str, former: str, name: str) -> None:
    """Log a warning, once in a process."""
    _LOG.warning("%s.%s is now called %s.%s; please write the new name", section, former, section, name)


def differences(a: Experiment, b: Experiment) -> list[str]:
    """The settings in which two experiments differ, as ``section.key: value of a, value of b``.

    A fingerprint of the model that only one of them has says nothing about the other.
    """
    left, right = (dict(flattened(e)) for e in (a, b))
    if None in (left[_FINGERPRINT], right[_FINGERPRINT]):
        left[_FINGERPRINT] = right[_FINGERPRINT] = None
    return [
        f"{'.'.join(key)}: {left.get(key)!r} and {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def flattened(experiment: Experiment) -> list[tuple[Path_, Any]]:
    """Every setting by its path of keys."""
    return _flatten(experiment.model_dump(mode="json"))


def _flatten(values: Mapping[str, Any], path: Path_ = ()) -> list[tuple[Path_, Any]]:
    rows: list[tuple[Path_, Any]] = []
    for key, value in values.items():
        rows += _flatten(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return rows


def _apply(override: str, values: dict[str, Any], places: dict[Path_, str]) -> None:
    """Set one ``key.path=value`` in nested values."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r}: write key.path=value, e.g. federation.num_rounds=5")
    path = tuple(key.split("."))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({' '.join(str(error).split())})") from error
    section = values
    for name in path[:-1]:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
        section = inner
    section[path[-1]] = value
    places[path] = f"override {override!r}"


def _explain(detail: Any, places: Mapping[Path_, str]) -> str:
    """One error of pydantic in our words: where, which setting, which value, the rule and the remedy."""
    path = tuple(str(part) for part in detail["loc"])
    known, elsewhere = _known(path)
    text = (
        f"is not a known setting; did you mean {elsewhere}?" if elsewhere and detail["type"] == "extra_forbidden" else rule(detail, known)
    )
    return ": ".join(part for part in (_place(path, text, places), ".".join(path), text) if part)


def _place(path: Path_, text: str, places: Mapping[Path_, str]) -> str:
    """Where the setting was given that an error is about. One of a whole section names settings: an override of one of these is to blame."""
    named = [(*path, word) for word in re.findall(r"\w+", text)]
    named += [tuple(word.split(".")) for word in re.findall(r"\w+\.\w+", text)]
    overridden = [places[name] for name in named if places.get(name, "").startswith("override")]
    written = [places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places]
    exact = [places[path]] if path in places and places[path].startswith("override") else []
    begins = [places[name] for name in named[:1] if name in places]
    return next(iter([*exact, *overridden, *begins, *written]), "")


def _known(path: Path_) -> tuple[list[str], str]:
    """The settings there are beside an unknown one, and another section that has it if none of these is near."""
    model: Any = Experiment
    for name in path[:-1]:
        model = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return [], ""
    known = list(model.model_fields)
    if difflib.get_close_matches(path[-1] if path else "", known, n=1):
        return known, ""
    elsewhere = [
        f"{s}.{path[-1]}" for s, f in Experiment.model_fields.items() if path and path[-1] in getattr(f.annotation, "model_fields", {})
    ]
    return known, elsewhere[0] if elsewhere else ""
