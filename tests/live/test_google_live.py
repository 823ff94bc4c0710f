"""Google Cloud Storage: bytes in and out, and the URLs that a service account's key signs."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import aiohttp
import pytest
from live_keys import become, needed, own_corner, use_it

from upload_pipeline.storage.keys import raw_key

CONTENT = b"Bytes that a client sends by itself.\n"


async def test_google(monkeypatch: pytest.MonkeyPatch) -> None:
    url, *_ = needed("LIVE_GOOGLE_URL", "LIVE_GOOGLE_APPLICATION_CREDENTIALS")
    become(monkeypatch, "LIVE_GOOGLE", "GOOGLE")
    async with own_corner(url) as store:
        await use_it(store)
        key, minute = raw_key(uuid4(), uuid4()), timedelta(minutes=1)
        upload = await store.sign_put(key, media_type="text/plain", file_bytes=len(CONTENT), expires_in=minute)
        download = await store.sign_get(key, filename="é.txt", media_type="text/plain", expires_in=minute)
        assert upload is not None
        assert download is not None
        async with aiohttp.ClientSession() as client:
            # of another length, as announced, and once more: what stands there is not replaced
            for sent, taken in ((CONTENT[1:], False), (CONTENT, True), (CONTENT, False)):
                async with client.put(upload.url, data=sent, headers=upload.headers) as answer:
                    assert (answer.status == 200) is taken, await answer.text()
            async with client.get(download.url) as answer:
                assert await answer.read() == CONTENT
