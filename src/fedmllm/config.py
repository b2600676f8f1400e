"""The experiment: the settings of all subpackages in one file, which is loaded, overridden, checked and saved here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmllm.algorithms import AlgorithmConfig
from fedmllm.config_rules import require_method, require_privacy, require_sums
from fedmllm.data.settings import DataConfig, FederationConfig
from fedmllm.engine.compression import CompressionConfig
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.schedules import SchedulingConfig, build_schedule
from fedmllm.engine.settings import EngineConfig
from fedmllm.errors import ConfigError, listing
from fedmllm.evaluation.evaluate import EvaluationConfig
from fedmllm.explain import rule, tell_renamed
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.privacy.settings import PrivacyConfig
from fedmllm.registry import load_plugins, resolved
from fedmllm.settings_file import Path_, read_settings
from fedmllm.training.settings import TrainingConfig

_FINGERPRINT = ("model", "fingerprint")
RENAMED: dict[Path_, str] = {("engine", "together"): "parallel_clients"}
"""Former names of settings, which experiments may still use, with their current names in the same section."""


class Experiment(BaseModel):
    """All settings of a run. Immutable. ``load`` reads them from YAML, and ``to_yaml`` writes them back in full."""

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
    privacy: PrivacyConfig = PrivacyConfig()
    seed: int = Field(0, ge=0)
    """The seed from which all random numbers derive."""
    plugins: tuple[str, ...] = ()
    """Your own Python files and modules that add methods, datasets and more. Paths of files are relative to the experiment's file."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        """Replace former names of settings."""
        for (section, former), name in RENAMED.items():
            inner = values.get(section) if isinstance(values, Mapping) else None
            if isinstance(inner, Mapping) and former in inner and name not in inner:
                tell_renamed(f"{section}.{former}", f"{section}.{name}")
                values = {**values, section: {name if key == former else key: value for key, value in inner.items()}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _with_plugins(cls, values: Any) -> Any:
        """Import plugins first, because other settings may select what they add."""
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
        """Return the experiment that ``to_yaml`` wrote.

        Raises:
            ConfigError: naming every setting that breaks a rule.
        """
        return cls.parse(yaml.safe_load(text))

    @classmethod
    def parse(cls, values: Mapping[str, Any], places: Mapping[Path_, str] | None = None) -> Experiment:
        """Check settings given as nested mappings, and return the experiment.

        Args:
            values: the settings by section.
            places: the location of each setting, for error messages.

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
    def _sections_fit(self) -> Experiment:
        require_method(self)
        require_privacy(self)
        require_sums(self)
        return self

    @property
    def updates_per_round(self) -> int:
        """Number of updates in a server step: the size of the cohort, or of the schedule's buffer if it has one."""
        return build_schedule(self.schedule).updates(self.federation.clients_per_round)

    def with_fingerprint(self, fingerprint: str | None) -> Experiment:
        """Return the same experiment, restricted to the model with this fingerprint; None allows any model."""
        return self.model_copy(update={"model": self.model.model_copy(update={"fingerprint": fingerprint})})

    def to_yaml(self) -> str:
        """Return all settings as YAML, including defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(a: Experiment, b: Experiment) -> list[str]:
    """Return the settings in which two experiments differ, as ``section.key: value of a and value of b``.

    The model's fingerprint is ignored unless both experiments have one.
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
    """Return all settings of an experiment, each as its path of keys and its value."""
    return _flatten(experiment.model_dump(mode="json"))


def _flatten(values: Mapping[str, Any], path: Path_ = ()) -> list[tuple[Path_, Any]]:
    rows: list[tuple[Path_, Any]] = []
    for key, value in values.items():
        rows += _flatten(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return rows


def _apply(override: str, values: dict[str, Any], places: dict[Path_, str]) -> None:
    """Apply a ``key.path=value`` override to nested values, and record the override as the setting's location."""
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
    """Return one pydantic error as text: the setting's location and name, the rule that it breaks, and its value."""
    path = tuple(str(part) for part in detail["loc"])
    known, elsewhere = _known(path)
    text = (
        f"is not a known setting; did you mean {elsewhere}?" if elsewhere and detail["type"] == "extra_forbidden" else rule(detail, known)
    )
    return ": ".join(part for part in (_place(path, text, places), ".".join(path), text) if part)


def _place(path: Path_, text: str, places: Mapping[Path_, str]) -> str:
    """Return the location of the setting that an error is about; empty if it is not known.

    The text of an error about a whole section names settings. If one of them was overridden, the override is the likely cause.
    """
    named = [(*path, word) for word in re.findall(r"\w+", text)]
    named += [tuple(word.split(".")) for word in re.findall(r"\w+\.\w+", text)]
    overridden = [places[name] for name in named if places.get(name, "").startswith("override")]
    written = [places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places]
    exact = [places[path]] if path in places and places[path].startswith("override") else []
    begins = [places[name] for name in named[:1] if name in places]
    return next(iter([*exact, *overridden, *begins, *written]), "")


def _known(path: Path_) -> tuple[list[str], str]:
    """Return the valid settings next to an unknown one, and the same setting in another section if no valid name is similar."""
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
