"""The rows of files: what each reader takes for a row, which rules a row can break, and what happens to bad rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmllm.data.datasets.files import json_lines, json_list, json_object, require, table
from fedmllm.data.datasets.rows import OnBadSample, Row, RowError, Sieve, words_of
from fedmllm.errors import DataError
from fedmllm.types import Sample

Reader = Callable[[Path], Iterator[Row]]


def tsv(path: Path) -> Iterator[Row]:
    return table(path, "\t", quoted=False)


def entries(path: Path) -> Iterator[Row]:
    return json_object(path, "a")


def read(reader: Reader, path: Path, content: bytes) -> list[tuple[str, object]]:
    """Each row's position and its ``a``, or the rule that it breaks."""
    path.write_bytes(content)
    return [(row.where, value_or_problem(row)) for row in reader(path)]


def value_or_problem(row: Row) -> object:
    try:
        return row.value("a")
    except RowError as problem:
        return str(problem)


BOM = b"\xef\xbb\xbf"
READ = {
    "list": (json_list, b'[{"a": 1}, {"a": "x", "b": null}]', [("f[0]", 1), ("f[1]", "x")]),
    "list with a byte order mark": (json_list, BOM + b'[{"a": 1}]\r\n', [("f[0]", 1)]),
    "list of other things": (json_list, b'[{"b": 1}, 7]', [("f[0]", "lacks a"), ("f[1]", "must be an object with keys, got 7")]),
    "lines": (json_lines, BOM + b'{"a": 1}\r\n\r\n   \n{"a": 2}', [("f:1", 1), ("f:4", 2)]),
    "line separators inside": (json_lines, '{"a": "x\u2028\x85y"}\n{"a": 2}'.encode(), [("f:1", "x\u2028\x85y"), ("f:2", 2)]),
    "lines of other things": (json_lines, b'[1]\n{"a": 2}', [("f:1", "must be an object with keys, got [1]"), ("f:2", 2)]),
    "object": (entries, b'{"x": {"b": 1, "a": 2}}', [("f['x']", "x")]),
    "object of other things": (entries, b'{"x": [1]}', [("f['x']", "must be an object with keys, got [1]")]),
    "csv": (table, BOM + b'a,b\r\n1,"x\ny"\r\n\r\n,,\r\n , \r\n2,"say ""hi"""\r\n', [("f:3", "1"), ("f:7", "2")]),
    "csv of uneven rows": (table, b"a,b\n1\n1,2,3\n4,5", [("f:2", "must have 2 fields, got 1"), ("f:3", "must have 2 fields, got 3"), ("f:4", "4")]),
    "csv in Latin-1": (table, b"a,b\n\xe9,1\n2,3", [("f:2", "must be in UTF-8"), ("f:3", "2")]),
    "csv without a column": (table, b"b,c\n1,2", [("f:2", "lacks a")]),
    "csv after empty lines": (table, b"\n\na,b\n1,2", [("f:4", "1")]),
    "quotation marks": (tsv, b'a\tb\n"\t1\n2" wide\t"3"\n', [("f:2", '"'), ("f:3", '2" wide')]),
    "carriage return inside": (tsv, b"a\tb\r\nx\ry\t1\r\n2\t3\r\n", [("f:2", "x\ry"), ("f:3", "2")]),
    "line ends after the last column": (tsv, b"b\ta\r\n1\tx\r\n2\ty", [("f:2", "x"), ("f:3", "y")]),
    "a field longer than csv allows": (tsv, b"a\tb\n" + b"x" * 200_000 + b"\t1\n", [("f:2", "x" * 200_000)]),
    "a null character": (tsv, b"a\tb\nx\0\t1\n", [("f:2", "x\0")]),
}  # fmt: skip


@pytest.mark.parametrize(("reader", "content", "rows"), READ.values(), ids=READ)
def test_rows_are_found_with_their_positions(reader: Reader, content: bytes, rows: list[tuple[str, object]], tmp_path: Path) -> None:
    assert read(reader, tmp_path / "f", content) == rows


