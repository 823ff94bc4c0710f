"""Errors as HTTP answers: one body for all of them, a status by code, nothing of our insides.

{"error": {"code": "…", "message": "…", "details": {…}, "correlation_id": "…"}}
"""

from __future__ import annotations

import json
import math
from typing import Any

import asyncpg
import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from upload_pipeline.database.failures import translate
from upload_pipeline.database.rate_limits import BucketState
from upload_pipeline.errors import HTTP_STATUS, ErrorCode, PipelineError

log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS = 5
"""What a 503 asks for: long enough for a restart of the database, short enough for a person who waits."""

_DATABASE_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionError,
    TimeoutError,
)

_LIMIT_HEADERS = {
    "retry_after": "Retry-After",
    "limit": "X-RateLimit-Limit",
    "remaining": "X-RateLimit-Remaining",
    "reset": "X-RateLimit-Reset",
}

# Of failures of ours the caller learns what to do, and the log what happened.
_OWN_FAILURES = {
    500: "Something went wrong here. Try again; if it stays, name the correlation id to the operator of this service.",
    503: "The service cannot answer this at the moment. Try again in a few seconds.",
    507: "There is no room for this at the moment, and nothing of it was kept. Try again later.",
}


_FULL = (
    "There is no room for as many bytes at the moment, and none of them were taken. Send them again in a while, or "
    "in smaller batches."
)


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: ErrorCode = Field(description="What kind of thing it is; from a closed list.")
    message: str = Field(description="For a person: what is wrong and what to do.")
    details: dict[str, Any] = Field(
        description="Facts for a machine. Where a request does not validate: `fields`, each a `field` and a `problem`."
    )
    correlation_id: str = Field(description="Names this request in the logs; as the header `X-Correlation-ID`.")


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The argument `responses` of a route that answers errors with these statuses, for the OpenAPI document."""
    return {status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in statuses}


_DESCRIPTIONS = {
    400: "The request is not as it should be; `details.fields` tells which part",
    401: "No credentials, or bad ones",
    403: "Known, but not allowed",
    404: "There is no such thing, or it is somebody else's",
    405: "Not a method of this path",
    408: "The body did not come in time",
    409: "The present state does not allow this",
    410: "Its time is over",
    411: "The length of the body is missing",
    413: "Larger than the limit",
    415: "Not a type that is taken",
    429: "A limit is reached; `Retry-After` tells for how long",
    500: "A fault of ours",
    503: "Not available at the moment",
    507: "No room to store it at the moment",
}


def invalid_field(field: str, problem: str, code: ErrorCode = ErrorCode.INVALID_ARGUMENT) -> PipelineError:
    """The error for a part of a request that does not validate, as FastAPI's own validation has it.

    Args:
        field: the part, as the caller named it.
        problem: what is wrong with it, without a full stop.
        code: where there is a more exact one.
    """
    return PipelineError(
        code,
        f"The request does not validate: {field}: {problem}.",
        {"fields": [{"field": field, "problem": problem}]},
    )


def rate_limited(state: BucketState) -> PipelineError:
    """The error of a bucket that had no token."""
    seconds = max(1, math.ceil(state.retry_after))
    return PipelineError(
        ErrorCode.RATE_LIMITED,
        f"Too many requests: the limit is {state.limit}. Try again in {seconds} s.",
        {
            "limit": state.limit,
            "remaining": state.remaining,
            "reset": math.ceil(state.full_at.timestamp()),
            "retry_after": seconds,
        },
    )


def error_response(error: PipelineError, correlation_id: str, status: int | None = None) -> Response:
    """The answer for an error; its message and details only where the cause is not ours (a status below 500).

    Args:
        error: what went wrong.
        correlation_id: of the request.
        status: where a route's contract has another one than the code's.
    """
    status = status or HTTP_STATUS[error.code]
    sent: dict[str, str] = {}
    if status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    if status in (503, 507):
        sent["Retry-After"] = str(RETRY_AFTER_SECONDS)
    sent |= {header: str(error.details[name]) for name, header in _LIMIT_HEADERS.items() if status == 429}
    return _response(
        status,
        error.code,
        _FULL if error.code is ErrorCode.CAPACITY else _OWN_FAILURES.get(status, error.message),
        {} if status in _OWN_FAILURES else error.details,
        correlation_id,
        sent,
    )


def fault_response(error: Exception, correlation_id: str) -> Response:
    """The answer for an exception that nobody expected."""
    return error_response(PipelineError(ErrorCode.INTERNAL, type(error).__name__), correlation_id)


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of every route an answer of the common form."""
    app.add_exception_handler(PipelineError, _on_pipeline_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for failure in _DATABASE_FAILURES:
        app.add_exception_handler(failure, _on_database_failure)


async def _on_pipeline_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PipelineError)  # noqa: S101 - registered for this class
    if HTTP_STATUS[error.code] >= 500:
        log.error("request_failed", code=error.code, error=error.message, details=error.details)
    return error_response(error, request.state.correlation_id)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    fields = [_field(item) for item in error.errors()]
    named = "; ".join(f"{item['field']}: {item['problem']}" for item in fields[:5])
    return error_response(
        PipelineError(ErrorCode.INVALID_ARGUMENT, f"The request does not validate: {named}.", {"fields": fields}),
        request.state.correlation_id,
    )


def _field(item: dict[str, Any]) -> dict[str, str]:
    source, *path = item["loc"]
    if item["type"] == "json_invalid":  # its path is the place of the character where JSON ends
        return {"field": str(source), "problem": item["msg"]}
    return {"field": ".".join(str(part) for part in path) or str(source), "problem": item["msg"]}


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    code, message = _OF_STATUS.get(error.status_code, (ErrorCode.INVALID_ARGUMENT, str(error.detail)))
    return _response(error.status_code, code, message, {}, request.state.correlation_id, dict(error.headers or {}))


_OF_STATUS = {
    401: (ErrorCode.UNAUTHENTICATED, "Credentials are needed."),
    403: (ErrorCode.FORBIDDEN, "This is not allowed to you."),
    404: (ErrorCode.NOT_FOUND, "There is nothing at this path. `/docs` lists what there is."),
    405: (ErrorCode.METHOD_NOT_ALLOWED, "This path does not have that method; the header Allow names its methods."),
    408: (ErrorCode.REQUEST_TIMEOUT, "No more of the body came for too long. Send the request again."),
    413: (ErrorCode.FILE_TOO_LARGE, "The body is larger than this route takes."),
}


async def _on_database_failure(request: Request, error: Exception) -> Response:
    named = translate(error, f"answer {request.method} {request.url.path}")
    if isinstance(named, PipelineError):
        return await _on_pipeline_error(request, named)
    raise error


def _response(
    status: int,
    code: ErrorCode,
    message: str,
    details: dict[str, Any],
    correlation_id: str,
    headers: dict[str, str],
) -> Response:
    body = {
        "error": {
            "code": code,
            "message": message,
            "details": jsonable_encoder(details),
            "correlation_id": correlation_id,
        }
    }
    # A caller's own text comes back in messages: surrogates that no UTF-8 has must not make the answer fail.
    content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return Response(content, status, headers, media_type="application/json")
