"""Your own data: JSON lines, CSV or a Hugging Face dataset, with the columns named in the experiment.

    data:
      dataset: jsonl                       # or csv, huggingface
      root: /data/mammography              # files and pictures lie here
      options:
        train: train.jsonl
        test: test.jsonl
        columns: {image: scan, text: report, question: asked, answer: finding, client: site}
        choices: [benign, malignant]       # the same options for every sample; or name a column: columns.options
        metric: auc

Each key of ``columns`` beside those of ``ROLES`` is a modality: ``text`` is text, any other (``image``, ``audio``, ``video``) a
file inside ``root``. A modality whose field is empty or absent is missing from that sample, but some row must have the field.
Of a Hugging Face dataset, pictures stay encoded bytes and classes go by their names. One row, and the sample it becomes:

    {"scan": "a/17.png", "report": "Scattered densities.", "asked": "Is it suspicious?", "finding": "benign", "site": "north"}
    Sample(id="train-1", question="Is it suspicious?", answer="benign", options=("benign", "malignant"), category="benign",
           content={"image": root / "a/17.png", "text": "Scattered densities."}, client="north")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Metric, hold_out, take
from fedmllm.data.datasets.files import json_lines, require, table
from fedmllm.data.datasets.rows import Row, RowError, Sieve, shown, words_of
from fedmllm.errors import ConfigError, listing
from fedmllm.types import AnswerType, Content, Modality, Record, Sample

ROLES = ("id", "question", "options", "answer", "answer_type", "category", "client", "domain")
"""Keys of ``columns`` that are no modalities."""

_FREE: Mapping[str, AnswerType] = {"open": "open", "closed": "closed"}


class Options(DatasetOptions):
    """Where things are in your files."""

    train: str = "train"
    """File of the training rows inside ``root`` (Hugging Face: name of the split)."""
    test: str | None = None
    """File of the test rows; left out: ``test_share`` of the training rows, chosen by the seed, are held out."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the rows to test on where there is no test file."""
    columns: dict[str, str]
    """What a column is for, and its name: modalities, and the roles id, question, options, answer, answer_type, category, client and domain."""
    question: str | None = None
    """The question of every sample; left out where a column holds it."""
    choices: tuple[str, ...] = ()
    """The options of every sample; left out where a column holds them (separated by a vertical bar; empty: a free answer) or answers are free."""
    keep_empty: bool = False
    """Keep rows whose modalities are all empty; else they are bad rows."""
    metric: Metric | None = None
    """Headline score; left out for ``auc`` (2 choices), ``macro_f1`` (more) or ``accuracy`` (free answers)."""

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        problems = [f"columns: {key} is needed" for key in ("answer",) if key not in self.columns]
        problems += [] if self.modalities else ["columns: name at least one modality, e.g. text or image"]
        if (self.question is None) == ("question" not in self.columns):
            problems.append("question: give either this or columns.question")
        if self.choices and "options" in self.columns:
            problems.append("choices: give either these or columns.options")
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            problems.append(f"choices: two or more different ones are needed, not {list(self.choices)}")
        problems += [
            f"choices: {choice!r} must have words and single spaces" for choice in self.choices if words_of(choice) != choice or not choice
        ]
        problems += [
            f"{key}: must lie inside root, not {file!r}" for key, file in (("train", self.train), ("test", self.test)) if _leaves(file)
        ]
        if self.test == self.train:
            problems.append("test: must be another file than train; leave it out to hold rows out")
        by_row = "options" in self.columns
        if self.metric == "auc" and len(self.choices) != 2 and not by_row:
            problems.append("metric: auc needs exactly two choices, the second is the positive one")
        if self.metric == "macro_f1" and not self.choices and not by_row:
            problems.append("metric: macro_f1 needs choices")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The keys of ``columns`` that are modalities, in alphabetical order."""
        return tuple(sorted(set(self.columns) - set(ROLES)))

    @property
    def headline(self) -> Metric:
        """The metric in force."""
        return self.metric or ("accuracy" if not self.choices else "auc" if len(self.choices) == 2 else "macro_f1")


@dataclass(frozen=True)
class _Source:
    """How one kind of file is read: rows of a split, and how a picture's field becomes content."""

    rows: Callable[[DatasetRequest, str], Iterator[Row]]
    content: Callable[[Row, str, Path], Content]


def _leaves(file: str | None) -> bool:
    return file is not None and (not file or bool(Path(file).anchor) or ".." in Path(file).parts)


def _file(row: Row, column: str, root: Path) -> Content:
    return row.file(column, root)


def _json_rows(request: DatasetRequest, name: str) -> Iterator[Row]:
    root = request.folder("jsonl")
    require(root, (name,), "the rows")
    return json_lines(root / name)


def _csv_rows(request: DatasetRequest, name: str) -> Iterator[Row]:
    root = request.folder("csv")
    require(root, (name,), "the rows")
    return table(root / name, "\t" if name.endswith(".tsv") else ",")