@pytest.mark.parametrize("line", [b"\xff", b'{"a": "\xe9"}', b'{"a": 1', b"", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_an_invalid_json_line_does_not_affect_others(line: bytes, tmp_path: Path) -> None:
    first, last = read(json_lines, tmp_path / "f", (line or b"null") + b'\n{"a": 2}\n')

    assert "object" in str(first[1])
    assert last == ("f:2", 2)


NOT_READ = {
    "list cut short": (json_list, b"[{}", "must be JSON in UTF-8"),
    "list too deep": (json_list, b"[" * 100_000, "must be JSON in UTF-8"),
    "list in UTF-16": (json_list, "[{}]".encode("utf-16"), "must be JSON in UTF-8"),
    "list that is none": (json_list, b"{}", "must be a list of rows, got {}"),
    "object that is none": (entries, b"[]", "must be an object of entries, got []"),
    "empty table": (table, b"", "must begin with a line of column names; the file is empty"),
    "table of empty lines": (tsv, b"\r\n \t \n", "must begin with a line of column names; the file is empty"),
    "column twice": (table, b"a,b,a\n1,2,3", "unique column names in UTF-8; it begins with ['a', 'b', 'a']"),
    "table in UTF-16": (table, "a,b\n1,2".encode("utf-16"), "must begin with a line of unique column names in UTF-8"),
    "quotation never closed": (
        table,
        b'a,b\n1,"2\n3,4\n',
        "f:3: cannot be read as a table (unexpected end of data); check its quotation marks",
    ),
    "text after a quotation": (table, b'a,b\n"1"x,2\n', "f:2: cannot be read as a table"),
    "field too long": (table, b"a,b\n1," + b"x" * 200_000, "f:2: a cell has more than 131,072 characters; save images as files"),
}


@pytest.mark.parametrize(("reader", "content", "message"), NOT_READ.values(), ids=NOT_READ)
def test_a_file_that_cannot_be_read_is_named(reader: Reader, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(reader, tmp_path / "f", content)
    assert str(error.value).startswith(str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize("reader", [json_list, json_lines, entries, table, tsv])
@pytest.mark.parametrize("name", ["gone", "."])
def test_a_missing_file_is_named(reader: Reader, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(reader(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "words"),
    [(" a\t b\r\nc ", "a b c"), (0, "0"), (-7, "-7"), ("Größe", "Größe"), ("🫁", "🫁"), ("null", "null")]
    + [(value, "") for value in ("", " \n", None, True, 2.5, ["a"], {}, b"a", "a\ud83e")],
)
def test_words_are_normalized_text_or_empty(value: object, words: str) -> None:
    assert words_of(value) == words


def test_a_number_with_too_many_digits_has_no_words() -> None:
    assert words_of(10**5000) == ""


def test_a_choice_rejects_values_that_only_look_like_it() -> None:
    known = {"0": "no", "1": "yes", "": None}

    assert [Row("f:1", {"a": value}).choice("a", known) for value in (0, " 1\n", "")] == ["no", "yes", None]
    for value in (True, 1.0, "01", None, [], "  ", "\ud83e", ["1"]):
        with pytest.raises(RowError, match=r"a must be one of 0, 1, , got "):
            Row("f:1", {"a": value}).choice("a", known)


def test_files_must_be_inside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    for place in ("out.png", "in/a..b.png", "in/more/c.png"):
        (tmp_path / place).touch()

    def file(name: object) -> Path:
        return Row("f:1", {"a": name}).file("a", tmp_path / "in")

    assert [file(name) for name in ("a..b.png", "./more//c.png")] == [tmp_path / "in/a..b.png", tmp_path / "in/more/c.png"]
    for name in ("../out.png", "more/../../out.png", "more/../a..b.png", str(tmp_path / "in/a..b.png"), "a\0", "", None, 7, ["a..b.png"]):
        with pytest.raises(RowError, match="a must be a path inside in/, got "):
            file(name)
    for name in ("gone.png", "more", ".", "x" * 5000, "\ud83e.png"):
        with pytest.raises(RowError, match="is not a file in in/"):
            file(name)


def sample(row: Row) -> Sample | None:
    """Keeps rows with text and leaves zeros out."""
    return None if row.record == {"a": 0} else Sample(f"x-{row.text('a')}", "?", "yes", {})


def collect(policy: OnBadSample, values: list[object]) -> tuple[list[str], tuple[str, ...]]:
    collector = Sieve("files", policy)
    kept = collector.samples((Row(f"f:{i}", {"a": value}) for i, value in enumerate(values)), sample)
    return [s.id for s in kept], collector.finish()


def test_all_bad_rows_are_refused_at_once() -> None:
    with pytest.raises(DataError) as error:
        collect("refuse", ["u", None, 0, "u", 0, "v"])
    assert str(error.value).splitlines() == [
        "files: 2 bad row(s); correct them or download the files again, or set data.on_bad_sample to skip:",
        "  - f:1: a must be text that is not empty, got None",
        "  - f:3: id must be unique, but 'x-u' also occurs at f:0",
    ]


def test_bad_rows_are_skipped_and_counted() -> None:
    assert collect("skip", ["u", 0, "v"]) == (["x-u", "x-v"], ())
    assert collect("skip", ["u", None, 0, "u", "v"]) == (
        ["x-u", "x-v"],
        ("2 bad row(s) skipped", "f:1: a must be text that is not empty, got None", "f:3: id must be unique, but 'x-u' also occurs at f:0"),
    )


def test_a_long_list_of_problems_is_truncated_after_twenty() -> None:
    values: list[object] = [None] * 25

    with pytest.raises(DataError, match=r"f:19: [^\n]*\n  \.\.\. and 5 more$"):
        collect("refuse", values)
    notes = collect("skip", ["u", *values])[1]
    assert (len(notes), notes[0], notes[-1]) == (22, "25 bad row(s) skipped", "... and 5 more")


def test_skipping_every_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"2 bad row\(s\), and no other rows are left; .*\n  - f:0: .*\n  - f:2: "):
        collect("skip", [None, 0, ""])


def test_uniqueness_can_use_another_key_than_the_id() -> None:
    collector = Sieve("files", "skip", identity=lambda s: s.id.lower())
    kept = collector.samples((Row(f"f:{i}", {"a": value}) for i, value in enumerate(["u", "U"])), sample)

    assert ([s.id for s in kept], len(collector.problems)) == (["x-u"], 1)


def test_missing_files_are_named_with_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    require(tmp_path, ("a",), "Things")

    with pytest.raises(DataError, match=r"no complete copy of Things; .*\n  - a \(found\)\n  - b \(missing\)\n  - x+ \(missing\)$"):
        require(tmp_path, ("a", "b", "x" * 5000), "Things")
