"""S3 itself, or whatever server the variables name: writes with encryption, signed URLs, the look at the bucket."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from uuid import uuid4

import aiohttp
import pytest
from live_keys import become, needed, own_corner, use_it

from upload_pipeline.settings import load_settings
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.store_setup import look_at_store

CONTENT = b"Bytes that a client sends by itself.\n"


async def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    url, *_ = needed("LIVE_S3_URL", "LIVE_S3_ACCESS_KEY_ID", "LIVE_S3_SECRET_ACCESS_KEY")
    become(monkeypatch, "LIVE_S3")
    async with own_corner(url) as store:
        await use_it(store)
        key = raw_key(uuid4(), uuid4())
        minute = timedelta(minutes=1)
        upload = await store.sign_put(
            key,
            media_type="text/plain",
            file_bytes=len(CONTENT),
            file_sha256=sha256(CONTENT).hexdigest(),
            expires_in=minute,
        )
        download = await store.sign_get(key, filename="é.txt", media_type="text/plain", expires_in=minute)
        assert upload is not None
        assert download is not None
        headers = {name: value for name, value in upload.headers.items() if name != "content-length"}
        async with aiohttp.ClientSession() as client:
            for sent, taken in ((CONTENT.upper(), False), (CONTENT, True)):
                async with client.put(upload.url, data=sent, headers=headers) as answer:
                    assert (answer.status == 200) is taken, await answer.text()
            async with client.get(download.url) as answer:
                assert await answer.read() == CONTENT
                assert answer.headers["x-amz-server-side-encryption"] == "AES256"
    parts = await look_at_store(load_settings(storage_url=url), mend=False)
    # These keys need not be the owner's; but what may be looked at has an answer.
    assert parts[0].state in ("ok", "denied"), parts
