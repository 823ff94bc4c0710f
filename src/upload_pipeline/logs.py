"""Log lines: one event with named fields a line, JSON in production and readable on a terminal.

What `log_fields` holds (job_id, document_id, user_id, correlation_id, stage) stands on every line of the task that set
it. Lines go to standard error, so that standard output stays the command's own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from uuid import UUID

import structlog

from upload_pipeline.settings import Settings

log_fields: ContextVar[Mapping[str, object]] = ContextVar("log_fields", default={})  # noqa: B039 - never changed in place
"""Fields of every line that this task, and what it starts, writes. One variable: setting one a field costs more than
most lines that could be written are worth."""


def configure_logs(settings: Settings) -> None:
    """Sets up structlog for this process, as `LOG_LEVEL` and `LOG_FORMAT` say. Called once, at the start."""
    # Tracebacks without local variables: those hold URLs with passwords, and the text of users' files.
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        _with_fields,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _ids_as_text,
    ]
    if readable:
        plain = structlog.dev.RichTracebackFormatter(show_locals=False)
        shared.append(structlog.dev.ConsoleRenderer(exception_formatter=plain))
    else:
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared += [structlog.processors.ExceptionRenderer(transformer), structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _with_fields(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {**log_fields.get(), **event}


def _ids_as_text(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Ids are bound as they are and become text here: most lines that could be written are not."""
    for name, value in event.items():
        if isinstance(value, UUID):
            event[name] = str(value)
    return event
