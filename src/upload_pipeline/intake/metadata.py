"""What a user may say about a file: a flat JSON object, small enough to stand in the document's row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError

MAX_METADATA_BYTES = 16 * 1024
"""Limit of the whole as JSON in UTF-8."""

MAX_KEY_CHARS = 100

_ALLOWED = "a string, a number, true or false, or a list of these"


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a copy of the metadata if it can be stored as it is and found again.

    Args:
        metadata: keys of 1 to `MAX_KEY_CHARS` characters; each value a string, a finite number, a boolean or a list
            of these.

    Raises:
        PipelineError: `INVALID_METADATA`, naming the key and what is allowed.
    """
    if not isinstance(metadata, Mapping):
        raise _invalid(f"The metadata is {type(metadata).__name__}, it must be an object of names and values.")
    for key, value in metadata.items():
        _check_key(key)
        members = value if isinstance(value, list | tuple) else [value]
        for member in members:
            _check_value(key, member)
    checked = dict(metadata)
    size = len(json.dumps(checked, ensure_ascii=False).encode())
    if size > MAX_METADATA_BYTES:
        largest = max(checked, key=lambda key: len(json.dumps(checked[key])))
        raise _invalid(
            f"The metadata is {size} bytes as JSON, the limit is {MAX_METADATA_BYTES}. Its largest value is that of "
            f"{largest!r}: shorten it.",
            key=largest,
            bytes=size,
            max_bytes=MAX_METADATA_BYTES,
        )
    return checked


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise _invalid(f"The metadata key {key!r} is not a string.", key=repr(key))
    if not 1 <= len(key) <= MAX_KEY_CHARS:
        shown = key[:MAX_KEY_CHARS]
        raise _invalid(
            f"The metadata key {shown!r} has {len(key)} characters, it must have 1 to {MAX_KEY_CHARS}.", key=shown
        )
    if (fault := _text_fault(key)) is not None:
        raise _invalid(f"The metadata key {key!r} contains {fault}, which cannot be stored.", key=ascii(key))


def _check_value(key: str, value: object) -> None:
    if isinstance(value, str):
        if (fault := _text_fault(value)) is not None:
            raise _invalid(f"The metadata value of {key!r} contains {fault}, which cannot be stored.", key=key)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _invalid(f"The metadata value of {key!r} is {value}, it must be a finite number.", key=key)
    elif isinstance(value, int):
        # Far beyond what any reader of JSON keeps exactly, and Python refuses to print some thousand digits.
        if value.bit_length() > 1024:
            raise _invalid(f"The metadata value of {key!r} is too large a number: the limit is 1024 bits.", key=key)
    else:
        kind = "null" if value is None else type(value).__name__
        raise _invalid(f"The metadata value of {key!r} is or contains {kind}, it must be {_ALLOWED}.", key=key)


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half of a surrogate pair"
    return None


def _invalid(message: str, **details: Any) -> PipelineError:
    return PipelineError(ErrorCode.INVALID_METADATA, message, details)
