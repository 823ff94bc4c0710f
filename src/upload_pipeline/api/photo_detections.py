"""The callback of a team's own model. Nobody signs in here: the message is signed."""

from __future__ import annotations

import time
from typing import Annotated
from uuid import UUID

import asyncpg
import structlog
from fastapi import APIRouter, Header, Path, Request

from upload_pipeline.api.body_limit import read_body
from upload_pipeline.api.detection_bodies import DetectionsTaken, read_report
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.resources import AppResources
from upload_pipeline.database.photo_detections import answer_detections, detection_types_of
from upload_pipeline.database.queue import NOT_FOUND
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.detection import MAX_DETECTIONS
from upload_pipeline.signed_messages import SIGNATURE_HEADER, check_signature
from upload_pipeline.stages import PhotoStatus

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/api/v1/photos", tags=["photos"])

MAX_CALLBACK_BYTES = MAX_DETECTIONS * 16 * 1024
"""As many detections as there may be, each as long as it may be, and every character of it escaped."""

# Read as it came, since the signature is of its bytes.
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/DetectionReport"}}},
    }
}


@router.post(
    "/{photo_id}/detections",
    summary="Answer a photo's message, as the model behind the detector webhook",
    responses=documented_errors(400, 401, 404, 408, 409, 413),
    openapi_extra=_BODY,
)
async def report_detections(
    request: Request,
    photo_id: Annotated[UUID, Path(description="Of the message.")],
    resources: AppResources,
    signature: Annotated[
        str,
        Header(
            alias=SIGNATURE_HEADER,
            description="`t=<seconds since 1970>,v1=<hex HMAC-SHA256 of `t`, a dot and the body>`, not older than 5 "
            "minutes.",
        ),
    ] = "",
) -> DetectionsTaken:
    """Ends the photo's job: `completed` with what was found, or `failed` with the `error`.

    The same answer again is 200 and changes nothing; another one than before is 409. Late answers are taken, also once
    the job has given up waiting; not those of a photo that was cancelled (409) or deleted (404). 404 too where no
    secret is set.
    """
    secret = resources.settings.detection_secret.get_secret_value()
    if not secret:
        raise PipelineError(ErrorCode.NOT_FOUND, "This service takes no answers of a model: it has no secret.")
    raw = await read_body(request, MAX_CALLBACK_BYTES)
    check_signature(signature, raw, secret, now=time.time())
    types = await detection_types_of(resources.db, photo_id)
    if types is None:
        raise _no_photo(photo_id)
    answer = read_report(raw, photo_id, types)
    try:
        taken = await answer_detections(
            resources.db,
            photo_id,
            detections=answer.detections,
            error=answer.error,
            answer_sha256=answer.sha256,
        )
    except asyncpg.PostgresError as error:
        if error.sqlstate == NOT_FOUND:
            raise _no_photo(photo_id) from error
        raise
    log.info("detections_reported", photo_id=photo_id, taken=taken, failed=answer.error is not None)
    status = PhotoStatus.COMPLETED if answer.error is None else PhotoStatus.FAILED
    return DetectionsTaken(photo_id=photo_id, status=status, repeated=not taken)


def _no_photo(photo_id: UUID) -> PipelineError:
    return PipelineError(
        ErrorCode.NOT_FOUND, f"There is no photo {photo_id}. It may have been deleted.", {"photo_id": str(photo_id)}
    )
