"""Why a bucket's server refused, found in the text of obstore's errors.

obstore keeps the status, not the code that S3, Google Cloud Storage and Azure alike put into an XML body; but only
the code tells a missing bucket from a missing object, and a wrong key from a missing permission. A HEAD has no body;
Azure's stands in a header, which obstore does not show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MISSING_BUCKETS = frozenset({"NoSuchBucket", "ContainerNotFound"})
"""What says that it is the bucket which is missing, and no object in it."""

_CODE = re.compile(r"<Code>([\w.]+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")
# How obstore tells of one key that S3 did not delete among others: no XML is left of it.
_NOT_DELETED = re.compile(r"DeleteObjects request failed for key .*: (?P<message>.*) \(code: (?P<code>[\w.]+)\)")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a server refused.

    Attributes:
        denied: whether permission or credentials are the cause.
        reason: in a few words.
        remedy: what to do, in a sentence.
    """

    denied: bool
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of a kind of store, and what to do about each.

    Attributes:
        bad_credentials: codes of credentials that are no good.
        no_permission: codes of credentials that do not suffice.
        identity: where obstore asks for the machine's own identity when the environment names none.
        nobody: the remedy where there are no credentials at all.
        keys: the remedy of bad credentials.
        rights: the remedy of missing permissions.
        bucket: what the store calls one.
    """

    bad_credentials: frozenset[str]
    no_permission: frozenset[str]
    identity: tuple[str, ...]
    nobody: str
    keys: str
    rights: str
    bucket: str = "bucket"


RefusalOf = Callable[[Exception, str], Refusal | None]
"""What a kind of store knows of an error of obstore's; the second is the name of the setting that names the store."""


def code_of(error: Exception) -> str | None:
    """The code in the answer that made the error; `None` where there is none."""
    text = str(error)
    match = _CODE.search(text)
    if match is not None:
        return match[1]
    match = _NOT_DELETED.search(text)
    return match["code"] if match else None


def reason_of(error: Exception, code: str) -> str:
    """The code with what the answer says besides, on one line."""
    message = _MESSAGE.search(str(error)) or _NOT_DELETED.search(str(error))
    if message is None:
        return code
    # Azure appends an id and the time on further lines.
    return f"{code}: {message[1].strip().splitlines()[0].rstrip('.')}"


def missing_bucket(error: Exception) -> bool:
    """Whether an error says that the bucket itself does not exist."""
    return code_of(error) in MISSING_BUCKETS


def no_bucket(setting: str) -> Refusal:
    """The refusal of a bucket that is not there."""
    return Refusal(False, "the bucket does not exist", f"Create it, or correct {setting}.")


def refusal_in(words: Vocabulary, error: Exception, setting: str) -> Refusal | None:
    """What is known of an error in a store's words.

    Args:
        words: the store's.
        error: obstore's.
        setting: the name of the setting that names the store.
    """
    code = code_of(error)
    if code is None:
        if any(part in str(error) for part in words.identity):
            return Refusal(
                True, "there are no credentials, neither in the environment nor of this machine", words.nobody
            )
        return None
    if missing_bucket(error):
        return no_bucket(setting)
    reason = reason_of(error, code)
    if code in words.bad_credentials:
        return Refusal(True, reason, words.keys)
    if code in words.no_permission:
        return Refusal(True, reason, words.rights)
    return Refusal(False, reason, f"Check the {words.bucket} that {setting} names, then try again.")
