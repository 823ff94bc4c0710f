"""What servers that speak S3 say when they refuse, found in the text of obstore's errors.

obstore keeps the status, not the code that S3 puts into the body; but only the code tells a missing bucket from
a missing object, and a wrong key from a missing permission.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from upload_pipeline.storage.encryption import KEY_SETTING, SETTING

MISSING_BUCKET = "NoSuchBucket"

_BAD_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidIdentityToken",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_NO_PERMISSION = frozenset({"AccessDenied", "AccountProblem", "AllAccessDisabled", "InvalidObjectState"})
_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"})

_CODE = re.compile(r"<Code>([\w.]+)</Code>")
# How obstore tells of one key that S3 did not delete among others: no XML is left of it.
_NOT_DELETED = re.compile(r"DeleteObjects request failed for key .*: (?P<message>.*) \(code: (?P<code>[\w.]+)\)")
# The key service's own codes come through S3 with this before them.
_KEY_SERVICE = "KMS."
# What servers without keys answer, in words that differ; S3 itself only where the header is misspelt.
_NO_ENCRYPTION = frozenset(
    {"InvalidArgument", "InvalidEncryptionAlgorithmError", "InvalidRequest", "KMSNotConfigured", "NotImplemented"}
)
_ABOUT_ENCRYPTION = re.compile(r"encrypt|\bkms\b", re.IGNORECASE)

_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")

# Where obstore asks for a role when the environment has no key.
_METADATA = ("/latest/api/token", "/latest/meta-data/", "169.254.170.2")

_KEYS = (
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, with temporary keys, AWS_SESSION_TOKEN in this process's "
    "environment, and the clock of this machine."
)
_RIGHTS = (
    "Give these credentials the policy that `upload-pipeline storage policies` prints for this process: s3:ListBucket "
    "on the bucket, and s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload on what is in it."
)
_KEY_RIGHTS = f"Grant these credentials kms:GenerateDataKey and kms:Decrypt on the key that {KEY_SETTING} names."


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


def s3_code(error: Exception) -> str | None:
    """The code in S3's answer that made the error; `None` where there is none."""
    text = str(error)
    match = _CODE.search(text)
    if match is not None:
        return match[1]
    match = _NOT_DELETED.search(text)
    return match["code"] if match else None


def s3_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error that came from S3.

    Args:
        error: obstore's.
        setting: the name of the setting that names the store.
    """
    text = str(error)
    code = s3_code(error)
    if code is None:
        if any(part in text for part in _METADATA):
            return Refusal(
                True,
                "there are no credentials, neither in the environment nor of a role",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role.",
            )
        return None
    message = _MESSAGE.search(text) or _NOT_DELETED.search(text)
    reason = f"{code}: {message[1].strip().rstrip('.')}" if message else code
    if code == MISSING_BUCKET:
        return Refusal(False, "the bucket does not exist", f"Create it, or correct {setting}.")
    if code.startswith(_KEY_SERVICE):
        return Refusal(False, reason, f"Check the key that {KEY_SETTING} names: its region, its state and its policy.")
    if code in _NO_ENCRYPTION and _ABOUT_ENCRYPTION.search(reason):
        return Refusal(False, reason, f"Set {SETTING}=none where the server has no keys, or give it some.")
    if code in _NO_PERMISSION and "kms:" in reason:
        return Refusal(True, reason, _KEY_RIGHTS)
    if code in _BAD_CREDENTIALS:
        return Refusal(True, reason, _KEYS)
    if code in _NO_PERMISSION:
        return Refusal(True, reason, _RIGHTS)
    if code in _WRONG_REGION:
        return Refusal(False, reason, f"Set AWS_REGION to the region of the bucket that {setting} names.")
    return Refusal(False, reason, f"Check the bucket that {setting} names, then try again.")