def _stored_rows(request: DatasetRequest, split: str) -> Iterator[Row]:
    """Rows of a dataset saved with ``save_to_disk``; pictures stay encoded."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError("data.dataset: huggingface needs the library: pip install 'fedmllm[datasets]'") from error
    root = request.folder("huggingface")
    try:
        stored = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three: what its JSON files hold is not checked
        raise ConfigError(f"data.root: {root} holds no dataset that save_to_disk wrote ({error})") from error
    if not isinstance(stored, datasets.DatasetDict):
        stored = datasets.DatasetDict({"train": stored})
    if split not in stored:
        raise ConfigError(f"data.options: {split!r} is no split of {root}; it holds {', '.join(stored)}")
    rows, names = stored[split], {}
    for column, feature in rows.features.items():
        if hasattr(feature, "decode"):
            rows = rows.cast_column(column, replace(feature, decode=False))
        if isinstance(feature, datasets.ClassLabel):
            names[column] = dict(enumerate(feature.names))
    return (Row(f"{split}[{i}]", _named(record, names)) for i, record in enumerate(rows))


def _named(record: Record, names: Mapping[str, Mapping[int, str]]) -> Record:
    """Classes by name; a number that is no class, such as -1 for none, becomes empty."""
    return record | {column: known.get(record[column]) for column, known in names.items()}


def _stored_file(row: Row, column: str, root: Path) -> Content:
    value = row.value(column)
    if not isinstance(value, dict):
        return row.file(column, root)
    return bytes(value["bytes"]) if value.get("bytes") else replace(row, record={column: value.get("path")}).file(column, root)


_SOURCES = {
    "jsonl": _Source(_json_rows, _file),
    "csv": _Source(_csv_rows, _file),
    "huggingface": _Source(_stored_rows, _stored_file),
}


def loader(name: str) -> Callable[[DatasetRequest], Dataset]:
    """The loader of one kind of file."""
    return partial(_load, name)


def _load(name: str, request: DatasetRequest) -> Dataset:
    root, options, source = request.folder(name), request.options_as(Options), _SOURCES[name]
    sieve = Sieve(str(root), request.on_bad_sample)

    fields: set[str] = set()

    def read(split: str, file: str) -> list[Sample]:
        rows = list(source.rows(request, file))
        fields.update(key for row in rows for key in row.record)
        return sieve.samples(rows, partial(_sample, options, source, root, split))

    train = read("train", options.train)
    test = [] if options.test is None else read("test", options.test)
    _check_columns(options, fields)
    notes = sieve.finish()
    if options.test is None:
        train, test = hold_out(train, options.test_share, request.seed)
    chosen = (take(train, request.num_train, request.seed, "train"), take(test, request.num_test, request.seed, "test"))
    return Dataset(name, options.headline, *chosen, options.modalities, notes=notes)


def _check_columns(options: Options, fields: Set[str]) -> None:
    """Columns that no row has are misspelled, unless rows without content are expected."""
    roles = [role for role in options.columns if role in ROLES or not options.keep_empty]
    absent = [f"{role}: no row has a field {options.columns[role]}" for role in roles if options.columns[role] not in fields]
    if fields and absent:
        raise ConfigError(f"data.options.columns: the fields are {', '.join(sorted(fields))}\n{listing(absent)}")


def _sample(options: Options, source: _Source, root: Path, split: str, row: Row) -> Sample:
    columns = options.columns
    choices = options.choices or _choices(row, columns)
    answer = row.choice(columns["answer"], {choice: choice for choice in choices}) if choices else row.text(columns["answer"])
    content = {name: value for name in options.modalities if (value := _content(row, name, columns[name], source, root)) is not None}
    if not content and not options.keep_empty:
        raise RowError(f"all of {', '.join(columns[name] for name in options.modalities)} are empty; one is needed")
    return Sample(
        id=row.text(columns["id"]) if "id" in columns else f"{split}-{row.where.rstrip(']').replace('[', ':').rpartition(':')[2]}",
        question=row.text(columns["question"]) if "question" in columns else str(options.question),
        answer=answer,
        content=content,
        options=choices,
        category=row.text(columns["category"]) if "category" in columns else (answer if choices else "all"),
        answer_type=_answer_type(row, columns, answer, bool(choices)),
        client=_or_empty(row, columns, "client"),
        domain=_or_empty(row, columns, "domain"),
    )


def _answer_type(row: Row, columns: Mapping[str, str], answer: str, chosen: bool) -> AnswerType:
    """As the column says; without one, yes and no are closed answers."""
    if chosen:
        return "choice"
    if "answer_type" in columns:
        return row.choice(columns["answer_type"], _FREE)
    return "closed" if answer.lower() in ("yes", "no") else "open"


def _or_empty(row: Row, columns: Mapping[str, str], role: str) -> str:
    """A role's text where there is a column for it and the row fills it."""
    if role not in columns or row.record.get(columns[role]) in ("", None):
        return ""
    return row.text(columns[role])


def _content(row: Row, modality: Modality, column: str, source: _Source, root: Path) -> Content | None:
    """A modality's value, None where the row has none."""
    value = row.record.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return row.text(column) if modality == "text" else source.content(row, column, root)


def _choices(row: Row, columns: Mapping[str, str]) -> tuple[str, ...]:
    if "options" not in columns:
        return ()
    value = row.value(columns["options"])
    if value in (None, "", []):
        return ()
    parts = value.split("|") if isinstance(value, str) else value
    choices = tuple(map(words_of, parts)) if isinstance(parts, (list, tuple)) else ()
    if len(choices) < 2 or len(set(choices)) != len(choices) or not all(choices):
        raise RowError(f"{columns['options']} must be two or more different options (a list, or separated by |), is {shown(value)}")
    return choices
