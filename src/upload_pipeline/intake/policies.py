"""Taking an insurance policy in: a PDF like any other, and what its sender says of the product.

The bytes of a policy that are a document already go the whole way too: the policy is made, or mended, by the statement
that makes documents, and only beside an object that was seen to be there.
"""

from __future__ import annotations

import re
from datetime import date

from upload_pipeline.database import policies
from upload_pipeline.database.documents import AcceptedDocument
from upload_pipeline.database.policies import PolicyFacts
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import place_and_record
from upload_pipeline.intake.placing import addressed
from upload_pipeline.intake.staging import Intake, StagedFile, Terms
from upload_pipeline.media_types import PDF

MAX_TEXT_CHARS = 200
"""As the columns of `policies` have it."""

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def policy_terms(max_bytes: int) -> Terms:
    """PDFs, by content and by name, of at most so many bytes."""
    return Terms(max_bytes, frozenset({PDF}), frozenset({".pdf"}))


def policy_text(field: str, value: str) -> str:
    """The name of an insurer or a product, without spaces around it.

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming the field.
    """
    text = value.strip()
    if not 1 <= len(text) <= MAX_TEXT_CHARS:
        raise _invalid(field, f"it has {len(text)} characters, it must have 1 to {MAX_TEXT_CHARS}")
    if not text.isprintable():
        raise _invalid(field, "it contains a character that cannot be shown")
    return text


def launch_date(field: str, value: str) -> date:
    """The day from which a product is sold.

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming the field.
    """
    if _DATE.fullmatch(value) is None:
        raise _invalid(field, "it must be a date as YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise _invalid(field, f"there is no such day ({error})") from error


async def accept_policy(intake: Intake, staged: StagedFile, facts: PolicyFacts) -> AcceptedDocument:
    """Makes policy, document and job of a staged file; of known bytes the policy, saying what is said now.

    To be called while what staged it is entered: leaving that by this function's exception removes what was staged.

    Raises:
        PipelineError: as `accept_file` does once the bytes are stored.
    """
    arrival = staged.arrival
    staged = await addressed(intake, staged)
    return await place_and_record(
        intake,
        staged,
        lambda: policies.accept_policy(
            intake.db,
            facts,
            document_id=staged.document_id,
            user_id=arrival.user_id,
            filename=arrival.filename,
            media_type=staged.media_type,
            file_bytes=staged.size,
            file_sha256=staged.sha256,
            raw_key=staged.raw_key,
            metadata=arrival.metadata,
            priority=arrival.priority,
            correlation_id=arrival.correlation_id,
        ),
    )


def _invalid(field: str, problem: str) -> PipelineError:
    return PipelineError(
        ErrorCode.INVALID_ARGUMENT,
        f"The request does not validate: {field}: {problem}.",
        {"fields": [{"field": field, "problem": problem}]},
    )
