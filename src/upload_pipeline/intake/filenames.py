"""The name that a file is shown under, made of whatever name came with it; never an object's key."""

from __future__ import annotations

import re
import unicodedata

MAX_FILENAME_CHARS = 255
"""Longest name kept, in characters."""

UNNAMED = "unnamed"
"""Stands in for a name of which nothing is left."""

_MAX_EXTENSION_CHARS = 32
"""What follows the last dot is an extension up to this length, and kept when the name is cut."""

# Controls, lone surrogates, line and paragraph separators.
_DROPPED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Embeddings, overrides and isolates (UAX #9, section 2): they can make a name read as another extension.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def display_name(filename: str) -> str:
    """A name that is safe to show and to store: the base name, in NFC, at most `MAX_FILENAME_CHARS` long.

    Directories (up to the last slash or backslash), control characters and lone surrogates go. A longer name is cut
    before its extension. What is left of a name of nothing else is `UNNAMED`. Doing it twice changes nothing more.
    """
    base = re.split(r"[/\\]", filename)[-1]
    kept = "".join(character for character in base if not _is_dropped(character))
    name = unicodedata.normalize("NFC", kept).strip()
    if len(name) > MAX_FILENAME_CHARS:
        name = _cut(name)
    return UNNAMED if name in {"", ".", ".."} else name


def _is_dropped(character: str) -> bool:
    return character in _BIDI_CONTROLS or unicodedata.category(character) in _DROPPED_CATEGORIES


def _cut(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem or len(extension) > _MAX_EXTENSION_CHARS:
        return name[:MAX_FILENAME_CHARS].strip()
    return stem[: MAX_FILENAME_CHARS - 1 - len(extension)].strip() + dot + extension
