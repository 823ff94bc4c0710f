"""Signed URLs of Supabase Storage, made with the access token of whoever is to have them.

So the project's own policies on `storage.objects` decide, as they do where that user's browser asks. A token for an
upload binds the key and no more: neither length nor type nor content, and hosted it lives two hours whatever is asked
for (one's own server: UPLOAD_SIGNED_URL_EXPIRATION_TIME, 60 s). It replaces nothing, so a second PUT is refused.
Sources: supabase/storage 1.11.2, routes `object/upload/sign` and `object/sign`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import uuid4

import aiohttp

from upload_pipeline.storage.failures import unavailable
from upload_pipeline.storage.http_bounds import CONNECT_SECONDS, RETRY_PAUSES
from upload_pipeline.storage.keys import incoming_key
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.supabase_answers import Answer, Verdict, read_answer, refusal

_ASK_SECONDS = 10.0
_MAX_BYTES = 64 * 1024


class _Connections:
    """The connections to one server, opened at the first request."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS, connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout)
        return self._session

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@dataclass(frozen=True, slots=True)
class SupabaseUrls:
    """Has Supabase sign URLs for the objects of a bucket; without a caller's token there are none.

    Attributes:
        api: URL of the REST API, with its path and without a slash at its end.
        shown_api: the same as clients reach it.
        bucket: its name.
        prefix: of all keys, without slashes at its ends; may be empty.
        publishable_key: of the project; it tells the gateway which project is meant and permits nothing.
        pauses: seconds before each further attempt.
    """

    api: str
    shown_api: str
    bucket: str
    prefix: str
    publishable_key: str = field(repr=False)
    pauses: tuple[float, ...] = RETRY_PAUSES
    _connections: _Connections = field(default_factory=_Connections, repr=False)

    async def put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """A PUT under the key, as long as nothing stands there; `None` where something does.

        Length and content cannot be bound, nor the expiry chosen: the URL's own end comes with it.
        """
        if caller_token is None:
            return None
        answer = await self._ask("object/upload/sign", key, caller_token, {}, {"x-upsert": "false"})
        if answer.verdict is Verdict.DUPLICATE:
            return None
        path = self._given(answer, "url", key)
        token = parse_qs(urlsplit(path).query).get("token", [""])[0]
        return SignedUrl(self.shown_api + path, {"content-type": media_type}, expiry_of(token))

    async def get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """A GET that a browser saves under the name, of the type that was uploaded."""
        if caller_token is None:
            return None
        seconds = max(1, round(expires_in.total_seconds()))
        answer = await self._ask("object/sign", key, caller_token, {"expiresIn": seconds}, {})
        path = self._given(answer, "signedURL", key)
        return SignedUrl(f"{self.shown_api}{path}&download={quote(filename, safe='')}", {})

    async def check(self) -> str:
        """Asks for a URL that nobody may have: the answer tells whether gateway, key and bucket are right.

        Raises:
            PipelineError: `STORAGE_DENIED`, `STORAGE_UNAVAILABLE`.
        """
        key = incoming_key(uuid4())
        answer = await self._ask("object/sign", key, self.publishable_key, {"expiresIn": 1}, {})
        if answer.verdict not in {Verdict.NO_OBJECT, Verdict.DENIED, Verdict.BAD_TOKEN}:
            raise refusal(answer, "sign URLs", key)
        return "users with tokens get URLs of Supabase, all others those of the service"

    async def close(self) -> None:
        """Closes the connections."""
        await self._connections.close()

    def _given(self, answer: Answer, name: str, key: str) -> str:
        action = f"sign a URL for {key}"
        if answer.verdict is not Verdict.DONE:
            raise refusal(answer, action, key)
        path = answer.told.get(name)
        if not isinstance(path, str) or not path.startswith("/") or "?token=" not in path:
            raise unavailable(action, f"the answer has no {name}", "Check that the address is Supabase Storage's.", key)
        return path

    async def _ask(
        self, route: str, key: str, caller_token: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Answer:
        """POSTs until there is an answer, as often as `pauses` allow: signing changes nothing."""
        place = f"{self.bucket}/{self.prefix}/{key}" if self.prefix else f"{self.bucket}/{key}"
        headers = {"apikey": self.publishable_key, "Authorization": f"Bearer {caller_token}", **headers}
        for pause in (*self.pauses, None):
            answer = await self._once(f"{self.api}/{route}/{place}", body, headers)
            if answer.verdict is not Verdict.TRY_AGAIN or pause is None:
                break
            await asyncio.sleep(pause)
        return answer

    async def _once(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        try:
            session = self._connections.session()
            async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
                return read_answer(response.status, await _body(response))
        except TimeoutError:
            return Answer(Verdict.TRY_AGAIN, f"no answer within {_ASK_SECONDS:g} s", {})
        except aiohttp.ClientError as error:
            return Answer(Verdict.TRY_AGAIN, str(error) or type(error).__name__, {})


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body, as far as one of ours goes: what is longer is none, and is not read to its end."""
    body = bytearray()
    async for piece in response.content.iter_chunked(_MAX_BYTES):
        body += piece
        if len(body) > _MAX_BYTES:
            break
    return bytes(body)


def expiry_of(token: str) -> datetime | None:
    """When a token ends by its `exp`, which the server has signed; `None` where it names none."""
    try:
        part = token.split(".")[1]
        told = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return datetime.fromtimestamp(told["exp"], UTC)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, binascii.Error):
        return None
