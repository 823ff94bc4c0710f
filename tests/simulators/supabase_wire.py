"""The shapes of Supabase Storage's REST API: what it takes as an object, what it tells of one, how it refuses."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from aiohttp import BodyPartReader, web

from tests.simulators.object_server import Stored

PUBLISHABLE_KEY = "sb_publishable_simulated"
SECRET_KEY = "sb_secret_simulated"

Handler = Callable[[web.Request], Awaitable[web.Response]]

_REFUSALS = {
    "NoSuchKey": ("404", "not_found", "Object not found"),
    "NoSuchBucket": ("404", "Bucket not found", "Bucket not found"),
    "KeyAlreadyExists": ("409", "Duplicate", "The resource already exists"),
    "AccessDenied": ("403", "Unauthorized", "new row violates row-level security policy"),
    "InvalidJWT": ("403", "Unauthorized", "invalid signature"),
    "ExpiredToken": ("400", "InvalidJWT", '"exp" claim timestamp check failed'),
    "InvalidSignature": ("400", "InvalidSignature", "Invalid signature"),
    "InvalidKey": ("400", "InvalidKey", "Invalid key"),
    "EntityTooLarge": ("413", "Payload too large", "The object exceeded the maximum allowed size"),
    "InvalidMimeType": ("415", "invalid_mime_type", "mime type is not supported"),
}


class Refused(Exception):  # noqa: N818 - what the server says, not what went wrong in it
    """Ends a request with one of the refusals."""


def told(handler: Handler) -> Handler:
    """Checks the `apikey` as the gateway does, where the URL carries no permission, and words refusals."""

    async def answer(request: web.Request) -> web.Response:
        known = {PUBLISHABLE_KEY, SECRET_KEY}
        if "token" not in request.query and request.headers.get("apikey") not in known:
            await request.read()
            return web.json_response({"message": "Invalid API key"}, status=401)
        try:
            return await handler(request)
        except Refused as refusal:
            code = str(refusal)
            status, error, message = _REFUSALS[code]
            await request.read()
            return error_response(400, status, code, error, message)

    return answer


async def received(request: web.Request) -> Stored:
    """The object in a request: its raw body, or the file of a form, whose field may have no name at all."""
    if not request.content_type.startswith("multipart/"):
        metadata = json.loads(base64.b64decode(request.headers.get("x-metadata", "e30=")))
        cached = {"Cache-Control": request.headers.get("cache-control", "no-cache")}
        kind = request.headers.get("Content-Type", "application/octet-stream")
        return Stored(await request.read(), kind, cached, metadata)
    stored, fields = None, {}
    async for part in await request.multipart():
        assert isinstance(part, BodyPartReader)
        if part.filename is not None:
            stored = Stored(bytes(await part.read()), part.headers.get("Content-Type", "application/octet-stream"))
        else:
            fields[part.name] = await part.text()
    assert stored is not None, "a form without a file"
    stored.headers["Cache-Control"] = f"max-age={fields['cacheControl']}" if "cacheControl" in fields else "no-cache"
    stored.metadata = json.loads(fields.get("metadata", "{}"))
    return stored


def described(name: str, stored: Stored) -> dict[str, Any]:
    moment = stored.modified_at.isoformat().replace("+00:00", "Z")
    return {
        "id": stored.object_id,
        "name": name,
        "version": str(uuid4()),
        "size": len(stored.data),
        "content_type": stored.content_type,
        "cache_control": stored.headers.get("Cache-Control", "no-cache"),
        "etag": stored.etag,
        "metadata": {"size": len(stored.data), "mimetype": stored.content_type, "eTag": stored.etag},
        "last_modified": moment,
        "created_at": moment,
        "updated_at": moment,
    }


def error_response(status: int, true_status: str, code: str, error: str, message: str) -> web.Response:
    body = {"statusCode": true_status, "error": error, "message": message, "code": code}
    return web.json_response(body, status=status)
