"""Names of objects: how they are made, checked and read back.

A key is never made of what a user typed. It is a few parts joined by `/`, each of ASCII letters, digits, `.`,
`_` and `-`, starting with a letter or digit, so that it means the same in every store and on every file
system. Parts that start with a dot belong to the stores themselves (the local one keeps unfinished writes in
one).
"""

from __future__ import annotations

import re
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError

MAX_KEY_BYTES = 1024
"""Longest key in bytes: the limit of S3 and GCS (both document 1,024 bytes of UTF-8)."""

MAX_PART_BYTES = 255
"""Longest part in bytes: the limit of a file name on the usual file systems (NAME_MAX)."""

INCOMING_PREFIX = "incoming"
"""Where bytes wait whose document is not known yet."""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEXT = re.compile(r"[0-9a-f]{64}\.md")
_OUTPUT = re.compile(r"[0-9a-f]{64}\.raw\.md")


class ObjectKind(StrEnum):
    """What an object of a document holds."""

    RAW = "raw"
    PARSER_OUTPUT = "parser_output"
    MARKDOWN = "markdown"


class DocumentKey(NamedTuple):
    """A key that belongs to a document, taken apart."""

    kind: ObjectKind
    user_id: UUID
    document_id: UUID


def raw_key(user_id: UUID, document_id: UUID) -> str:
    """Key of the bytes as they were uploaded."""
    return f"raw/{user_id}/{document_id}"


def parser_output_key(user_id: UUID, document_id: UUID) -> str:
    """Key of what the parser gave, kept so that one parse is never paid for twice."""
    return f"parsed/{user_id}/{document_id}.raw.md"


def hosted_output_key(user_id: UUID, document_id: UUID, parse_id: str) -> str:
    """Key of what a hosted parser gave: of each parse, so that none takes the place of one that is paid for.

    Args:
        parse_id: the provider's, of any form.
    """
    return f"{markdown_prefix(user_id, document_id)}/{sha256(parse_id.encode()).hexdigest()}.raw.md"


def markdown_key(user_id: UUID, document_id: UUID, sha256: str) -> str:
    """Key of the normalised Markdown, which chunk spans count in.

    It names the text's sha256, so that a worker that lost its lease, and perhaps is of another release, cannot put
    another text where a row says that this one is.
    """
    return f"{markdown_prefix(user_id, document_id)}/{sha256}.md"


def markdown_prefix(user_id: UUID, document_id: UUID) -> str:
    """What the keys of all texts of a document begin with: the present one, and those of earlier parses."""
    return f"parsed/{user_id}/{document_id}"


def uploader_of(raw: str) -> UUID:
    """Whose upload a document's raw key names, and with it all keys of that document.

    Not the row's `user_id`: a document that an anonymous session uploaded may have become a user's since, and its
    objects stay where they are.

    Raises:
        PipelineError: `INVALID_KEY` where the key is none that `raw_key` makes.
    """
    parsed = parse_key(raw)
    if parsed is None or parsed.kind is not ObjectKind.RAW:
        raise PipelineError(
            ErrorCode.INVALID_KEY,
            f"The object key {_shown(raw)} is not the raw key of a document. Make keys with the functions of "
            "storage.keys.",
            {"key": _shown(raw)},
        )
    return parsed.user_id


def incoming_key(upload_id: UUID) -> str:
    """Key under which an upload is streamed until its sha256, and so its document, is known."""
    return f"{INCOMING_PREFIX}/{upload_id}"


def validate_key(key: str) -> str:
    """Gives the key back if it may be used.

    Raises:
        PipelineError: `INVALID_KEY`, saying what is wrong with it.
    """
    fault = _fault(key)
    if fault is not None:
        raise PipelineError(
            ErrorCode.INVALID_KEY,
            f"The object key {_shown(key)} is not allowed: {fault}. Make keys with the functions of storage.keys.",
            {"key": _shown(key)},
        )
    return key


def is_valid_key(key: str) -> bool:
    """Whether `validate_key` would accept the key."""
    return _fault(key) is None


def parse_key(key: str) -> DocumentKey | None:
    """Takes a document's key apart; `None` for a key that the functions above would not make for one."""
    match key.split("/"):
        case ["raw", user, name]:
            kind = ObjectKind.RAW
        case ["parsed", user, name] if name.endswith(".raw.md"):
            kind, name = ObjectKind.PARSER_OUTPUT, name.removesuffix(".raw.md")
        case ["parsed", user, name, text] if _TEXT.fullmatch(text):
            kind = ObjectKind.MARKDOWN
        case ["parsed", user, name, output] if _OUTPUT.fullmatch(output):
            kind = ObjectKind.PARSER_OUTPUT
        case _:
            return None
    user_id, document_id = _canonical_uuid(user), _canonical_uuid(name)
    if user_id is None or document_id is None:
        return None
    return DocumentKey(kind, user_id, document_id)


def is_incoming_key(key: str) -> bool:
    """Whether `incoming_key` could have made the key."""
    match key.split("/"):
        case [prefix, name]:
            return prefix == INCOMING_PREFIX and _canonical_uuid(name) is not None
        case _:
            return False


def _fault(key: str) -> str | None:
    if not key:
        return "it is empty"
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in key):
        return "it contains a NUL or another control character"
    if "\\" in key:
        return "it contains a backslash"
    if not key.isascii():
        return "it contains characters outside ASCII"
    if len(key) > MAX_KEY_BYTES:
        return f"it is {len(key)} bytes long, the limit is {MAX_KEY_BYTES}"
    if key.startswith("/"):
        return "it is absolute"
    for part in key.split("/"):
        if not part:
            return "it has an empty part"
        if part in {".", ".."}:
            return f"it has the part {part!r}, which leads elsewhere"
        if len(part) > MAX_PART_BYTES:
            return f"it has a part of {len(part)} bytes, the limit is {MAX_PART_BYTES}"
        if _PART.fullmatch(part) is None:
            return f"its part {part!r} is not a letter or digit, then letters, digits, '.', '_' and '-'"
    return None


def _shown(key: str) -> str:
    return ascii(key if len(key) <= 100 else key[:100] + "...")


def _canonical_uuid(text: str) -> UUID | None:
    try:
        value = UUID(text)
    except ValueError:
        return None
    # UUID() also reads braces, urn: and upper case, none of which a key of ours has.
    return value if str(value) == text else None
