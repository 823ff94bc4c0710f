"""Identity is computed, not drawn: doing a thing twice names the same rows.

Every id is a UUIDv5 (RFC 9562, section 5.5) under a namespace of its own, so ids of different kinds never
meet even when their inputs are equal. The namespaces are constants: changing one orphans every stored row.
"""

from __future__ import annotations

from uuid import UUID, uuid5

DOCUMENT_NAMESPACE = UUID("6f0e6a52-7d0c-5b1e-9a41-3c1d5b7f2a10")
SECTION_NAMESPACE = UUID("b1c5c1b4-21f6-5d0c-8d57-4f0a9f6e7c21")
CHUNK_NAMESPACE = UUID("d2a7e9f0-5e83-5c44-a0b6-92d8e1c3f732")
USAGE_NAMESPACE = UUID("3a9d5b1e-0c47-5f62-8e19-64b2a7f0c9d5")
DELIVERY_NAMESPACE = UUID("0e7c64d9-2b8f-5a31-9d46-f1a5c3806b7e")

LOCAL_USER_ID = UUID("00000000-0000-4000-8000-000000000001")
"""Owner of what the terminal ingests when no `--user` is named."""


def document_id(user_id: UUID, file_sha256: str) -> UUID:
    """Id of the document that a user's bytes become.

    Args:
        user_id: the owner.
        file_sha256: of the raw bytes, 64 lower-case hexadecimal digits.

    Raises:
        ValueError: `file_sha256` is not such a digest.
    """
    return uuid5(DOCUMENT_NAMESPACE, f"{user_id}:{_digest(file_sha256)}")


def section_id(document: UUID, chunker: str, ordinal: int, title: str) -> UUID:
    """Id of a section of a document.

    Args:
        document: the document's id.
        chunker: name and version of the chunker that found it, as in `markdown-simple@1`.
        ordinal: the section's number in document order, from 0.
        title: the heading's text.
    """
    return uuid5(SECTION_NAMESPACE, f"{document}:{chunker}:{_ordinal(ordinal)}:{title}")


def chunk_id(document: UUID, chunker: str, ordinal: int, text_sha256: str) -> UUID:
    """Id of a chunk of a document.

    Args:
        document: the document's id.
        chunker: name and version of the chunker that cut it, as in `markdown-simple@1`.
        ordinal: the chunk's number in document order, from 0.
        text_sha256: of the chunk's UTF-8 text, 64 lower-case hexadecimal digits.

    Raises:
        ValueError: `ordinal` is negative or `text_sha256` is not such a digest.
    """
    return uuid5(CHUNK_NAMESPACE, f"{document}:{chunker}:{_ordinal(ordinal)}:{_digest(text_sha256)}")


def usage_id(provider: str, call: str) -> UUID:
    """Id of the record of what one call of a provider used.

    Args:
        provider: as prices name it.
        call: the provider's own id of the call.
    """
    return uuid5(USAGE_NAMESPACE, f"{provider}:{call}")


def delivery_id(photo: UUID, answered: UUID | None) -> UUID:
    """Id of the deliveries of a photo's message until there is an answer.

    Args:
        photo: the photo's id.
        answered: of the deliveries that were answered last; None where none were.
    """
    return uuid5(DELIVERY_NAMESPACE, f"{photo}:{answered or ''}")


def _ordinal(value: int) -> int:
    if value < 0:
        raise ValueError(f"an ordinal counts from 0, got {value}")
    return value


def _digest(value: str) -> str:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"a sha256 is 64 lower-case hexadecimal digits, got {value!r}")
    return value
