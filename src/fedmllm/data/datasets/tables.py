"""One's own tables: what separates their fields, whether quotation marks enclose them, and what looks as if it were read wrongly."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fedmllm.data.datasets.files import first_line, table
from fedmllm.data.datasets.rows import Row, same_form, skipped

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""What separates fields, by ``data.options.delimiter``."""


def own_table(path: Path, wanted: Collection[str], delimiter: str | None, quoted: bool | None) -> Iterator[Row]:
    """Rows of a CSV or TSV file.

    Args:
        path: the file.
        wanted: names of columns that should be in it.
        delimiter: between fields, by its name; None for the one of ``SEPARATORS`` that the file's first line names (``sep=;``), or by which its header has
            the most of the wanted columns.
        quoted: whether quotation marks enclose fields; None for yes unless tabs separate them, as programs that write tabs seldom quote.
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
        except csv.Error:  # a field beyond the limit: whoever reads the rows says so
            fields = []
        return len(named.intersection(fields)), len(fields)

    return max(order, key=fit)


def suspicions(rows: Sequence[Row]) -> tuple[str, ...]:
    """Notes on cells that span lines, as behind a quotation mark that is never meant to open one, and on cells that kept their marks."""
    spanning = [
        f"{row.where}: {column} spans {value.count(chr(10)) + 1} lines"
        for row in rows
        for column, value in _cells(row)
        if "\n" in value.strip()
    ]
    marked = [f"{row.where}: {column}" for row in rows for column, value in _cells(row) if len(value) > 1 and value[0] == value[-1] == '"']
    return (
        *skipped(
            f"{len(spanning):,} cell(s) span lines; if they should not, a quotation mark is to blame: data.options.quoted=false", spanning
        ),
        *skipped(f"{len(marked):,} cell(s) stand in quotation marks; if these only enclose them: data.options.quoted=true", marked),
    )


def _cells(row: Row) -> Iterator[tuple[str, str]]:
    return ((column, value) for column, value in row.record.items() if isinstance(value, str))
