"""Opens a bucket on S3, or on a server that speaks its protocol, by the usual `AWS_*` environment variables."""

from __future__ import annotations

import os
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import S3Store

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.encryption import Encryption, refuse_contradiction
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.presigned import Presigner
from upload_pipeline.storage_address import Bucket

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

CONNECT_SECONDS = 5
"""Bound of one attempt to connect."""

ANSWER_SECONDS = 30
"""Bound of the wait for an answer, a part's upload included, and then for each piece of its body."""

RETRY_SECONDS = 50
"""When no further attempt is begun: below the store's own bound, so that it is the failure that is told."""

_RETRIES: RetryConfig = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=4), "base": 2},
}

_WHOLE_REQUEST = timedelta(days=1)
"""A download lasts as long as its reader takes; what stalls is ended by `ANSWER_SECONDS`."""

# As obstore reads them: the first that is set wins.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_YES = frozenset({"1", "true", "yes", "on", "y", "t"})


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
    options: ClientConfig = {
        "allow_http": _plain_http(),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=ANSWER_SECONDS),
        "timeout": _WHOLE_REQUEST,
    }
    try:
        prefix = bucket.prefix or None
        place = S3Store(
            bucket.name, prefix=prefix, config=_asking_for(encryption), client_options=options, retry_config=_RETRIES
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


def _plain_http() -> bool:
    """Whether the endpoint is spoken to without TLS, which only this machine or an explicit wish allows."""
    for name in _ENDPOINT_VARIABLES:
        endpoint = os.environ.get(name, "")
        if endpoint:
            break
    else:
        return False
    parts = urlsplit(endpoint)
    if parts.scheme == "https" and parts.hostname:
        return False
    allowed = _is_loopback(parts.hostname or "") or os.environ.get("AWS_ALLOW_HTTP", "").lower() in _YES
    if parts.scheme == "http" and parts.hostname and allowed:
        return True
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    raise PipelineError(
        ErrorCode.SETTING_INVALID,
        f"{name}={shown!r} is not allowed: it must be https:// and a host. http:// is for this machine "
        "(127.0.0.1, localhost), or anywhere with AWS_ALLOW_HTTP=true, which sends files in the clear.",
        {"setting": name, "value": shown, "allowed": ["https://<host>[:<port>]", "http://127.0.0.1[:<port>]"]},
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
