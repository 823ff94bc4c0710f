"""What `STORAGE_URL` may say, and what it names. The only place that knows its schemes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ALLOWED = (
    "file:///<absolute path>",
    "s3://<bucket>[/<prefix>]",
    "supabase://<project>/<bucket>[/<prefix>]",
    "gs://<bucket>[/<prefix>]",
    "az://<container>[/<prefix>]",
)
"""The forms of a storage URL, for messages."""

MAX_PREFIX_BYTES = 512
"""Longest prefix in a bucket: with the longest key of ours it stays within the 1,024 bytes that S3 takes."""

_PREFIX_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# A project's reference, or where a gateway of one's own is reached.
_PROJECT = re.compile(r"[a-z0-9]{3,63}")
_HOST = re.compile(r"([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class _Names:
    """How a kind of bucket is named, and where its credentials belong."""

    form: str
    name: re.Pattern[str]
    rule: str
    credentials: str


_S3 = _Names(
    ALLOWED[1],
    re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"),
    "a bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens",
    "credentials and endpoint are no part of it but of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)",
)
_SUPABASE = _Names(
    ALLOWED[2],
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"),
    "a bucket's name has up to 100 letters, digits, dots, underscores and hyphens; the project is its reference, or "
    "the host of your own gateway, with supabase+http:// in the place of supabase:// where that has no TLS",
    "credentials are no part of it but of the environment (AWS_ACCESS_KEY_ID)",
)
_GOOGLE = _Names(
    ALLOWED[3],
    re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
    "a bucket's name has 3 to 222 lower-case letters, digits, dots, underscores and hyphens",
    "credentials are no part of it but of the environment (GOOGLE_APPLICATION_CREDENTIALS)",
)
_AZURE = _Names(
    ALLOWED[4],
    re.compile(r"(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*"),
    "a container's name has 3 to 63 lower-case letters, digits and single hyphens",
    "account and key are no part of it but of the environment (AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY)",
)


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


@dataclass(frozen=True, slots=True)
class SupabaseBucket:
    """A bucket of Supabase Storage.

    Attributes:
        gateway: URL of the project's gateway, without a path.
        name: of the bucket.
        prefix: as of a `Bucket`.
    """

    gateway: str
    name: str
    prefix: str


@dataclass(frozen=True, slots=True)
class GoogleBucket:
    """A bucket of Google Cloud Storage; see `Bucket`."""

    name: str
    prefix: str


@dataclass(frozen=True, slots=True)
class AzureContainer:
    """A container of Azure Blob Storage; see `Bucket`."""

    name: str
    prefix: str


Address = Directory | Bucket | SupabaseBucket | GoogleBucket | AzureContainer
"""Whatever a storage URL names."""


def parse_storage_url(url: str) -> Address:
    """Takes a storage URL apart, as it stands: nothing in it is percent-decoded.

    Raises:
        ValueError: saying what is wrong with it, without repeating it.
    """
    scheme, separator, rest = url.partition("://")
    if separator and "\0" not in rest:
        match scheme:
            case "file" if rest.startswith("/") and rest.strip("/"):
                return Directory(Path(rest))
            case "s3":
                return Bucket(*_named(rest, _S3))
            case "supabase" | "supabase+http":
                gateway, _, place = rest.partition("/")
                return SupabaseBucket(_gateway(scheme, gateway), *_named(place, _SUPABASE))
            case "gs":
                return GoogleBucket(*_named(rest, _GOOGLE))
            case "az":
                return AzureContainer(*_named(rest, _AZURE))
    forms = f"{', '.join(ALLOWED[:-1])} and {ALLOWED[-1]}"
    raise ValueError(f"it must be one of {forms}, as in file:///var/lib/upload-pipeline/storage")


def _gateway(scheme: str, place: str) -> str:
    if scheme == "supabase" and _PROJECT.fullmatch(place):
        return f"https://{place}.supabase.co"
    if _HOST.fullmatch(place) is None:
        raise ValueError(f"it must be {_SUPABASE.form}; {_SUPABASE.rule}; {_SUPABASE.credentials}")
    return f"{'https' if scheme == 'supabase' else 'http'}://{place}"


def _named(rest: str, names: _Names) -> tuple[str, str]:
    """Name and prefix."""
    name, _, prefix = rest.partition("/")
    if names.name.fullmatch(name) is None:
        raise ValueError(f"it must be {names.form}, and {names.rule}; {names.credentials}")
    prefix = prefix.rstrip("/")
    if prefix and not all(_PREFIX_PART.fullmatch(part) for part in prefix.split("/")):
        raise ValueError(
            f"it must be {names.form}, and each part of a prefix is a letter or digit, then letters, digits, "
            "dots, underscores and hyphens"
        )
    if len(prefix) > MAX_PREFIX_BYTES:
        raise ValueError(f"its prefix may have {MAX_PREFIX_BYTES} bytes")
    return name, prefix
