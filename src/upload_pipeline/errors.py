"""The closed list of error codes, and the one exception that carries them.

A code says three things to whoever meets it: what kind of thing went wrong, whether trying again can help,
and which HTTP status it is. Job failures, intake refusals, the terminal and the API all use this list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every code that a caller, an operator or a row of `job_outcomes` can meet."""

    # the file itself
    EMPTY_FILE = "EMPTY_FILE"
    FILE_TOO_SMALL = "FILE_TOO_SMALL"
    FILE_TOO_LARGE = "FILE_TOO_LARGE"
    FILE_NOT_FOUND = "FILE_NOT_FOUND"
    FILE_UNREADABLE = "FILE_UNREADABLE"
    FILE_CHANGED = "FILE_CHANGED"
    UNSUPPORTED_TYPE = "UNSUPPORTED_TYPE"
    TYPE_MISMATCH = "TYPE_MISMATCH"
    ENCRYPTED = "ENCRYPTED"
    CORRUPT_FILE = "CORRUPT_FILE"
    CORRUPT_IMAGE = "CORRUPT_IMAGE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    MALWARE_FOUND = "MALWARE_FOUND"
    # what came with it
    INVALID_METADATA = "INVALID_METADATA"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    INVALID_MAPPING = "INVALID_MAPPING"
    INVALID_ARCHIVE = "INVALID_ARCHIVE"
    BATCH_TOO_LARGE = "BATCH_TOO_LARGE"
    # the object store
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    STORAGE_DENIED = "STORAGE_DENIED"
    INSUFFICIENT_STORAGE = "INSUFFICIENT_STORAGE"
    INVALID_KEY = "INVALID_KEY"
    OBJECT_MISSING = "OBJECT_MISSING"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    UPLOAD_EXPIRED = "UPLOAD_EXPIRED"
    # the virus scanner
    SCANNER_UNAVAILABLE = "SCANNER_UNAVAILABLE"
    # parsing, chunking, embedding
    PARSE_FAILED = "PARSE_FAILED"
    PARSE_EMPTY = "PARSE_EMPTY"
    PARSE_TIMEOUT = "PARSE_TIMEOUT"
    PARSE_MEMORY = "PARSE_MEMORY"
    PARSE_CRASHED = "PARSE_CRASHED"
    PARSE_UNAVAILABLE = "PARSE_UNAVAILABLE"
    PARSE_QUOTA = "PARSE_QUOTA"
    PARSE_DENIED = "PARSE_DENIED"
    PARSE_REJECTED = "PARSE_REJECTED"
    EMBED_FAILED = "EMBED_FAILED"
    EMBED_REJECTED = "EMBED_REJECTED"
    EMBED_QUOTA = "EMBED_QUOTA"
    EMBED_DENIED = "EMBED_DENIED"
    REQUEST_OVER_BUDGET = "REQUEST_OVER_BUDGET"
    # detection in photos
    DETECT_UNAVAILABLE = "DETECT_UNAVAILABLE"
    DETECT_TIMEOUT = "DETECT_TIMEOUT"
    DETECT_QUOTA = "DETECT_QUOTA"
    DETECT_DENIED = "DETECT_DENIED"
    DETECT_REJECTED = "DETECT_REJECTED"
    DETECT_FAILED = "DETECT_FAILED"
    # jobs
    LEASE_LOST = "LEASE_LOST"
    STAGE_TIMEOUT = "STAGE_TIMEOUT"
    WORKER_LOST = "WORKER_LOST"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DOCUMENT_NOT_FOUND = "DOCUMENT_NOT_FOUND"
    BATCH_NOT_FOUND = "BATCH_NOT_FOUND"
    PHOTO_NOT_FOUND = "PHOTO_NOT_FOUND"
    PROJECT_NOT_FOUND = "PROJECT_NOT_FOUND"
    ORGANIZATION_NOT_FOUND = "ORGANIZATION_NOT_FOUND"
    CANCELLED = "CANCELLED"
    DOCUMENT_NOT_READY = "DOCUMENT_NOT_READY"
    INVALID_STATE = "INVALID_STATE"
    INVALID_STAGE = "INVALID_STAGE"
    # who is calling, how, and how often
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    SIGNED_URL_INVALID = "SIGNED_URL_INVALID"
    SIGNED_URL_EXPIRED = "SIGNED_URL_EXPIRED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    LENGTH_REQUIRED = "LENGTH_REQUIRED"
    RATE_LIMITED = "RATE_LIMITED"
    TOO_MANY_OPEN_JOBS = "TOO_MANY_OPEN_JOBS"
    CAPACITY = "CAPACITY"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    ISSUER_UNAVAILABLE = "ISSUER_UNAVAILABLE"
    # this installation
    SETTING_INVALID = "SETTING_INVALID"
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    MIGRATIONS_PENDING = "MIGRATIONS_PENDING"
    MIGRATION_FAILED = "MIGRATION_FAILED"
    INTERNAL = "INTERNAL"


