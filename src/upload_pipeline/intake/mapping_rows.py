"""The rows of a metadata mapping, read off CSV or JSON one at a time, values as they stand there.

What cannot be read as a whole is `INVALID_MAPPING` with the line and the column. No row is kept here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError

MAX_ROWS = 100_000
"""A mapping may be that of a whole archive, of which a batch is a part; beyond this nobody reads it any more."""

MAX_NAME_CHARS = 100
"""Longest name of a column: that of a metadata key."""

MAX_ENTRY_CHARS = 128 * 1024
"""Longest entry of JSON, and as `csv` has it the longest cell: far beyond what a document's metadata may be."""
_USUAL_CHARS = 4096

FILENAME = "filename"
KNOWN_FIELDS = ("author", "department", "date_created", "tags", "category")

Value = str | bool | list[Any] | None
"""Of a field, as it came: text in CSV; in JSON also the rest, numbers as `JsonNumber`, objects as `JsonObject`."""


class JsonNumber(str):
    """A number of JSON by its digits: nothing of it is lost, however long it is."""

    __slots__ = ()


class JsonObject(list[tuple[str, Any]]):
    """An object of JSON as pairs, so that a name that stands in it twice is seen."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a mapping.

    Attributes:
        line: where it begins, from 1.
        filename: as it stands there; empty where there is none.
        fields: the other values by name, empty cells left out.
        fault: what is wrong with the row itself, as (field, problem); None where nothing is.
    """

    line: int
    filename: str
    fields: dict[str, Value]
    fault: tuple[str, str] | None = None


def read_rows(data: bytes) -> Iterator[Row]:
    """The rows of a mapping; JSON where it begins with a bracket, else CSV.

    Raises:
        PipelineError: `INVALID_MAPPING`, also between two rows.
    """
    text = _decoded(data)
    start = _skip(text, 0)
    if start == len(text):
        raise unreadable("it is empty", 1, 1)
    rows = _json_rows(text, start) if text[start] in "{[" else _csv_rows(text)
    for number, row in enumerate(rows):
        if number == MAX_ROWS:
            raise unreadable(f"it has more than {MAX_ROWS:,} rows", row.line, 1)
        yield row


def unreadable(reason: str, line: int, column: int) -> PipelineError:
    """The error of a mapping that cannot be read as a whole."""
    return PipelineError(
        ErrorCode.INVALID_MAPPING,
        f"The metadata mapping cannot be read: line {line}, column {column}: {reason}.",
        {"line": line, "column": column, "reason": reason},
    )


_BLANK = re.compile(r"[ \t\r\n]*")


