"""How many texts fit into one request to a hosted embedder.

Its tokens are counted by a bound that needs no vocabulary: for English text it says about twice what a tokenizer finds,
for code, figures and other scripts at least as much. It is never less than a quarter of the text's bytes, which is what
OpenAI's own guess is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MAX_REQUEST_TOKENS = 290_000
"""Most tokens of a request by `bound_tokens`; OpenAI refuses 300,000."""

_SHAPE = bytes(ord("a") if chr(byte) in "abcdefghijklmnopqrstuvwxyz" else ord(".") for byte in range(256))


def bound_tokens(text: str) -> int:
    """No fewer tokens than a byte-pair tokenizer makes of a text, short of texts made to defeat it.

    White space begins a word, so each counts one; small letters that stand together make a token of three or more, and
    one of what is left; of everything else no token holds less than a byte.
    """
    shape = text.encode("utf-8", "replace").translate(_SHAPE)
    return len(shape.replace(b"aaa", b"t").replace(b"aa", b"t")) or 1


def pack(texts: Sequence[str], *, most: int, tokens: int = MAX_REQUEST_TOKENS) -> Iterator[tuple[int, int]]:
    """Parts of a list, as (start, end), none with more texts than `most` or more tokens than `tokens` by the bound.

    A text that is larger by itself is a part of its own.
    """
    start, held = 0, 0
    for position, text in enumerate(texts):
        size = bound_tokens(text)
        if position > start and (position - start == most or held + size > tokens):
            yield start, position
            start, held = position, 0
        held += size
    if start < len(texts):
        yield start, len(texts)
