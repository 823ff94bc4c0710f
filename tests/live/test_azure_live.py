"""Azure Blob Storage: bytes in and out, and the URLs for downloads that the account's key signs."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import aiohttp
import pytest
from live_keys import become, needed, own_corner, use_it

from upload_pipeline.storage.keys import raw_key

CONTENT = b"Bytes that a client fetches by itself.\n"


async def test_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    url, *_ = needed("LIVE_AZURE_URL", "LIVE_AZURE_ACCOUNT_NAME", "LIVE_AZURE_ACCOUNT_KEY")
    become(monkeypatch, "LIVE_AZURE", "AZURE_STORAGE")
    async with own_corner(url) as store:
        await use_it(store)
        key = raw_key(uuid4(), uuid4())
        await store.put_bytes(key, CONTENT)
        download = await store.sign_get(key, filename="é.txt", media_type="text/plain", expires_in=timedelta(minutes=1))
        assert download is not None
        async with aiohttp.ClientSession() as client, client.get(download.url) as answer:
            assert await answer.read() == CONTENT
            assert answer.headers["content-disposition"].startswith("attachment")