def _decoded(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unreadable("it is not UTF-8 text; save it as UTF-8", *_place(error.object, error.start)) from error
    if (at := text.find("\0")) >= 0:
        raise unreadable("it contains a NUL, so it is no text, or not in UTF-8; save it as UTF-8", *_place(text, at))
    return text


def _place(text: str | bytes, at: int) -> tuple[int, int]:
    """Line and column of an offset, both from 1."""
    newline: Any = "\n" if isinstance(text, str) else b"\n"
    return text.count(newline, 0, at) + 1, at - text.rfind(newline, 0, at)


def _field_name(name: str) -> str:
    """A field's name: those that we know in lower case, whatever a spreadsheet made of them."""
    stripped = name.strip()
    lower = stripped.lower()
    return lower if lower == FILENAME or lower in KNOWN_FIELDS else stripped


def _csv_rows(text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise unreadable(_csv_problem(str(error)), line, 1) from error
        if cells is None:
            break
        if any(cell.strip() for cell in cells):
            if header is None:
                header = _header(cells, line)
            else:
                yield _csv_row(header, cells, line)
        line = reader.line_num + 1


def _csv_problem(message: str) -> str:
    if "field larger" in message:
        return f"a value is longer than {csv.field_size_limit():,} characters; perhaps a closing quote is missing"
    if "unexpected end" in message:
        return "a value that begins here with a quote has no closing quote"
    return f"{message}; put values with commas or quotes into quotes, and double the quotes in them"


def _header(cells: list[str], line: int) -> list[str]:
    names = [_field_name(cell) for cell in cells]
    while not names[-1]:
        names.pop()  # spreadsheets add empty columns at the end
    if FILENAME not in names:
        hint = "; separate the columns by commas" if len(names) == 1 and re.search(r"[;\t]", names[0]) else ""
        raise unreadable(f"the header has no column {FILENAME!r}{hint}", line, 1)
    for column, name in enumerate(names, 1):
        if not 1 <= len(name) <= MAX_NAME_CHARS:
            raise unreadable(
                f"the name of a column has {len(name):,} characters, it must have 1 to {MAX_NAME_CHARS}", line, column
            )
        if name in names[: column - 1]:
            raise unreadable(f"the column {name!r} stands in the header twice", line, column)
    return names


def _csv_row(header: list[str], cells: list[str], line: int) -> Row:
    values = [cell.strip() for cell in cells]
    fields: dict[str, Value] = {name: value for name, value in zip(header, values, strict=False) if value}
    filename = fields.pop(FILENAME, "")
    fault = None
    if any(values[len(header) :]):
        fault = (header[-1], "the row has more values than the header has columns; put values with commas into quotes")
    return Row(line, str(filename), fields, fault)


def _json_rows(text: str, start: int) -> Iterator[Row]:
    if text[start] != "{":
        raise unreadable("it must be an object with the filenames as its names", *_place(text, start))
    decoder = json.JSONDecoder(
        object_pairs_hook=JsonObject, parse_int=JsonNumber, parse_float=JsonNumber, parse_constant=_refuse_constant
    )
    line, counted = 1, 0
    at = _skip(text, start + 1)
    if text[at : at + 1] == "}":
        _expect_end(text, at + 1)
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] != '"':
            raise unreadable("a filename in double quotes must stand here", *_place(text, at))
        filename, at = _decode(decoder, text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise unreadable("a colon must stand here", *_place(text, at))
        value, at = _decode(decoder, text, _skip(text, at + 1))
        yield _json_row(line, filename.strip(), value)
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            _expect_end(text, at + 1)
            return
        if text[at : at + 1] != ",":
            raise unreadable("a comma or a closing brace must stand here", *_place(text, at))
        at = _skip(text, at + 1)


def _decode(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int]:
    """The value at an offset, and the offset behind it; read in a part of the text, so that no value becomes large."""
    for room in (_USUAL_CHARS, MAX_ENTRY_CHARS):
        part = text[at : at + room]
        last = room == MAX_ENTRY_CHARS or at + room >= len(text)
        try:
            value, end = decoder.raw_decode(part)
        except (ValueError, RecursionError) as error:
            if last:
                raise _no_json(error, text, at, cut=at + room < len(text)) from error
            continue
        if end < len(part) or at + end == len(text):
            return value, at + end
    raise unreadable(f"an entry is longer than {MAX_ENTRY_CHARS:,} characters", *_place(text, at))


def _no_json(error: ValueError | RecursionError, text: str, at: int, *, cut: bool) -> PipelineError:
    or_too_long = f", or the entry is longer than {MAX_ENTRY_CHARS:,} characters" if cut else ""
    if isinstance(error, RecursionError):
        return unreadable("it is nested too deep", *_place(text, at))
    if isinstance(error, json.JSONDecodeError):
        return unreadable(f"it is not JSON: {error.msg}{or_too_long}", *_place(text, at + error.pos))
    return unreadable(f"it is not JSON: {error}", *_place(text, at))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return at if blank is None else blank.end()


def _expect_end(text: str, at: int) -> None:
    rest = _skip(text, at)
    if rest != len(text):
        raise unreadable("there is something behind the closing brace", *_place(text, rest))


def _json_row(line: int, filename: str, value: Any) -> Row:
    if not isinstance(value, JsonObject):
        return Row(line, filename, {}, (FILENAME, "its value must be an object of fields"))
    fields: dict[str, Value] = {}
    for name, field in value:
        known = _field_name(name)
        if known in fields:
            return Row(line, filename, {}, (known, "stands there twice"))
        fields[known] = field
    named = fields.pop(FILENAME, filename)
    if named != filename:
        return Row(line, filename, {}, (FILENAME, "is another one than the name that the fields stand under"))
    return Row(line, filename, {name: field for name, field in fields.items() if field not in (None, "")})
