"""What Azure Blob Storage says when it refuses ("Blob service error codes" and "Common REST API error codes")."""

from __future__ import annotations

from upload_pipeline.storage.refusals import Refusal, Vocabulary, refusal_in

_WORDS = Vocabulary(
    bad_credentials=frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"}),
    no_permission=frozenset(
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
    ),
    identity=("169.254.169.254", "/metadata/identity/"),
    nobody="Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give this machine an identity.",
    keys="Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in this process's environment, and the clock "
    "of this machine.",
    rights="Grant the identity the role Storage Blob Data Contributor on the container, and allow it in the firewall.",
    bucket="container",
)


def azure_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error of obstore's that came from Azure; see `refusal_in`."""
    return refusal_in(_WORDS, error, setting)
