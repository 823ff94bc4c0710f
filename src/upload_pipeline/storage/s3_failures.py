"""What servers that speak S3 say when they refuse."""

from __future__ import annotations

import re

from upload_pipeline.storage.encryption import KEY_SETTING, SETTING
from upload_pipeline.storage.refusals import Refusal, Vocabulary, code_of, reason_of, refusal_in

MISSING_BUCKET = "NoSuchBucket"

_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"})

# The key service's own codes come through S3 with this before them.
_KEY_SERVICE = "KMS."
# What servers without keys answer, in words that differ; S3 itself only where the header is misspelt.
_NO_ENCRYPTION = frozenset(
    {"InvalidArgument", "InvalidEncryptionAlgorithmError", "InvalidRequest", "KMSNotConfigured", "NotImplemented"}
)
_ABOUT_ENCRYPTION = re.compile(r"encrypt|\bkms\b", re.IGNORECASE)

_WORDS = Vocabulary(
    bad_credentials=frozenset(
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
    ),
    no_permission=frozenset({"AccessDenied", "AccountProblem", "AllAccessDisabled", "InvalidObjectState"}),
    identity=("/latest/api/token", "/latest/meta-data/", "169.254.170.2"),
    nobody="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role.",
    keys="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, with temporary keys, AWS_SESSION_TOKEN in this process's "
    "environment, and the clock of this machine.",
    rights="Give these credentials the policy that `upload-pipeline storage policies` prints for this process: "
    "s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload on what "
    "is in it.",
)
_KEY_RIGHTS = f"Grant these credentials kms:GenerateDataKey and kms:Decrypt on the key that {KEY_SETTING} names."


def s3_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error that came from S3.

    Args:
        error: obstore's.
        setting: the name of the setting that names the store.
    """
    code = code_of(error)
    if code is not None:
        reason = reason_of(error, code)
        if code.startswith(_KEY_SERVICE):
            remedy = f"Check the key that {KEY_SETTING} names: its region, its state and its policy."
            return Refusal(False, reason, remedy)
        if code in _NO_ENCRYPTION and _ABOUT_ENCRYPTION.search(reason):
            return Refusal(False, reason, f"Set {SETTING}=none where the server has no keys, or give it some.")
        if code in _WORDS.no_permission and "kms:" in reason:
            return Refusal(True, reason, _KEY_RIGHTS)
        if code in _WRONG_REGION:
            return Refusal(False, reason, f"Set AWS_REGION to the region of the bucket that {setting} names.")
    return refusal_in(_WORDS, error, setting)
