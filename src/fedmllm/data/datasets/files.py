"""Reads rows from files: JSON lists, objects and lines, CSV, TSV, and datasets saved by Hugging Face.

A row that cannot be read raises its error when one of its values is accessed.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmllm.data.datasets.rows import SURROGATE, Row, RowError, shown
from fedmllm.errors import ConfigError, DataError, listing
from fedmllm.files import is_pointer
from fedmllm.types import Record


def require(root: Path, names: Sequence[str], dataset: str) -> None:
    """Check that every name is a file or folder inside the root.

    Raises:
        DataError: if some are missing; the message names them.
    """
    there = {name: os.path.exists(root / name) for name in names}  # noqa: PTH110 - Path.exists raises for a name that is too long
    if not all(there.values()):
        found = [f"{name} ({'found' if yes else 'missing'})" for name, yes in there.items()]
        raise DataError(f"{root}: contains no complete copy of {dataset}; it must contain all of these:\n{listing(found)}")


def json_list(path: Path) -> Iterator[Row]:
    """Yield the items of a JSON list. Items that are not objects become bad rows.

    Raises:
        DataError: if the file is not a JSON list in UTF-8.
    """
    values = _json(path)
    if not isinstance(values, list):
        raise DataError(f"{path}: must be a list of rows, got {shown(values)}; download the file again")
    for index, value in enumerate(values):
        yield Row(f"{path.name}[{index}]", value) if isinstance(value, dict) else _broken(f"{path.name}[{index}]", value)


def json_lines(path: Path) -> Iterator[Row]:
    """Yield one row per line of a JSON lines file. Empty lines are skipped.

    Raises:
        DataError: if the file cannot be read.
    """
    for number, line in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield _json_row(f"{path.name}:{number}", line)


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON lines file or of a JSON list. The first character determines the format.

    Raises:
        DataError: if the file cannot be read, or is a single JSON object over several lines.
    """
    content = _bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if content.startswith(b"["):
        return json_list(path)
    if content.startswith(b"{") and not _is_json(content.split(b"\n", 1)[0]) and _is_json(content):
        raise DataError(f"{path}: must contain one JSON object per line, or one list of objects; found a single object over several lines")
    return json_lines(path)


def json_object(path: Path, key: str) -> Iterator[Row]:
    """Yield the entries of a JSON object of objects. The name of an entry becomes its value of ``key``.

    Raises:
        DataError: if the file is not a JSON object in UTF-8.
    """
    values = _json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be an object of entries, got {shown(values)}; download the file again")
    for name, value in values.items():
        where = f"{path.name}[{shown(name)}]"
        yield Row(where, {**value, key: name}) if isinstance(value, dict) else _broken(where, value)


def _json(path: Path) -> object:
    try:
        return json.loads(_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number with too many digits
        raise DataError(f"{path}: must be JSON in UTF-8 ({error}); download the file again") from error


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _json_row(where: str, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return _Unreadable(where, {}, f"must be a JSON object in UTF-8 ({error})")
    return Row(where, value) if isinstance(value, dict) else _broken(where, value)


def _broken(where: str, value: object) -> Row:
    return _Unreadable(where, {}, f"must be an object with keys, got {shown(value)}")


@dataclass(frozen=True)
class _Unreadable(Row):
    """A row that could not be read at all. Every access raises the reason."""

    problem: str

    def value(self, key: str) -> Any:
        """Raise the reason why the row could not be read.

        Raises:
            RowError: always.
        """
        raise RowError(self.problem)


_SEPARATOR_LINE = re.compile("sep=.")
"""The line with which spreadsheet programs declare the field separator."""


def first_line(path: Path) -> str:
    """Return the first nonempty line of a file; empty if there is none.

    Raises:
        DataError: if the file cannot be read.
    """
    lines = _bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").splitlines()
    return next((line for line in lines if line.strip()), "")


def table(path: Path, delimiter: str = ",", quoted: bool = True) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file whose first line names the columns.

    Rows with only empty fields, and a line such as ``sep=;`` before the header, are skipped.

    Args:
        path: the file, in UTF-8.
        delimiter: the character between fields.
        quoted: whether quotation marks enclose fields. If False, quotation marks are ordinary characters and every line is one row.

    Raises:
        DataError: if the file cannot be read or has no header.
    """
    header: list[str] = []
    text = _bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    for number, fields in _quoted(path, text, delimiter) if quoted else _unquoted(text, delimiter):
        if not "".join(fields).strip() or (not header and _SEPARATOR_LINE.fullmatch(delimiter.join(fields))):
            continue
        if header:
            yield _table_row(f"{path.name}:{number}", header, fields)
        else:
            header = _header(path, fields)
    if not header:
        raise DataError(f"{path}: must begin with a line of column names; the file is empty")


def _quoted(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        if "field limit" in str(error):
            limit = f"{csv.field_size_limit():,} characters"
            raise DataError(
                f"{path}:{reader.line_num}: a cell has more than {limit}; save images as files and name the files in the table"
            ) from error
        raise DataError(f"{path}:{reader.line_num}: cannot be read as a table ({error}); check its quotation marks") from error


def _unquoted(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r").split(delimiter)


def _header(path: Path, names: list[str]) -> list[str]:
    if len(set(names)) != len(names) or SURROGATE.search("".join(names)):
        raise DataError(f"{path}: must begin with a line of unique column names in UTF-8; it begins with {shown(names)}")
    return names


def _table_row(where: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return _Unreadable(where, {}, f"must have {len(header)} fields, got {len(fields)}")
    if SURROGATE.search("".join(fields)):
        return _Unreadable(where, {}, "must be in UTF-8")
    return Row(where, dict(zip(header, fields, strict=True)))


def stored(root: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a split written by Hugging Face's ``save_to_disk``. Images stay encoded, and classes are given by name.

    Raises:
        ConfigError: if the library, the dataset or the split is missing.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError("data.dataset: huggingface needs the datasets library: pip install 'fedmllm[datasets]'") from error
    try:
        found = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three: the library does not check its JSON files
        parquet = "; read its Parquet files with datasets.load_dataset and save that" if any(root.rglob("*.parquet")) else ""
        raise ConfigError(f"data.root: {root} contains no dataset written by save_to_disk ({error}){parquet}") from error
    if not isinstance(found, datasets.DatasetDict):
        found = datasets.DatasetDict({"train": found})
    if split not in found:
        raise ConfigError(f"data.options: {split!r} is not a split of {root}; its splits are {', '.join(found)}")
    rows, names = found[split], {}
    for column, feature in rows.features.items():
        if (encoded := _undecoded(feature, datasets)) != feature:
            rows = rows.cast_column(column, encoded)
        if isinstance(feature, datasets.ClassLabel):
            names[column] = dict(enumerate(feature.names))
    return (Row(f"{split}[{i}]", _named(record, names)) for i, record in enumerate(rows))


def _undecoded(feature: Any, datasets: Any) -> Any:
    """Return a column's feature type with decoding disabled, also inside lists, so that a damaged file is a bad row and not a crash."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_undecoded(feature.feature, datasets))
    return replace(feature, decode=False) if hasattr(feature, "decode") else feature


def _named(record: Record, names: Mapping[str, Mapping[int, str]]) -> Record:
    """Replace class numbers with class names. A number that is not a class, such as -1, becomes None."""
    return record | {column: known.get(record[column]) for column, known in names.items()}


def _bytes(path: Path) -> bytes:
    try:
        if is_pointer(path):
            raise DataError(f"{path}: is a git-lfs pointer instead of the file; download the file, e.g. with 'git lfs pull'")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the folder's path") from error
