"""Whether anybody can fetch what is in a bucket: an object is written, asked for without credentials, and removed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import uuid4

import aiohttp

from upload_pipeline.storage.http_bounds import ANSWER_SECONDS
from upload_pipeline.storage.keys import incoming_key
from upload_pipeline.storage.store_findings import StorePart
from upload_pipeline.storage.supabase import API_PATH
from upload_pipeline.storage_address import AzureContainer, GoogleBucket, SupabaseBucket

if TYPE_CHECKING:
    from upload_pipeline.storage.store import ObjectStore

PART = "public access"

_PROBE = b"upload-pipeline: can anybody read this?"
_SEEN_STATUS = 500
"""From here on the server did not decide."""


def public_url(address: GoogleBucket | AzureContainer | SupabaseBucket, key: str) -> str:
    """Where anybody would find the object, were the bucket public."""
    path = f"{address.name}/{address.prefix}/{key}" if address.prefix else f"{address.name}/{key}"
    match address:
        case GoogleBucket():
            server = os.environ.get("GOOGLE_BASE_URL") or "https://storage.googleapis.com"
        case AzureContainer():
            account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
            named = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
            server = named or f"https://{account}.blob.core.windows.net"
        case SupabaseBucket():
            server = f"{address.gateway}{API_PATH}/object/public"
    return f"{server.rstrip('/')}/{path}"


async def look_without_credentials(
    store: ObjectStore, address: GoogleBucket | AzureContainer | SupabaseBucket
) -> StorePart:
    """What comes of fetching an object without credentials.

    Raises:
        PipelineError: the object cannot be written or removed.
    """
    key = incoming_key(uuid4())
    await store.put_bytes(key, _PROBE)
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(public_url(address, key), allow_redirects=False) as answer,
        ):
            status, body = answer.status, await answer.content.read(len(_PROBE))
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        return StorePart(PART, "not looked at", f"no answer to a request without credentials: {reason}")
    finally:
        await store.delete([key])
    if status == 200 and body == _PROBE:
        return StorePart(PART, "missing", "anybody can fetch an object without credentials. Make the bucket private.")
    if status >= _SEEN_STATUS:
        return StorePart(PART, "not looked at", f"a request without credentials was answered with {status}. Try again.")
    return StorePart(PART, "ok", f"an object is not to be had without credentials ({status})")
