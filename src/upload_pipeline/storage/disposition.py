"""The Content-Disposition header that makes a browser save a file under its name."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote

_UNESCAPED = "!#$&+-.^_`|~"
"""What RFC 8187 leaves unescaped beside letters and digits (`attr-char`)."""

_FALLBACK = "document"


def attachment(filename: str) -> str:
    """The header's value for a name of any characters: ASCII only, on one line, and never shown in place.

    Old clients read the name without accents and other scripts; the others the whole one (RFC 6266, RFC 8187).
    Control characters are left out of both.
    """
    name = "".join(character for character in filename if unicodedata.category(character)[0] != "C")
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    # A percent sign is decoded by some readers of the plain name, quotes and backslashes end or escape it.
    plain = "".join("_" if character in '"\\%/' else character for character in plain).strip()
    if not plain or plain.startswith("."):
        plain = _FALLBACK + plain
    value = f'attachment; filename="{plain}"'
    if name not in {"", plain}:
        value += f"; filename*=UTF-8''{quote(name, safe=_UNESCAPED)}"
    return value
