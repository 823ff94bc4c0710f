"""The OpenAPI document made whole: what every answer has, and an example of every error.

FastAPI writes down what a route says of itself. It cannot know what holds for all of them: the correlation id, the
common form of errors (it assumes a 422 of its own, which no route here answers), the headers of a 429.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from upload_pipeline.api.batch_bodies import BatchForm
from upload_pipeline.api.detection_bodies import DetectionReport
from upload_pipeline.api.error_bodies import ErrorBody, documented_errors
from upload_pipeline.api.policy_bodies import PolicyForm
from upload_pipeline.api.upload_bodies import UploadForm, UploadRequest
from upload_pipeline.api.webhooks import ParseMessage
from upload_pipeline.errors import HTTP_STATUS, ErrorCode

if TYPE_CHECKING:
    from fastapi import FastAPI

_METHODS = frozenset({"get", "put", "post", "delete", "patch"})
_ERROR_REF = {"$ref": "#/components/schemas/ErrorBody"}
_UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")
_STREAMED_BODIES = (UploadRequest, UploadForm, PolicyForm, BatchForm, ParseMessage, DetectionReport)
"""Bodies that routes read themselves and refer to by name: FastAPI does not know them."""
_ALWAYS = (400, 413, 500, 503)
"""What any route can answer: to a body or a Host that is none, to a body that is too large, and faults of ours."""

_CORRELATION = {
    "description": "Names this request in the logs, the events and the errors that follow from it.",
    "schema": {"type": "string", "maxLength": 200},
    "example": "5c1d5f5a-4f0e-4a36-9c53-6f7d9c1f2b10",
}
_CORRELATION_PARAMETER = {
    "name": "X-Correlation-ID",
    "in": "header",
    "required": False,
    "description": "A name of your own for this request; without one it is given one.",
    "schema": {"type": "string"},
}
_RETRY_AFTER = {"description": "Seconds to wait before trying again.", "schema": {"type": "integer"}, "example": 17}
_LIMIT_HEADERS = {
    "X-RateLimit-Limit": {"description": "Requests that the limit allows.", "schema": {"type": "integer"}},
    "X-RateLimit-Remaining": {"description": "Requests that are left.", "schema": {"type": "integer"}},
    "X-RateLimit-Reset": {
        "description": "When the limit is whole again, in seconds since 1970.",
        "schema": {"type": "integer"},
    },
}

_EXAMPLES: dict[int, tuple[ErrorCode, str, dict[str, Any]]] = {
    400: (
        ErrorCode.INVALID_ARGUMENT,
        "The request does not validate: limit: Input should be less than or equal to 100.",
        {"fields": [{"field": "limit", "problem": "Input should be less than or equal to 100"}]},
    ),
    401: (ErrorCode.UNAUTHENTICATED, "The token is not accepted: it has expired. Sign in again.", {}),
    403: (ErrorCode.FORBIDDEN, "This is not allowed to you.", {}),
    404: (ErrorCode.NOT_FOUND, "There is no such thing.", {}),
    408: (ErrorCode.REQUEST_TIMEOUT, "No more of the body came for too long. Send the request again.", {}),
    409: (
        ErrorCode.INVALID_STATE,
        "Job 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11 is working. Wait for it to end, or cancel it first.",
        {"job_id": "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11", "state": "working", "stage": "parsing"},
    ),
    411: (ErrorCode.LENGTH_REQUIRED, "The header Content-Length is missing.", {}),
    413: (ErrorCode.FILE_TOO_LARGE, "The body is larger than this route takes.", {}),
    415: (ErrorCode.UNSUPPORTED_TYPE, "This is not a type that is taken.", {}),
    429: (
        ErrorCode.RATE_LIMITED,
        "Too many requests: the limit is 10. Try again in 6 s.",
        {"limit": 10, "remaining": 0, "reset": 1795251606, "retry_after": 6},
    ),
    500: (
        ErrorCode.INTERNAL,
        "Something went wrong here. Try again; if it stays, name the correlation id to the operator of this service.",
        {},
    ),
    503: (
        ErrorCode.DATABASE_UNAVAILABLE,
        "The service cannot answer this at the moment. Try again in a few seconds.",
        {},
    ),
}


def install_openapi(app: FastAPI) -> None:
    """Makes `app.openapi()` the whole document; made once, when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            app.openapi_schema = _completed(made)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in _UNUSED_SCHEMAS:
        schemas.pop(unused, None)
    for model in (ErrorBody, *_STREAMED_BODIES):
        made = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, schema in made.pop("$defs", {}).items():
            schemas.setdefault(name, schema)
        schemas.setdefault(model.__name__, made)
    for path in document["paths"].values():
        for method, operation in path.items():
            if method in _METHODS:
                _complete(method, operation)
    return document


def _complete(method: str, operation: dict[str, Any]) -> None:
    operation.setdefault("parameters", []).append(_CORRELATION_PARAMETER)
    responses = operation["responses"]
    responses.pop("422", None)
    more = [*_ALWAYS]
    if "requestBody" in operation:
        more.append(408)
    # a session that a page of somebody else's would use
    if method != "get" and "401" in responses:
        more.append(403)
    for status in more:
        described = documented_errors(status)[status]["description"]
        responses.setdefault(
            str(status), {"description": described, "content": {"application/json": {"schema": _ERROR_REF}}}
        )
    for status, response in responses.items():
        headers = response.setdefault("headers", {})
        headers["X-Correlation-ID"] = _CORRELATION
        if status in ("429", "503", "507"):
            headers["Retry-After"] = _RETRY_AFTER
        if status == "429":
            headers.update(_LIMIT_HEADERS)
        content = response.get("content", {}).get("application/json")
        if content is not None and content.get("schema") == _ERROR_REF and status.isdigit():
            content.setdefault("example", _example(int(status)))


def _example(status: int) -> dict[str, Any]:
    fallback = next((code for code, its_status in HTTP_STATUS.items() if its_status == status), ErrorCode.INTERNAL)
    code, message, details = _EXAMPLES.get(status, (fallback, "What is wrong, and what to do.", {}))
    return {
        "error": {
            "code": code.value,
            "message": message,
            "details": details,
            "correlation_id": _CORRELATION["example"],
        }
    }
