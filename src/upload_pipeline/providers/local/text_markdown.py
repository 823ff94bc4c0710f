"""Bytes to text: plain text and Markdown, and the character set of anything that is text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from charset_normalizer import from_bytes

from upload_pipeline.media_types import byte_order_mark

_SAMPLE_BYTES = 256 * 1024
"""How much of a long text the statistical detection looks at."""

# Codecs that Python counts as text but no document is in; some take quadratic time.
_NEVER = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined", "utf-7", "mbcs", "oem"})

# Letters beyond ASCII that each language of Western Europe uses. A single-byte text whose letters all belong to
# one of them is that language in Windows-1252; statistics are a poor judge of so few bytes.
_WESTERN_LETTERS: tuple[frozenset[str], ...] = tuple(
    frozenset(letters + letters.upper())
    for letters in (
        "äöüßéèàç",  # German, with loan words
        "àâæçéèêëîïôœùûüÿ",  # French
        "áéíñóúüç",  # Spanish
        "àáâãçéêíóôõúü",  # Portuguese
        "àèéìíîòóùú",  # Italian
        "áàèéëêïíóöôúü",  # Dutch
        "åäöéüà",  # Swedish, Finnish
        "åæøéèêóòôü",  # Danish, Norwegian
        "áéíóúýþæðö",  # Icelandic
        "àçèéíïòóúü",  # Catalan
        "áéíóúàèìòù",  # Irish, Scottish Gaelic
    )
)
_WORD_SIGN_WORD = re.compile(r"[^\W\d_][¡-©«-±´-¹»-¿×÷][^\W\d_]")
"""A sign between two letters: what a letter of another code page looks like in Windows-1252."""


def text_markdown(content: bytes) -> str:
    """The text of a plain-text or Markdown file, decoded and otherwise untouched."""
    return decode(content)


def decode(content: bytes, declared: Iterable[str] = ()) -> str:
    """Decodes text in whatever character set it is.

    In this order: the byte order mark, the character sets that the content declares, UTF-8,
    Windows-1252 where the letters are those of one Western language, statistics, Windows-1252.

    Args:
        content: the whole text.
        declared: names of character sets as the content gives them; unknown or wrong ones are passed over.

    Returns:
        The text; bytes that are not in its character set stand as U+FFFD.
    """
    mark = byte_order_mark(content)
    if mark is not None:
        return content.decode(mark, "replace")
    for label in (*declared, "utf-8"):
        text = _try(content, label)
        if text is not None:
            return text
    western = _try(content, "cp1252")
    if western is not None and _looks_western(western):
        return western
    guess = from_bytes(content[:_SAMPLE_BYTES]).best()
    if guess is not None:
        text = _try(content, guess.encoding)
        if text is not None:
            return text
    return content.decode("cp1252", "replace")


def _try(content: bytes, label: str) -> str | None:
    try:
        codec = codecs.lookup(label.strip())
        # Pages that say Latin-1 or ASCII mean Windows-1252 (WHATWG Encoding Standard, section 4.2).
        name = "cp1252" if codec.name in ("iso8859-1", "ascii") else codec.name.replace("_", "-")
        return None if name in _NEVER else content.decode(name)
    except (LookupError, ValueError):
        return None


def _looks_western(text: str) -> bool:
    letters = {character for character in text if character > "\x7f" and character.isalpha()} - {"ª", "º"}
    return any(letters <= known for known in _WESTERN_LETTERS) and _WORD_SIGN_WORD.search(text) is None
