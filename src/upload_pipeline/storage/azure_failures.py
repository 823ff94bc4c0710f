"""What Azure Blob Storage says when it refuses ("Blob service error codes" and "Common REST API error codes")."""

from __future__ import annotations

from upload_pipeline.storage.refusals import Refusal, code_of, missing_bucket, no_bucket, reason_of

_BAD_CREDENTIALS = frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"})
_NO_PERMISSION = frozenset(
    {
        "AccountIsDisabled",
        "AuthorizationFailure",
        "AuthorizationPermissionMismatch",
        "AuthorizationProtocolMismatch",
        "AuthorizationResourceTypeMismatch",
        "InsufficientAccountPermissions",
        "KeyBasedAuthenticationNotPermitted",
        "PublicAccessNotPermitted",
    }
)

# Where obstore asks for the machine's own identity when the environment names none.
_METADATA = ("169.254.169.254", "/metadata/identity/")

_KEYS = (
    "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in this process's environment, and the clock of "
    "this machine."
)
_RIGHTS = "Grant the identity the role Storage Blob Data Contributor on the container, and allow it in the firewall."


def azure_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error that came from Azure.

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
                "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give this machine an identity.",
            )
        return None
    if missing_bucket(error):
        return no_bucket(setting)
    reason = reason_of(error, code)
    if code in _BAD_CREDENTIALS:
        return Refusal(True, reason, _KEYS)
    if code in _NO_PERMISSION:
        return Refusal(True, reason, _RIGHTS)
    return Refusal(False, reason, f"Check the container that {setting} names, then try again.")
