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
    FILE_TOO_LARGE = "FILE_TOO_LARGE"
    FILE_NOT_FOUND = "FILE_NOT_FOUND"
    FILE_UNREADABLE = "FILE_UNREADABLE"
    FILE_CHANGED = "FILE_CHANGED"
    UNSUPPORTED_TYPE = "UNSUPPORTED_TYPE"
    TYPE_MISMATCH = "TYPE_MISMATCH"
    ENCRYPTED = "ENCRYPTED"
    CORRUPT_FILE = "CORRUPT_FILE"
    # what came with it
    INVALID_METADATA = "INVALID_METADATA"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    # the object store
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    STORAGE_DENIED = "STORAGE_DENIED"
    INVALID_KEY = "INVALID_KEY"
    OBJECT_MISSING = "OBJECT_MISSING"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    # parsing, chunking, embedding
    PARSE_FAILED = "PARSE_FAILED"
    PARSE_EMPTY = "PARSE_EMPTY"
    PARSE_TIMEOUT = "PARSE_TIMEOUT"
    PARSE_MEMORY = "PARSE_MEMORY"
    PARSE_CRASHED = "PARSE_CRASHED"
    EMBED_FAILED = "EMBED_FAILED"
    # jobs
    LEASE_LOST = "LEASE_LOST"
    STAGE_TIMEOUT = "STAGE_TIMEOUT"
    WORKER_LOST = "WORKER_LOST"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DOCUMENT_NOT_FOUND = "DOCUMENT_NOT_FOUND"
    INVALID_STATE = "INVALID_STATE"
    INVALID_STAGE = "INVALID_STAGE"
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
        ErrorCode.PARSE_TIMEOUT,
        ErrorCode.EMBED_FAILED,
        ErrorCode.STAGE_TIMEOUT,
        ErrorCode.WORKER_LOST,
        ErrorCode.DATABASE_UNAVAILABLE,
        ErrorCode.INTERNAL,
    }
)
"""Codes after which doing the same again can succeed; all others dead-letter a job at once."""


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
