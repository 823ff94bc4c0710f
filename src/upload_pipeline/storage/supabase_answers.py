"""What Supabase Storage says over REST, read from the body of its answer.

The HTTP status is 400 for nearly everything that is refused; the true one stands in the body as `statusCode`, beside
a `code` (newer servers) or `error` (all). Only the gateway before it, which looks at the `apikey`, answers by status.
Sources: supabase/storage 1.11.2 and storage3 2.34.1.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage import failures

KEY_SETTING = "UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY"
POLICIES = "sql/supabase/storage_policies.sql"
"""The policies that let users' tokens do what the service asks for on their behalf."""

_MOST_SHOWN = 300

_DUPLICATE = frozenset({"Duplicate", "KeyAlreadyExists", "ResourceAlreadyExists"})
_NO_BUCKET = frozenset({"NoSuchBucket", "Bucket not found"})
_BAD_TOKEN = frozenset({"InvalidJWT", "ExpiredToken", "InvalidSignature", "invalid_jwt", "jwt"})
_ABOUT_TOKEN = re.compile(r"\b(jwt|jws)\b|\"exp\"", re.IGNORECASE)
_BUSY = frozenset({"SlowDown", "DatabaseTimeout", "TooManyRequests"})


class Verdict(StrEnum):
    """What an answer means."""

    DONE = "done"
    DUPLICATE = "duplicate"  # an object stands there, and may not be replaced
    NO_OBJECT = "no object"  # or one that policies hide
    NO_BUCKET = "no bucket"
    BAD_KEY = "bad key"  # the gateway does not know the `apikey`
    BAD_TOKEN = "bad token"  # noqa: S105 - the caller's is none of this project, or has expired
    DENIED = "denied"  # policies refuse the caller
    TRY_AGAIN = "try again"
    REFUSED = "refused"  # for any other reason


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read.

    Attributes:
        verdict: what it means.
        reason: in the server's words, on one line.
        told: what the body holds, where it was done.
    """

    verdict: Verdict
    reason: str
    told: dict[str, object]


def read_answer(status: int, body: bytes) -> Answer:
    """Reads an answer by its body, and by its status only where the body says nothing."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        told = {}
    if status < 400:
        return Answer(Verdict.DONE, "", told)
    said = str(told.get("statusCode", ""))
    true_status = int(said) if said.isdecimal() and len(said) == 3 else status
    names = {str(told.get(field, "")) for field in ("code", "error")}
    words = str(told.get("message") or told.get("error") or "") or f"status {status}"
    reason = " ".join(words.split())[:_MOST_SHOWN]
    return Answer(_verdict(true_status, names, reason, from_storage="statusCode" in told), reason, told)


def _verdict(status: int, names: set[str], reason: str, *, from_storage: bool) -> Verdict:
    if status == 429 or status >= 500 or names & _BUSY:
        return Verdict.TRY_AGAIN
    if status == 409 or names & _DUPLICATE:
        return Verdict.DUPLICATE
    if names & _NO_BUCKET:
        return Verdict.NO_BUCKET
    if status == 404:
        return Verdict.NO_OBJECT
    if names & _BAD_TOKEN or _ABOUT_TOKEN.search(reason):
        return Verdict.BAD_TOKEN
    if status in {401, 403}:
        return Verdict.DENIED if from_storage else Verdict.BAD_KEY
    return Verdict.REFUSED


def refusal(answer: Answer, action: str, key: str) -> PipelineError:
    """The error of an answer that is none of `DONE` and `DUPLICATE`.

    Args:
        answer: what came.
        action: what was tried, to complete "could not ...".
        key: of the object.
    """
    match answer.verdict:
        case Verdict.NO_OBJECT:
            return PipelineError(
                ErrorCode.OBJECT_MISSING,
                f"Supabase shows no object {key} to the caller: it was deleted, or the bucket lacks the select policy "
                f"of {POLICIES}.",
                {"key": key},
            )
        case Verdict.NO_BUCKET:
            remedy = f"Create it, or correct {failures.STORAGE_SETTING}."
            return failures.unavailable(action, "the bucket does not exist", remedy, key)
        case Verdict.BAD_KEY:
            remedy = f"Set {KEY_SETTING} to the project's publishable key."
        case Verdict.BAD_TOKEN:
            remedy = "UPLOAD_PIPELINE_JWT_ISSUER must be the project whose storage this is; sign in again."
        case Verdict.DENIED:
            remedy = f"Its policies decide about users: run {POLICIES} with this bucket and prefix."
        case _:
            remedy = f"Check the project and the bucket that {failures.STORAGE_SETTING} names, then try again."
            return failures.unavailable(action, answer.reason, remedy, key)
    message = f"Supabase did not {action}: {answer.reason}. {remedy}"
    return PipelineError(ErrorCode.STORAGE_DENIED, message, {"key": key})
