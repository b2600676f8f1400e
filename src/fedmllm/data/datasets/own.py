"""Loads your own data from JSON lines, CSV or a Hugging Face dataset, with the columns named in the experiment.

    data:
      dataset: jsonl                       # or csv, huggingface
      root: /data/mammography              # contains the files and images
      options:
        train: train.jsonl
        test: test.jsonl                   # and validation: FILE, if there is one
        columns: {image: scan, text: report, question: asked, answer: finding, client: site}  # and category, if answers are free
        choices: [benign, malignant]       # the same options for every sample; or name a column: columns.options
        metric: auc

Each key of ``columns`` that is not in ``ROLES`` is a modality: ``text`` is text, and any other (``image``, ``audio``, ``video``) is a
file inside ``root``. A modality whose field is empty or absent is missing from that sample, but some row must have the field.
In a Hugging Face dataset, images stay encoded bytes and classes are given by name. A row, and the sample it becomes:

    {"scan": "a/17.png", "report": "Scattered densities.", "asked": "Is it suspicious?", "finding": "benign", "site": "north"}
    Sample(id="train-1", question="Is it suspicious?", answer="benign", options=("benign", "malignant"), category="benign",
           content={"image": root / "a/17.png", "text": "Scattered densities."}, client="north")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedmllm.data.datasets.base import Dataset, DatasetRequest, Split, hold_out
from fedmllm.data.datasets.columns import ROLES, Options
from fedmllm.data.datasets.files import json_rows, require, stored
from fedmllm.data.datasets.rows import Row, RowError, Sieve, same_form, shown, words_of
from fedmllm.data.datasets.tables import own_table, suspicions
from fedmllm.data.prompts import LETTERS
from fedmllm.errors import ConfigError, listing
from fedmllm.types import AnswerType, Content, Modality, Sample

_FREE: Mapping[str, AnswerType] = {"open": "open", "closed": "closed"}


@dataclass(frozen=True)
class _Source:
    """How one kind of file is read: the rows of a split, and the content of a field that is a file."""

    rows: Callable[[Path, str, Options], Iterator[Row]]
    content: Callable[[Row, str, Path], Content]


def _file(row: Row, column: str, root: Path) -> Content:
    return row.file(column, root)


def _json_rows(root: Path, name: str, options: Options) -> Iterator[Row]:
    require(root, (name,), "the rows")
    return json_rows(root / name)


def _csv_rows(root: Path, name: str, options: Options) -> Iterator[Row]:
    require(root, (name,), "the rows")
    return own_table(root / name, options.columns.values(), options.delimiter, options.quoted)


def _stored_rows(root: Path, name: str, options: Options) -> Iterator[Row]:
    return stored(root, name)


def _stored_file(row: Row, column: str, root: Path) -> Content:
    value = row.value(column)
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(f"{column} must be one file, got a list of {len(value)}")
        return _stored_file(replace(row, record={column: value[0]}), column, root)
    if not isinstance(value, dict):
        return row.file(column, root)
    return bytes(value["bytes"]) if value.get("bytes") else replace(row, record={column: value.get("path")}).file(column, root)


_SOURCES = {
    "jsonl": _Source(_json_rows, _file),
    "csv": _Source(_csv_rows, _file),
    "huggingface": _Source(_stored_rows, _stored_file),
}


def loader(name: str) -> Callable[[DatasetRequest], Dataset]:
    """Return the loader for one kind of file."""
    return partial(_load, name)


def _load(name: str, request: DatasetRequest) -> Dataset:
    root, options, source = request.folder(name), request.options_as(Options), _SOURCES[name]
    named: dict[Split, str | None] = {"train": options.train, "validation": options.validation, "test": options.test}
    splits = {split: file for split, file in named.items() if file is not None}
    rows = {split: [_plain(row, options) for row in source.rows(root, file, options)] for split, file in splits.items()}
    every = [row for found in rows.values() for row in found]
    _check_columns(options, {key for row in every for key in row.record})
    _check_answers(options, every)
    _check_files(options, every)
    sieve = Sieve(str(root), request.on_bad_sample, remedy="correct them")
    read = {split: sieve.samples(found, partial(_sample, options, source, root, split)) for split, found in rows.items()}
    notes = [*sieve.finish(), *(suspicions(every) if name == "csv" else ())]
    if options.test is None:
        count = len(read["train"])
        read["train"], read["test"] = hold_out(read["train"], options.test_share, request.seed)
        notes.append(f"{len(read['test']):,} of {count:,} rows are held out as the test split (data.options.test_share)")
    notes += _remarks(options, [sample for samples in read.values() for sample in samples])
    return request.dataset(name, options.headline, read, options.modalities, notes)


def _remarks(options: Options, samples: Sequence[Sample]) -> list[str]:
    """Return notes on facts that matter for scenarios and partitions."""
    held = Counter(" and ".join(sample.modalities) or "nothing" for sample in samples if len(sample.modalities) < len(options.modalities))
    missing = [f"{count:,} of {len(samples):,} rows hold only {what}" for what, count in sorted(held.items())]
    if any(sample.options for sample in samples) or "category" in options.columns:
        return missing
    return [
        *missing,
        "columns.category names no column: all samples have the same category, so a Dirichlet partition only skews sizes",
    ]


def _plain(row: Row, options: Options) -> Row:
    """Normalize a row: column names in the Unicode form NFC, floats such as 1.0 as integers, and booleans as text. Files are not changed."""
    files = {options.columns[name] for name in options.modalities if name != "text"}
    record = {same_form(key): value if key in files else _word(value) for key, value in row.record.items()}
    return replace(row, record=record)


def _word(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_columns(options: Options, fields: Set[str]) -> None:
    """Raise an error for columns that no row has, unless rows without content are allowed."""
    roles = [role for role in options.columns if role in ROLES or not options.keep_empty]
    absent = [f"{role}: no row has a field {options.columns[role]}" for role in roles if options.columns[role] not in fields]
    if fields and absent:
        raise ConfigError(f"data.options.columns: the fields are {', '.join(sorted(fields))}\n{listing(absent)}")


def _check_answers(options: Options, rows: Sequence[Row]) -> None:
    """Raise one error, instead of one for each row, if no row's answer is among the choices."""
    column = options.columns["answer"]
    answers = [row.record[column] for row in rows if column in row.record]
    if not options.choices or not answers or set(options.choices) & set(map(words_of, answers)):
        return
    found = listing(f"{value}: {count:,} row(s)" for value, count in Counter(map(shown, answers)).most_common())
    raise ConfigError(
        f"data.options.choices: no row's {column} is one of {', '.join(options.choices)}; correct choices or columns.answer. The rows have:\n{found}"
    )


