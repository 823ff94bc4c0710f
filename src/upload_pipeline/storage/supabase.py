"""Opens a bucket of Supabase Storage: its bytes by the project's S3 endpoint, its signed URLs by its REST API.

The S3 keys see the whole project and no policy holds them back; they stay in this process. Its S3 replaces what
stands under a key whatever a request says (`If-None-Match` is not heeded), keeps no versions and knows no encryption
headers: nothing here relies on any of them.
Source: supabase/storage 1.11.2, routes `s3`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import S3Store

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.http_bounds import RETRIES, client_options
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.supabase_urls import SupabaseUrls
from upload_pipeline.storage_address import SupabaseBucket

API_PATH = "/storage/v1"
"""Where the gateway has the REST API; the S3 endpoint is below it."""

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_ENCRYPTION = ("AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED")
"""What obstore would read of the environment, and ask for with each write."""


def open_supabase_bucket(
    bucket: SupabaseBucket, *, public_endpoint: str = "", publishable_key: str = ""
) -> ObstoreBackend:
    """Opens a bucket; asks nothing of it yet.

    Args:
        bucket: which.
        public_endpoint: where others reach the project's gateway; empty: where this process does.
        publishable_key: of the project; empty: no URLs are signed.

    Raises:
        PipelineError: `SETTING_INVALID` for environment variables that are missing or do not fit.
    """
    check_keys(os.environ)
    api = bucket.gateway + API_PATH
    try:
        place = S3Store(
            bucket.name,
            prefix=bucket.prefix or None,
            config={"aws_endpoint_url_s3": f"{api}/s3", "virtual_hosted_style_request": False},
            client_options=client_options(allow_http=urlsplit(api).scheme == "http"),
            retry_config=RETRIES,
        )
    except (BaseError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The bucket {bucket.name} cannot be opened with the AWS_* variables of the environment: {reason}.",
            {"setting": "AWS_*"},
        ) from error
    if not publishable_key:
        return ObstoreBackend(place)
    shown_api = (public_endpoint.rstrip("/") or bucket.gateway) + API_PATH
    return ObstoreBackend(place, SupabaseUrls(api, shown_api, bucket.name, bucket.prefix, publishable_key))


def check_keys(environment: Mapping[str, str]) -> None:
    """Sees that the project's S3 keys are there, and nothing that would sign or write in another way.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the variable.
    """
    for name in _KEYS:
        if not environment.get(name):
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                f"{name} is not set. Supabase Storage is reached with an S3 access key of the project: make one under "
                f"Storage, S3, and set {' and '.join(_KEYS)}, and AWS_REGION to the project's region.",
                {"setting": name},
            )
    for name in _ENCRYPTION:
        if environment.get(name):
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                f"{name} is set, and Supabase Storage knows no encryption that a write could ask for. Remove it.",
                {"setting": name},
            )
    if environment.get("AWS_SESSION_TOKEN"):
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "AWS_SESSION_TOKEN is set, and an S3 access key of a Supabase project has none. Remove it.",
            {"setting": "AWS_SESSION_TOKEN"},
        )
