"""What Google Cloud Storage says when it refuses (its XML API, "HTTP status and error codes")."""

from __future__ import annotations

from upload_pipeline.storage.refusals import Refusal, Vocabulary, refusal_in

_WORDS = Vocabulary(
    bad_credentials=frozenset(
        {
            "AuthenticationRequired",
            "ExpiredToken",
            "InvalidSecurity",
            "RequestTimeTooSkewed",
            "SignatureDoesNotMatch",
            "UserProjectMissing",
        }
    ),
    no_permission=frozenset({"AccessDenied", "AccountProblem", "UserProjectAccountProblem"}),
    identity=("metadata.google.internal", "169.254.169.254"),
    nobody="Set GOOGLE_APPLICATION_CREDENTIALS to a service account's key file, or give this machine an account.",
    keys="Check the service account that GOOGLE_APPLICATION_CREDENTIALS names in this process's environment, and the "
    "clock of this machine.",
    rights="Grant the service account the role roles/storage.objectUser on the bucket.",
)


def google_refusal(error: Exception, setting: str) -> Refusal | None:
    """What is known of an error of obstore's that came from Google Cloud Storage; see `refusal_in`."""
    return refusal_in(_WORDS, error, setting)
