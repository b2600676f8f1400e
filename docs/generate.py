"""Write ``docs/configuration.md`` from the code it describes: ``python docs/generate.py``."""

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from fedmllm.algorithms import ALGORITHMS
from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS, columns
from fedmllm.data.datasets.mixture import MixedPart
from fedmllm.data.modalities import SCENARIOS
from fedmllm.data.quality import PARTS
from fedmllm.models.families import FAMILIES, GENERIC

SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WORDS = {type(None): "null", str: "text", Path: "path", tuple: "list of {}", dict: "mapping of {} to {}", Any: "anything"}
INTRO = """<!-- Written by `python docs/generate.py`; change the code and run it again. -->
# Configuration

An experiment is one YAML file of the sections below; every key has a default. After the file, `fedmllm train` takes
overrides: `key.path=value`, the value in YAML, e.g. `training.clip_norm=null` or `'evaluation.baselines=[local]'`. What
breaks a rule is refused with a message that names the line or override, the rule and the remedy; the exit code is 2."""


def page() -> str:
    """The whole page: a table for each section, then one for each index of names."""
    sections = {name: type(field.default) for name, field in Experiment.model_fields.items() if isinstance(field.default, BaseModel)}
    parts = (_section(f"{name}\n\n{_text(model.__doc__)}", model) for name, model in sections.items())
    return "\n\n".join([INTRO, _section("Top level", Experiment), *parts, *_indexes()]) + "\n"


def _section(title: str, model: type[BaseModel]) -> str:
    """A table of the fields that are no sections; a field's meaning is the string below it, as its author wrote it."""
    pairs: Any = pairwise(ast.parse(inspect.getsource(model)).body[0].body)  # type: ignore[attr-defined]
    meaning = {a.target.id: ast.literal_eval(b.value) for a, b in pairs if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
    rows = []
    for name, field in model.model_fields.items():
        rule = " and ".join(f"{text} {getattr(m, sign):g}" for m in field.metadata for sign, text in SIGNS.items() if hasattr(m, sign))
        default = field.get_default(call_default_factory=True, validated_data={})
        if not isinstance(default, BaseModel):
            stated = "required" if field.is_required() else f"`{json.dumps(default)}`"
            rows.append((f"`{name}`", _type(field.annotation), stated, rule, _text(meaning[name])))
    return _table(title, ("Key", "Type", "Default", "Rule", "Meaning"), rows)


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    parts = [_type(part) for part in get_args(kind) if part is not ...]
    return WORDS.get(get_origin(kind), " or ".join(parts)).format(*parts) if parts else WORDS.get(kind, kind.__name__)


def _indexes() -> Iterator[str]:
    """A section for every index behind a setting that is a name."""
    settings = {
        n: ", ".join(f"`{f.name}: {json.dumps(f.default)}`" for f in dataclasses.fields(cls)) or "none" for n, cls in ALGORITHMS.items()
    }
    methods = ((f"`{n}`", settings[n], _text(inspect.getmodule(cls).__doc__)) for n, cls in ALGORITHMS.items())
    yield _table("Methods: algorithm.name", ("Name", "Parameters and defaults", "Publication"), methods)
    datasets = ((f"`{n}`", row.summary, "required" if row.needs_root else "none") for n, row in DATASETS.items())
    yield _table("Datasets: data.dataset", ("Name", "Content", "data.root"), datasets)
    forms = {form: name for name, row in reversed(DATASETS.items()) if (form := row.options()).model_fields}
    for form, name in reversed(forms.items()):
        yield _section(
            f"data.options of {name if form is not columns.Options else 'jsonl, csv and huggingface'}\n\n{_text(form.__doc__)}", form
        )
    yield _section(f"data.options.parts of mixture, each\n\n{_text(MixedPart.__doc__)}", MixedPart)
    scenarios = ((f"`{n}`", row.summary, row.level_rule, row.default_level) for n, row in SCENARIOS.items())
    yield _table("Scenarios: federation.scenario", ("Name", "Meaning", "Level, after a dash", "Default level"), scenarios)
    parts = ((f"`{n}`", row.summary, f"{row.strength:g}", f"{row.bounds[0]:g} to {row.bounds[1]:g}") for n, row in PARTS.items())
    yield _table("Kinds: federation.heterogeneity, evaluation.tested", ("Name", "Meaning", "Default strength", "Bounds"), parts)
    families = ((n, _text(inspect.getmodule(type(row)).__doc__)) for n, row in {**FAMILIES, "any other": GENERIC}.items())
    yield _table("Model families: model_type in the model's config.json", ("Type", "What it is"), families)


def _text(doc: str | None) -> str:
    return " ".join((doc or "").strip().split("\n\n")[0].split()).replace("``", "`")


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows))


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
