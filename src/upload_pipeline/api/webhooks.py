"""What hosted providers tell of their jobs. Nobody signs in here: a message is signed."""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from upload_pipeline.api.body_limit import read_body
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.resources import AppResources
from upload_pipeline.database.parse_submissions import wake_parse
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.llamaparse import WEBHOOK_PATH
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_pipeline.providers.llamaparse_webhook import MAX_BYTES, SIGNATURE_HEADER, ended_parse, is_signed

log = structlog.get_logger(__name__)

router = APIRouter(tags=["service"])


class ParseMessageData(BaseModel):
    """What a message is about."""

    job_id: str = Field(description="LlamaParse's id of the parse.", examples=["pjb-4c1f"])


class ParseMessage(BaseModel):
    """A message of LlamaParse, as far as it is read."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"event_type": "parse.success", "data": {"job_id": "pjb-4c1f"}}]}
    )

    event_type: str = Field("", description="`parse.pending` and `parse.running` change nothing.")
    data: ParseMessageData


# Read as it came, since the signature is of its bytes.
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The message, or a string that holds it as JSON.",
        "content": {
            "application/json": {
                "schema": {"anyOf": [{"$ref": "#/components/schemas/ParseMessage"}, {"type": "string"}]}
            }
        },
    }
}


@router.post(
    WEBHOOK_PATH,
    status_code=204,
    summary="Be told by LlamaParse that a parse has ended",
    responses=documented_errors(403, 404, 408, 413, 503),
    openapi_extra=_BODY,
)
async def receive_llamaparse_webhook(
    request: Request,
    resources: AppResources,
    signature: Annotated[
        str, Header(alias=SIGNATURE_HEADER, description="`sha256=` and the HMAC of the body in hexadecimal digits.")
    ] = "",
) -> None:
    """For LlamaParse: a document whose parse has ended is looked at now, and not at its next turn.

    A message is a hint: repeated, late, out of order or about a job that nobody waits for it changes nothing, and the
    answer is the same. 404 where no secret is set.
    """
    secret = resources.settings.llamaparse_webhook_secret.get_secret_value()
    if not secret:
        raise PipelineError(ErrorCode.NOT_FOUND, "This service takes no messages of LlamaParse: it has no secret.")
    raw = await read_body(request, MAX_BYTES)
    if not is_signed(raw, signature, secret):
        raise PipelineError(
            ErrorCode.FORBIDDEN, f"The message is not signed: {SIGNATURE_HEADER} is missing or of another secret."
        )
    parse_id = ended_parse(raw)
    woken = 0 if parse_id is None else await wake_parse(resources.db, provider=PROVIDER, parse_id=parse_id)
    log.info("parse_webhook", parse_id=parse_id, woken=woken)
