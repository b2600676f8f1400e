"""Reads your own tables: detects separators and quotation marks, and reports cells that look as if they were read wrongly."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fedmllm.data.datasets.files import first_line, table
from fedmllm.data.datasets.rows import Row, same_form, skipped

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""Field separators by the value of ``data.options.delimiter``."""


def own_table(path: Path, wanted: Collection[str], delimiter: str | None, quoted: bool | None) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file.

    Args:
        path: the file.
        wanted: names of the columns that the file should have.
        delimiter: name of the field separator. None takes the separator that the file's first line declares (``sep=;``), or else the one of
            ``SEPARATORS`` with which the header has the most wanted columns.
        quoted: whether quotation marks enclose fields. None means yes, except in tab-separated files, whose writers seldom quote.
    """
    chosen = SEPARATORS[delimiter] if delimiter else _separator(path, wanted)
    return table(path, chosen, chosen != "\t" if quoted is None else quoted)


def _separator(path: Path, wanted: Collection[str]) -> str:
    line, named = first_line(path), {same_form(name) for name in wanted}
    if line.startswith("sep=") and len(line) == 5:
        return line[4]
    order = sorted(SEPARATORS.values(), key=lambda separator: separator != ("\t" if path.suffix == ".tsv" else ","))

    def fit(separator: str) -> tuple[int, int]:
        try:
            fields = [same_form(field) for field in next(csv.reader([line], delimiter=separator), [])]
        except csv.Error:  # a field beyond the size limit, which is reported when the rows are read
            fields = []
        return len(named.intersection(fields)), len(fields)

    return max(order, key=fit)


def suspicions(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return notes on cells that span lines, which a stray quotation mark may cause, and on cells still enclosed in quotation marks."""
    spanning = [
        f"{row.where}: {column} spans {value.count(chr(10)) + 1} lines"
        for row in rows
        for column, value in _cells(row)
        if "\n" in value.strip()
    ]
    marked = [f"{row.where}: {column}" for row in rows for column, value in _cells(row) if len(value) > 1 and value[0] == value[-1] == '"']
    return (
        *skipped(
            f"{len(spanning):,} cell(s) span several lines; if a stray quotation mark caused this, set data.options.quoted=false", spanning
        ),
        *skipped(f"{len(marked):,} cell(s) are enclosed in quotation marks; to remove these, set data.options.quoted=true", marked),
    )


def _cells(row: Row) -> Iterator[tuple[str, str]]:
    return ((column, value) for column, value in row.record.items() if isinstance(value, str))
