"""Write ``docs/configuration.md``, the tables of ``docs/methods.md`` and ``cli/catalog.json`` from the code: ``python docs/generate.py``."""

import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedmllm.cli.catalog import FILE as CATALOG_FILE
from fedmllm.data.datasets import DATASETS, columns
from fedmllm.data.datasets.mixture import MixedPart
from fedmllm.data.prompts import Wording
from fedmllm.data.quality import PARTS
from fedmllm.data.scenarios import SCENARIOS
from fedmllm.engine.schedules import SCHEDULES
from fedmllm.models.families import FAMILIES, GENERIC
from fedmllm.reports import models as models_view
from fedmllm.reports import settings as settings_view
from fedmllm.reports.methods import catalog
from fedmllm.reports.methods import first_paragraph as _text
from fedmllm.types import Record

HERE = Path(__file__).parent
CATALOG = catalog()
SETTINGS = settings_view.catalog()
TOP_TITLE = "Top level"
KEYS = ("Key", "Type", "Default", "Rule", "Meaning")
BEGIN, END = "<!-- Written by `python docs/generate.py`, from here -->", "<!-- to here -->"
FLAGS = {"exact": "Exact", "heterogeneous_ranks": "Ranks may differ", "personalized": "A model per client", "streams": "Streams"}
CHANGES = {"client": "training", "weight": "weights in the average", "prompt": "wording of prompts"}
INTRO = """<!-- Written by `python docs/generate.py`; change the code and run it again. -->
# Configuration

An experiment is one YAML file with the sections below. Every key has a default. After the file, `fedmllm train` accepts
overrides of the form `key.path=value`, with the value in YAML, e.g. `training.clip_norm=null` or `'evaluation.baselines=[local]'`.
A value that breaks a rule is refused. The message names the line or override, the rule and the remedy, and the exit code is 2.
Few experiments need the settings under "Advanced". `fedmllm settings SECTION` prints a section."""


def page() -> str:
    """Return the configuration page: a table for each section, then one for each index of names."""
    parts = (_section(TOP_TITLE if name == settings_view.TOP else name, section) for name, section in SETTINGS.items())
    return "\n\n".join([INTRO, *parts, *_indexes()]) + "\n"


def _form(title: str, model: type[BaseModel]) -> str:
    """Return the section of a group of settings that is not a section of the experiment itself."""
    return _section(title, settings_view.section(model))


def _section(title: str, section: Record) -> str:
    """Return a table of a section's settings, then one of those that few experiments change."""
    about = f"{title}\n\n{section['summary']}" if title != TOP_TITLE else title
    rows = section["settings"].items()
    common, rare = ([_row(n, r) for n, r in rows if r["advanced"] is advanced] for advanced in (False, True))
    return "\n\n".join(part for part in (_table(about, KEYS, common), f"Advanced:\n\n{_grid(KEYS, rare)}" if rare else "") if part)


def _row(name: str, setting: Record) -> tuple[str, ...]:
    default = "required" if setting["default"] is None else f"`{setting['default']}`"
    return f"`{name}`", setting["type"], default, setting["rule"], setting["meaning"]


def _indexes() -> Iterator[str]:
    """Yield a section for every index of names that a setting refers to."""
    methods = ((f"`{n}`", _parameters(row), row["reference"]) for n, row in CATALOG["methods"].items())
    yield _table("Methods: algorithm.name", ("Name", "Parameters and defaults", "Publication"), methods)
    schedules = (
        (f"`{n}`", _parameters({"parameters": _defaults(row)}), _text(row.__doc__), _text(inspect.getmodule(row).__doc__))
        for n, row in SCHEDULES.items()
    )
    yield _table("Schedules: schedule.name", ("Name", "Parameters and defaults", "What it does", "Publication"), schedules)
    datasets = ((f"`{n}`", row.summary, "required" if row.needs_root else "none") for n, row in DATASETS.items())
    yield _table("Datasets: data.dataset", ("Name", "Content", "data.root"), datasets)
    forms = {form: name for name, row in reversed(DATASETS.items()) if (form := row.options()).model_fields}
    for form, name in reversed(forms.items()):
        yield _form(f"data.options of {name if form is not columns.Options else 'jsonl, csv and huggingface'}", form)
    yield _form("data.options.parts of mixture, each", MixedPart)
    yield _form("data.wordings, each", Wording)
    scenarios = ((f"`{n}`", row.summary, row.level_rule, row.default_level) for n, row in SCENARIOS.items())
    yield _table("Scenarios: federation.scenario", ("Name", "Meaning", "Level, after a dash", "Default level"), scenarios)
    parts = ((f"`{n}`", row.summary, f"{row.strength:g}", f"{row.bounds[0]:g} to {row.bounds[1]:g}") for n, row in PARTS.items())
    yield _table("Corruptions: federation.heterogeneity, evaluation.tested", ("Name", "Meaning", "Default strength", "Bounds"), parts)
    families = ((n, _text(inspect.getmodule(type(row)).__doc__)) for n, row in {**FAMILIES, "any other": GENERIC}.items())
    yield _table("Model families: model_type in the model's config.json", ("Type", "What it is"), families)


def methods_page(page: str) -> str:
    """Return the methods page with new tables between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    tables = (_methods_table(CATALOG["methods"]), _strategies_table(CATALOG["strategies"]))
    return "\n\n".join([head + BEGIN, *tables, END + tail])


def _methods_table(methods: dict[str, Any]) -> str:
    """Return the table of what each method sends, keeps and supports."""
    columns = ("Name", "Kind", "Up", "Down", "Each client keeps", "The server keeps", *FLAGS.values(), "Paper")
    rows = (
        (
            f"`{name}`",
            row["kind"],
            row["up"],
            row["down"],
            ", ".join(f"{size:g} (`{slot}`)" for slot, size in row["client_state"].items()),
            ", ".join(f"`{slot}`" for slot in row["server_state"]),
            *("yes" if row[flag] else "" for flag in FLAGS),
            row["reference"],
        )
        for name, row in methods.items()
    )
    return _table("The methods", columns, rows)


def _strategies_table(strategies: dict[str, Any]) -> str:
    columns = ("Name", "Parameters and defaults", "Changes", "In FedMLLM(method)", "What it does", "Source")
    rows = (
        (
            f"`{name}`",
            _parameters(row),
            ", ".join(CHANGES[change] for change in row["changes"]),
            "yes" if row["published"] else "",
            row["summary"].replace("|", "\\|"),
            row["reference"],
        )
        for name, row in strategies.items()
    )
    return _table("The strategies", columns, rows)


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _parameters(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}: {json.dumps(default)}`" for name, default in row["parameters"].items()) or "none"


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return f"## {title}\n\n{_grid(columns, rows)}"


def _grid(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows))


def pages() -> dict[Path, str]:
    """Return the content of each file that this script writes, as a whole or in part."""
    listed = json.dumps({**CATALOG, "models": models_view.catalog(), "settings": SETTINGS}, indent=1, ensure_ascii=False) + "\n"
    methods = methods_page((HERE / "methods.md").read_text(encoding="utf-8"))
    return {HERE / "configuration.md": page(), HERE / "methods.md": methods, CATALOG_FILE: listed}


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
