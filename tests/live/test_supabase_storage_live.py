"""Supabase Storage: bytes by its S3 endpoint; signed URLs too, where a user's token is given."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import aiohttp
import jwt
import pytest
from live_keys import become, needed, own_corner, use_it

from upload_pipeline.storage.keys import raw_key

CONTENT = b"Bytes that a user's client sends.\n"


async def test_supabase_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    url, *_ = needed("LIVE_SUPABASE_URL", "LIVE_SUPABASE_ACCESS_KEY_ID", "LIVE_SUPABASE_SECRET_ACCESS_KEY")
    become(monkeypatch, "LIVE_SUPABASE")
    async with own_corner(url) as store:
        await use_it(store)


async def test_supabase_storage_signs_for_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    url, *_, key, token = needed(
        "LIVE_SUPABASE_URL",
        "LIVE_SUPABASE_ACCESS_KEY_ID",
        "LIVE_SUPABASE_SECRET_ACCESS_KEY",
        "LIVE_SUPABASE_PUBLISHABLE_KEY",
        "LIVE_SUPABASE_USER_TOKEN",
    )
    become(monkeypatch, "LIVE_SUPABASE")
    user = UUID(jwt.decode(token, options={"verify_signature": False})["sub"])
    async with own_corner(url, publishable_key=key) as store:
        place, minute = raw_key(user, uuid4()), timedelta(minutes=1)
        upload = await store.sign_put(
            place, media_type="text/plain", file_bytes=len(CONTENT), expires_in=minute, caller_token=token
        )
        assert upload is not None
        async with aiohttp.ClientSession() as client:
            for allowed in (True, False):  # it replaces nothing
                async with client.put(upload.url, data=CONTENT, headers=upload.headers) as answer:
                    assert (answer.status == 200) is allowed, await answer.text()
            download = await store.sign_get(place, filename="é.txt", expires_in=minute, caller_token=token)
            assert download is not None
            async with client.get(download.url) as answer:
                assert await answer.read() == CONTENT
