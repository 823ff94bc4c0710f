"""Opens a bucket on S3, or on a server that speaks its protocol, by the usual `AWS_*` environment variables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import S3Store

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.encryption import Encryption, refuse_contradiction
from upload_pipeline.storage.http_bounds import RETRIES, client_options, plain_http
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.presigned import Presigner
from upload_pipeline.storage_address import Bucket

if TYPE_CHECKING:
    from obstore.store import S3Config

# As obstore reads them: the first that is set wins.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_HTTP_WISH = "AWS_ALLOW_HTTP"


def open_bucket(bucket: Bucket, public_endpoint: str, encryption: Encryption) -> ObstoreBackend:
    """Opens a bucket; asks nothing of it yet.

    Args:
        bucket: which.
        public_endpoint: where others reach it by the URLs that are signed for them; empty: where this process does.
        encryption: asked for with each write.

    Raises:
        PipelineError: `SETTING_INVALID` for environment variables that do not fit.
    """
    refuse_contradiction(encryption)
    options = client_options(allow_http=plain_http(_ENDPOINT_VARIABLES, _HTTP_WISH))
    try:
        prefix = bucket.prefix or None
        place = S3Store(
            bucket.name, prefix=prefix, config=_asking_for(encryption), client_options=options, retry_config=RETRIES
        )
        shown = place
        if public_endpoint:
            shown = S3Store(bucket.name, prefix=prefix, config={"aws_endpoint_url_s3": public_endpoint.rstrip("/")})
    except (BaseError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The bucket {bucket.name} cannot be opened with the AWS_* variables of the environment: {reason}. "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together.",
            {"setting": "AWS_*"},
        ) from error
    key_id, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    return ObstoreBackend(place, Presigner(shown, key_id, secret, encryption) if key_id and secret else None)


def _asking_for(encryption: Encryption) -> S3Config:
    config: S3Config = {}
    if encryption.algorithm is not None:
        config["server_side_encryption"] = encryption.algorithm
        if encryption.kms_key_id:
            config["sse_kms_key_id"] = encryption.kms_key_id
    return config


def bucket_endpoint(region: str) -> str:
    """Where the server of buckets is, without a slash at its end.

    Args:
        region: for AWS's own, where the environment names no other.

    Raises:
        PipelineError: `SETTING_INVALID` for one that may not be spoken to.
    """
    plain_http(_ENDPOINT_VARIABLES, _HTTP_WISH)
    named = next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), "")
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return (named or f"https://s3.{region}.{suffix}").rstrip("/")


def bucket_region() -> str:
    """The region that the environment names, as obstore reads it."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
