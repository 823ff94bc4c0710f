"""What Google Cloud Storage says when it refuses (its XML API, "HTTP status and error codes")."""

from __future__ import annotations

from upload_pipeline.storage.refusals import Refusal, code_of, missing_bucket, no_bucket, reason_of

_BAD_CREDENTIALS = frozenset(
    {
        "AuthenticationRequired",
        "ExpiredToken",
        "InvalidSecurity",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UserProjectMissing",
    }
)
_NO_PERMISSION = frozenset({"AccessDenied", "AccountProblem", "UserProjectAccountProblem"})

# Where obstore asks for the machine's own account when the environment names none.
_METADATA = ("metadata.google.internal", "169.254.169.254")

_KEYS = (
    "Check the service account that GOOGLE_APPLICATION_CREDENTIALS names in this process's environment, and the clock "
    "of this machine."
)
_RIGHTS = "Grant the service account the role roles/storage.objectUser on the bucket."


def google_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error that came from Google Cloud Storage.

    Args:
        error: obstore's.
        setting: the name of the setting that names the store.
    """
    code = code_of(error)
    if code is None:
        if any(part in str(error) for part in _METADATA):
            return Refusal(
                True,
                "there are no credentials, neither in the environment nor of this machine",
                "Set GOOGLE_APPLICATION_CREDENTIALS to a service account's key file, or give this machine an account.",
            )
        return None
    if missing_bucket(error):
        return no_bucket(setting)
    reason = reason_of(error, code)
    if code in _BAD_CREDENTIALS:
        return Refusal(True, reason, _KEYS)
    if code in _NO_PERMISSION:
        return Refusal(True, reason, _RIGHTS)
    return Refusal(False, reason, f"Check the bucket that {setting} names, then try again.")
