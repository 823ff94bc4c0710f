"""Files that are announced: what is said of them, and where their bytes may be sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from upload_pipeline.api.body_limit import read_body
from upload_pipeline.api.error_bodies import invalid_field
from upload_pipeline.api.public_urls import public_url
from upload_pipeline.api.received_file import named_metadata
from upload_pipeline.api.upload_bodies import UploadRequest
from upload_pipeline.errors import ErrorCode
from upload_pipeline.storage.signed_urls import Grant

if TYPE_CHECKING:
    from starlette.requests import Request

    from upload_pipeline.api.principals import Principal
    from upload_pipeline.api.resources import Resources
    from upload_pipeline.intake.reserve import ReservedUpload


@dataclass(frozen=True, slots=True)
class Target:
    """Where bytes may be sent, by one PUT.

    Attributes:
        url: a permission, so it belongs in no log.
        headers: that the request must have.
        expires_at: when it must have begun.
    """

    url: str = field(repr=False)
    headers: dict[str, str]
    expires_at: datetime


async def read_announcement(request: Request) -> UploadRequest:
    """The announcement that a request's body is.

    Raises:
        HTTPException: 413.
        RequestValidationError: it does not validate.
        PipelineError: `INVALID_METADATA`, naming the field.
    """
    body = await read_body(request)
    try:
        announced = UploadRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in problems]) from error
    return announced.model_copy(update={"metadata": _metadata(announced)})


async def sign_target(
    request: Request, resources: Resources, principal: Principal, reserved: ReservedUpload, wanted: UploadRequest
) -> Target:
    """Where the bytes of an announced file may be sent: to the store where it signs URLs, else to this service.

    A store that ends its URLs earlier than was asked for is believed; one that ends them later is not waited for.

    Raises:
        PipelineError: `STORAGE_UNAVAILABLE`, `STORAGE_DENIED`.
    """
    life = timedelta(seconds=round(resources.settings.upload_url_seconds))
    expires_at = datetime.now(UTC).replace(microsecond=0) + life
    signed = await resources.store.sign_put(
        reserved.raw_key,
        media_type=reserved.media_type,
        file_bytes=wanted.bytes_len,
        file_sha256=wanted.sha256,
        expires_in=life,
        caller_token=principal.token_for(reserved.raw_key),
    )
    if signed is not None:
        headers = {name.title(): value for name, value in signed.headers.items()}
        return Target(signed.url, headers, min(expires_at, signed.expires_at or expires_at))
    grant = Grant(
        "PUT",
        reserved.document_id,
        reserved.raw_key,
        expires_at,
        file_bytes=wanted.bytes_len,
        media_type=reserved.media_type,
        file_sha256=wanted.sha256,
    )
    path = f"/api/v2/upload/{reserved.document_id}/bytes?token={resources.signer.sign(grant)}"
    return Target(public_url(request, resources.settings, path), {"Content-Type": reserved.media_type}, expires_at)


def _metadata(announced: UploadRequest) -> dict[str, Any]:
    metadata = dict(announced.metadata)
    if announced.project_id is not None:
        given = metadata.setdefault("project_id", str(announced.project_id))
        if given != str(announced.project_id):
            raise invalid_field(
                "metadata.project_id", "it is another one than project_id; leave it out", ErrorCode.INVALID_METADATA
            )
    return named_metadata(metadata)