RETRYABLE: frozenset[ErrorCode] = frozenset(
    {
        ErrorCode.FILE_CHANGED,
        ErrorCode.STORAGE_UNAVAILABLE,
        ErrorCode.INSUFFICIENT_STORAGE,
        ErrorCode.SCANNER_UNAVAILABLE,
        ErrorCode.PARSE_TIMEOUT,
        ErrorCode.PARSE_UNAVAILABLE,
        ErrorCode.PARSE_QUOTA,
        ErrorCode.PARSE_DENIED,
        ErrorCode.EMBED_FAILED,
        ErrorCode.EMBED_QUOTA,
        ErrorCode.EMBED_DENIED,
        ErrorCode.DETECT_UNAVAILABLE,
        ErrorCode.DETECT_TIMEOUT,
        ErrorCode.DETECT_QUOTA,
        ErrorCode.DETECT_DENIED,
        ErrorCode.STAGE_TIMEOUT,
        ErrorCode.WORKER_LOST,
        ErrorCode.DOCUMENT_NOT_READY,
        ErrorCode.DATABASE_UNAVAILABLE,
        ErrorCode.INTERNAL,
    }
)
"""Codes after which doing the same again can succeed; all others dead-letter a job at once."""

HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.EMPTY_FILE: 400,
    ErrorCode.FILE_TOO_SMALL: 400,
    ErrorCode.FILE_TOO_LARGE: 413,
    ErrorCode.FILE_NOT_FOUND: 400,
    ErrorCode.FILE_UNREADABLE: 400,
    ErrorCode.FILE_CHANGED: 409,
    ErrorCode.UNSUPPORTED_TYPE: 415,
    ErrorCode.TYPE_MISMATCH: 415,
    ErrorCode.ENCRYPTED: 400,
    ErrorCode.CORRUPT_FILE: 400,
    ErrorCode.CORRUPT_IMAGE: 400,
    ErrorCode.IMAGE_TOO_LARGE: 413,
    ErrorCode.MALWARE_FOUND: 400,
    ErrorCode.INVALID_METADATA: 400,
    ErrorCode.INVALID_ARGUMENT: 400,
    ErrorCode.INVALID_MAPPING: 400,
    ErrorCode.INVALID_ARCHIVE: 400,
    ErrorCode.BATCH_TOO_LARGE: 400,
    ErrorCode.STORAGE_UNAVAILABLE: 503,
    ErrorCode.STORAGE_DENIED: 503,
    ErrorCode.INSUFFICIENT_STORAGE: 507,
    ErrorCode.INVALID_KEY: 400,
    ErrorCode.OBJECT_MISSING: 409,
    ErrorCode.CHECKSUM_MISMATCH: 400,
    ErrorCode.UPLOAD_EXPIRED: 410,
    ErrorCode.SCANNER_UNAVAILABLE: 503,
    ErrorCode.PARSE_FAILED: 400,
    ErrorCode.PARSE_EMPTY: 400,
    ErrorCode.PARSE_TIMEOUT: 503,
    ErrorCode.PARSE_MEMORY: 400,
    ErrorCode.PARSE_CRASHED: 400,
    ErrorCode.PARSE_UNAVAILABLE: 503,
    ErrorCode.PARSE_QUOTA: 503,
    ErrorCode.PARSE_DENIED: 503,
    ErrorCode.PARSE_REJECTED: 400,
    ErrorCode.EMBED_FAILED: 503,
    ErrorCode.EMBED_REJECTED: 400,
    ErrorCode.EMBED_QUOTA: 503,
    ErrorCode.EMBED_DENIED: 503,
    ErrorCode.REQUEST_OVER_BUDGET: 400,
    ErrorCode.DETECT_UNAVAILABLE: 503,
    ErrorCode.DETECT_TIMEOUT: 503,
    ErrorCode.DETECT_QUOTA: 503,
    ErrorCode.DETECT_DENIED: 503,
    ErrorCode.DETECT_REJECTED: 400,
    ErrorCode.DETECT_FAILED: 400,
    ErrorCode.LEASE_LOST: 409,
    ErrorCode.STAGE_TIMEOUT: 503,
    ErrorCode.WORKER_LOST: 503,
    ErrorCode.JOB_NOT_FOUND: 404,
    ErrorCode.DOCUMENT_NOT_FOUND: 404,
    ErrorCode.BATCH_NOT_FOUND: 404,
    ErrorCode.PHOTO_NOT_FOUND: 404,
    ErrorCode.PROJECT_NOT_FOUND: 404,
    ErrorCode.ORGANIZATION_NOT_FOUND: 404,
    ErrorCode.CANCELLED: 409,
    ErrorCode.DOCUMENT_NOT_READY: 409,
    ErrorCode.INVALID_STATE: 409,
    ErrorCode.INVALID_STAGE: 409,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.SIGNED_URL_INVALID: 403,
    ErrorCode.SIGNED_URL_EXPIRED: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.LENGTH_REQUIRED: 411,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.TOO_MANY_OPEN_JOBS: 429,
    ErrorCode.CAPACITY: 503,
    ErrorCode.TOO_MANY_STREAMS: 429,
    ErrorCode.ISSUER_UNAVAILABLE: 503,
    ErrorCode.SETTING_INVALID: 503,
    ErrorCode.DATABASE_UNAVAILABLE: 503,
    ErrorCode.MIGRATIONS_PENDING: 503,
    ErrorCode.MIGRATION_FAILED: 503,
    ErrorCode.INTERNAL: 500,
}
"""The status of an HTTP answer that carries the code; a test sees to it that every code has one."""


@dataclass
class PipelineError(Exception):
    """Something went wrong that has a name.

    Attributes:
        code: what kind of thing it is; decides whether a job is retried.
        message: one or two sentences for a person: what is wrong, and what to do about it.
        details: facts for a machine (limits, sizes, names); JSON-serialisable, never secrets.
    """

    code: ErrorCode
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        # The parser's process hands its error to the worker's through a pipe.
        return (type(self), (self.code, self.message, self.details))

    @property
    def retryable(self) -> bool:
        """Whether the same work may succeed on another try."""
        return self.code in RETRYABLE

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