_NO_PATHS = {"http://": "a web address", "https://": "a web address", "data:": "an image in base64"}
"""Prefixes of values that are not paths of local files, and what such values are."""


def _check_files(options: Options, rows: Sequence[Row]) -> None:
    """Raise one error, instead of one for each row, for columns of web addresses or encoded images."""
    for column in (options.columns[name] for name in options.modalities if name != "text"):
        values = [value for row in rows if isinstance(value := row.record.get(column), str)]
        kinds = Counter(kind for value in values for start, kind in _NO_PATHS.items() if value.startswith(start))
        if too_long := sum(len(value) > _LONGEST_PATH for value in values):
            kinds["an image in base64"] += too_long
        for kind, count in kinds.items():
            raise ConfigError(
                f"data.options.columns: {column} must name files inside root, got {kind} in {count:,} row(s); save the images as files and give their paths"
            )


_LONGEST_PATH = 4096
"""The maximum length of a path on common systems, in characters."""


def _sample(options: Options, source: _Source, root: Path, split: str, row: Row) -> Sample:
    columns = options.columns
    choices = options.choices or _choices(row, columns)
    answer = row.choice(columns["answer"], {choice: choice for choice in choices}) if choices else row.text(columns["answer"])
    content = {name: value for name in options.modalities if (value := _content(row, name, columns[name], source, root)) is not None}
    if not content and not options.keep_empty:
        raise RowError(f"all of {', '.join(columns[name] for name in options.modalities)} are empty; at least one is required")
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
    """Return the answer type from its column. Without a column, yes and no are closed answers and all others are open."""
    if chosen:
        return "choice"
    if "answer_type" in columns:
        return row.choice(columns["answer_type"], _FREE)
    return "closed" if answer.lower() in ("yes", "no") else "open"


def _or_empty(row: Row, columns: Mapping[str, str], role: str) -> str:
    """Return a role's text; empty if it has no column or the field is empty."""
    if role not in columns or row.record.get(columns[role]) in ("", None):
        return ""
    return row.text(columns[role])


def _content(row: Row, modality: Modality, column: str, source: _Source, root: Path) -> Content | None:
    """Return a modality's content; None if the row has none."""
    value = row.record.get(column)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
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
        raise RowError(f"{columns['options']} must be two or more different options (a list, or separated by |), got {shown(value)}")
    if len(choices) > len(LETTERS):
        raise RowError(
            f"{columns['options']} has {len(choices)} options, but at most {len(LETTERS)} can be lettered; leave it empty for a free answer"
        )
    return choices
