"""Metadata of a batch's files, from one CSV or JSON file that came with them.

A row that does not validate fails its own file, with the field named; a mapping that cannot be read as a whole fails
the request. `author`, `department` and `category` are text, `date_created` a date, `tags` a list of texts; every
further column is kept as text. Empty values are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.filenames import MAX_FILENAME_CHARS, display_name
from upload_pipeline.intake.mapping_rows import (
    KNOWN_FIELDS,
    MAX_NAME_CHARS,
    JsonNumber,
    JsonObject,
    Row,
    Value,
    read_rows,
)
from upload_pipeline.intake.metadata import check_metadata

MAX_WARNINGS = 100
"""Rows without a file that are named; of more the number is told."""

_SHOWN_CHARS = 60
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True, slots=True)
class MappedMetadata:
    """What a mapping says of the files of a batch.

    Attributes:
        by_filename: for each name that was asked for, what to keep with the file, or why the file fails.
        warnings: rows that no file came for, in words.
    """

    by_filename: Mapping[str, dict[str, Any] | PipelineError]
    warnings: tuple[str, ...] = ()


def read_mapping(
    data: bytes | None, *, filenames: Collection[str], max_bytes: int, required: Sequence[str] = ()
) -> MappedMetadata:
    """Finds the metadata of files by their names. Reads the mapping once and keeps only the rows of these files.

    A name in the mapping means the file of that name whatever directories stand before it. A file without a row has no
    metadata; a file with two rows fails.

    Args:
        data: CSV or JSON in UTF-8, with or without a byte order mark; None where no mapping came.
        filenames: of the files, as `display_name` made them.
        max_bytes: limit of `data`.
        required: fields that each file must have.

    Raises:
        PipelineError: `INVALID_MAPPING`, naming line and column.
    """
    wanted = frozenset(filenames)
    found: dict[str, Row] = {}
    again: dict[str, int] = {}
    warnings: list[str] = []
    strays = 0
    if data is not None and len(data) > max_bytes:
        raise PipelineError(
            ErrorCode.INVALID_MAPPING,
            f"The metadata mapping is larger than the limit of {max_bytes} bytes. Send only the rows of these files.",
            {"max_bytes": max_bytes},
        )
    for row in read_rows(data) if data is not None else ():
        name = _named(row.filename)
        if name not in wanted:
            strays += 1
            if strays <= MAX_WARNINGS:
                warnings.append(_stray(row))
        elif name in found:
            again.setdefault(name, row.line)
        else:
            found[name] = row
    if strays > MAX_WARNINGS:
        warnings.append(f"{strays - MAX_WARNINGS:,} more rows of the mapping have no file in the batch")
    return MappedMetadata(
        {name: _settled(name, found.get(name), again.get(name), required) for name in wanted}, tuple(warnings)
    )


def _named(filename: str) -> str:
    """`display_name`, and "" for no name; at once for names that it would leave as they are."""
    if filename.isascii() and filename.isprintable() and len(filename) <= MAX_FILENAME_CHARS:
        return re.split(r"[/\\]", filename)[-1].strip() if "/" in filename or "\\" in filename else filename.strip()
    return display_name(filename)


def _stray(row: Row) -> str:
    if not row.filename:
        return f"line {row.line} of the mapping has no filename"
    return f"line {row.line} of the mapping: there is no file {_shown(row.filename)} in the batch"


def _settled(name: str, row: Row | None, again: int | None, required: Sequence[str]) -> dict[str, Any] | PipelineError:
    try:
        if row is not None and again is not None:
            raise _invalid(
                "filename",
                f"the filename {_shown(name)} stands in the mapping twice: in the lines {row.line} and {again}",
            )
        return _metadata(name, row, required)
    except PipelineError as error:
        return error


def _metadata(name: str, row: Row | None, required: Sequence[str]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    if row is not None:
        if row.fault is not None:
            field, problem = row.fault
            raise _invalid(field, f"line {row.line} of the mapping: {_shown(field)}: {problem}", line=row.line)
        for field, value in row.fields.items():
            kept = _value(field, value, row.line)
            if kept not in ("", []):
                checked[field] = kept
    missing = [field for field in required if field not in checked]
    if missing:
        where = (
            f"line {row.line} of the mapping"
            if row is not None
            else f"there is no row of {_shown(name)} in the mapping"
        )
        raise _invalid(missing[0], f"{where}: {', '.join(missing)} must be given", missing=missing)
    return check_metadata(checked)


def _value(field: str, value: Value, line: int) -> str | list[str]:
    if not 1 <= len(field) <= MAX_NAME_CHARS:
        raise _invalid(
            field[:MAX_NAME_CHARS], f"line {line} of the mapping: a name has {len(field):,} characters, not 1 to "
            f"{MAX_NAME_CHARS}", line=line,
        )  # fmt: skip
    if field == "tags":
        return _tags(value, line)
    if isinstance(value, bool) and field not in KNOWN_FIELDS:
        return "true" if value else "false"
    if not isinstance(value, str) or (isinstance(value, JsonNumber) and field in KNOWN_FIELDS):
        raise _wrong(field, value, "text", line)
    text = str(value).strip()
    if field == "date_created" and text:
        _require_date(text, line)
    return text


def _tags(value: Value, line: int) -> list[str]:
    if isinstance(value, str) and not isinstance(value, JsonNumber):
        members: list[Any] = value.split(",")
    elif type(value) is list and all(type(item) is str for item in value):
        members = value
    else:
        raise _wrong("tags", value, "a list of texts", line)
    return list(dict.fromkeys(tag for member in members if (tag := member.strip())))


def _require_date(text: str, line: int) -> None:
    try:
        if _DATE.fullmatch(text) is None:
            raise ValueError(text)
        date.fromisoformat(text)
    except ValueError as error:
        raise _wrong("date_created", text, "a date as 2026-01-31", line) from error


def _wrong(field: str, value: object, allowed: str, line: int) -> PipelineError:
    kinds = {bool: "true or false", JsonNumber: "a number", JsonObject: "an object", list: "a list"}
    shown = _shown(value) if type(value) is str else kinds[type(value)]
    return _invalid(field, f"line {line} of the mapping: {field} is {shown}, it must be {allowed}", line=line)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")


def _invalid(field: str, message: str, **details: Any) -> PipelineError:
    whole = f"{message[:1].upper()}{message[1:]}. Mend the mapping and send the file again."
    return PipelineError(ErrorCode.INVALID_METADATA, whole, {"field": field, **details})
