"""Opens a bucket of Google Cloud Storage, by the usual `GOOGLE_*` environment variables."""

from __future__ import annotations

import os

from obstore.exceptions import BaseError
from obstore.store import GCSStore

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.google_failures import google_refusal
from upload_pipeline.storage.google_urls import GoogleUrls, account_key
from upload_pipeline.storage.http_bounds import RETRIES, client_options, plain_http
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage_address import GoogleBucket

_ENDPOINT_VARIABLES = ("GOOGLE_BASE_URL",)


def open_google_bucket(bucket: GoogleBucket, public_endpoint: str = "") -> ObstoreBackend:
    """Opens a bucket; asks nothing of it yet.

    Args:
        bucket: which.
        public_endpoint: where others reach it by the URLs that are signed for them; empty: where this process does.

    Raises:
        PipelineError: `SETTING_INVALID` for environment variables that do not fit.
    """
    options = client_options(allow_http=plain_http(_ENDPOINT_VARIABLES, "GOOGLE_ALLOW_HTTP"))
    prefix = bucket.prefix or None
    try:
        key = account_key(os.environ)
        place = GCSStore(bucket.name, prefix=prefix, client_options=options, retry_config=RETRIES)
        shown = place
        if public_endpoint:
            shown = GCSStore(bucket.name, prefix=prefix, config={"base_url": public_endpoint.rstrip("/")})
    except (BaseError, ValueError, OSError) as error:
        # What a JSON parser quotes of a key file is the key.
        reason = type(error).__name__ if isinstance(error, ValueError) else str(error).strip().splitlines()[0]
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The bucket {bucket.name} cannot be opened with the GOOGLE_* variables of the environment: {reason}. "
            "GOOGLE_APPLICATION_CREDENTIALS names the key file of a service account, as JSON.",
            {"setting": "GOOGLE_*"},
        ) from error
    return ObstoreBackend(place, GoogleUrls(place, shown, key) if key else None, google_refusal)
