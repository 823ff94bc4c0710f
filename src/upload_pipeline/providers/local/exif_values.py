"""Single values of EXIF made safe: whatever a camera, or somebody who means harm, wrote there.

What comes out can be held by JSON and by Postgres: numbers, short texts without control
characters. What cannot be made sense of comes out as None.
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import datetime
from typing import Any, Final

MAX_TEXT_CHARS: Final = 200
"""The longest text of a field; a name of a camera or a lens has some 40 characters."""
_MAX_WHOLE: Final = 2**31 - 1
_MAX_NUMBER: Final = 1e9
_MIN_NUMBER: Final = 1e-9
"""No camera measures what is larger, or smaller and not zero; JSON would spell it with hundreds of digits."""

_DATE_TIME: Final = re.compile(r"(\d{4}):(\d{2}):(\d{2}) (\d{2}):(\d{2}):(\d{2})")
_OFFSET: Final = re.compile(r"([+-])(\d{2}):(\d{2})")
_FRACTION: Final = re.compile(r"\d{1,9}")
_FARTHEST_OFFSET: Final = 14
"""Hours; the zone farthest from Greenwich is UTC+14."""


def text_of(value: Any) -> str | None:
    """A text up to its first NUL, trimmed, its control characters left out; None where nothing is left.

    EXIF says ASCII; what is not is UTF-8 in practice, or else Latin-1, of which every byte is a character.
    """
    if isinstance(value, str):
        raw = value.encode("latin-1", "replace")  # Pillow decodes by Latin-1
    elif isinstance(value, bytes):
        raw = value
    else:
        return None
    raw = raw.partition(b"\x00")[0]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    # Cc: control characters, Cs: halves of surrogate pairs, Cn: code points that are none.
    kept = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cs", "Cn"))
    return kept[:MAX_TEXT_CHARS].strip() or None


def number_of(value: Any) -> float | None:
    """A number; None for NaN, for what is infinite, out of proportion or divided by zero, and for anything else."""
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, (str, bytes, tuple, bool)):
        return None
    try:
        number = float(first)
    except (TypeError, ValueError, ArithmeticError):
        return None
    if not math.isfinite(number) or abs(number) > _MAX_NUMBER:
        return None
    return number if abs(number) >= _MIN_NUMBER else 0.0


def positive_of(value: Any) -> float | None:
    """A finite number above zero; zero stands for `unknown` in the fields that are read by this."""
    number = number_of(value)
    return number if number is not None and number > 0 else None


def whole_of(value: Any) -> int | None:
    """A whole number from 0 to 2^31 - 1."""
    number = number_of(value)
    if number is None or number != int(number) or not 0 <= number <= _MAX_WHOLE:
        return None
    return int(number)


def time_of(value: Any, fraction: Any, offset: Any) -> str | None:
    """A time by ISO 8601: with its offset from UTC where the camera knew it, and else the local time.

    Args:
        value: `DateTimeOriginal` or the like, `YYYY:MM:DD hh:mm:ss`.
        fraction: the digits of the second's fraction.
        offset: `+hh:mm` or `-hh:mm`.
    """
    found = _DATE_TIME.fullmatch(text_of(value) or "")
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in found.groups())
    try:
        moment = datetime(year, month, day, hour, minute, second)  # noqa: DTZ001 - a camera's clock without a zone
    except ValueError:
        return None
    digits = text_of(fraction) or ""
    return moment.isoformat() + (f".{digits}" if _FRACTION.fullmatch(digits) else "") + _offset_of(offset)


def degrees_of(value: Any, reference: Any, *, positive: str, negative: str, limit: int) -> float | None:
    """Decimal degrees from degrees, minutes and seconds, with the sign that the reference gives.

    Args:
        value: three numbers.
        reference: one of the two letters; without it the side of the equator or of Greenwich is not known.
        positive: letter of north or east.
        negative: letter of south or west.
        limit: most degrees; 90 or 180.
    """
    side = (text_of(reference) or "").upper()
    if side not in (positive, negative) or not isinstance(value, tuple) or len(value) != 3:
        return None
    parts = [number_of(part) for part in value]
    if any(part is None or part < 0 for part in parts):
        return None
    degrees, minutes, seconds = (part or 0.0 for part in parts)
    total = degrees + minutes / 60 + seconds / 3600
    if total > limit:
        return None
    return round(total if side == positive else -total, 9) + 0.0


def _offset_of(value: Any) -> str:
    found = _OFFSET.fullmatch(text_of(value) or "")
    if found is None or int(found[3]) > 59 or int(found[2]) * 60 + int(found[3]) > _FARTHEST_OFFSET * 60:
        return ""
    return found[0]
