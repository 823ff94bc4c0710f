"""Log lines: one event with named fields a line, JSON in production and readable on a terminal.

Fields bound with `structlog.contextvars` (job_id, document_id, user_id, correlation_id, stage) stand on every line
that follows from them. Lines go to standard error, so that standard output stays the command's own.
"""

from __future__ import annotations

import logging
import sys
from uuid import UUID

import structlog

from upload_pipeline.settings import Settings


def configure_logs(settings: Settings) -> None:
    """Sets up structlog for this process, as `LOG_LEVEL` and `LOG_FORMAT` say. Called once, at the start."""
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _ids_as_text,
    ]
    if readable:
        shared.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        # Without local variables: a request's hold its credentials.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared += [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _ids_as_text(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Ids are bound as they are and become text here: most lines that could be written are not."""
    for name, value in event.items():
        if isinstance(value, UUID):
            event[name] = str(value)
    return event
