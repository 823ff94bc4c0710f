"""What `STORAGE_URL` may say, and what it names. The only place that knows its schemes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ALLOWED = ("file:///<absolute path>", "s3://<bucket>[/<prefix>]")
"""The forms of a storage URL, for messages."""

MAX_PREFIX_BYTES = 512
"""Longest prefix in a bucket: with the longest key of ours it stays within the 1,024 bytes that S3 takes."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of this machine."""

    path: Path


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of a server that speaks S3.

    Attributes:
        name: of the bucket.
        prefix: what every key in it starts with, without slashes at its ends; may be empty.
    """

    name: str
    prefix: str


def parse_storage_url(url: str) -> Directory | Bucket:
    """Takes a storage URL apart, as it stands: nothing in it is percent-decoded.

    Raises:
        ValueError: saying what is wrong with it, without repeating it.
    """
    scheme, separator, rest = url.partition("://")
    if separator and "\0" not in rest:
        if scheme == "file" and rest.startswith("/") and rest.strip("/"):
            return Directory(Path(rest))
        if scheme == "s3":
            return _bucket(rest)
    raise ValueError(f"it must be one of {' and '.join(ALLOWED)}, as in file:///var/lib/upload-pipeline/storage")


def _bucket(rest: str) -> Bucket:
    name, _, prefix = rest.partition("/")
    if _BUCKET.fullmatch(name) is None:
        raise ValueError(
            f"it must be {ALLOWED[1]}, and a bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens; "
            "credentials and endpoint are no part of it but of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"
        )
    prefix = prefix.rstrip("/")
    if prefix and not all(_PREFIX_PART.fullmatch(part) for part in prefix.split("/")):
        raise ValueError(
            f"it must be {ALLOWED[1]}, and each part of a prefix is a letter or digit, then letters, digits, "
            "dots, underscores and hyphens"
        )
    if len(prefix) > MAX_PREFIX_BYTES:
        raise ValueError(f"its prefix may have {MAX_PREFIX_BYTES} bytes")
    return Bucket(name, prefix)
