"""A bucket's server that fails, hangs up and refuses, at every kind of request that the store makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from hashlib import sha256

import pytest
from aiohttp import web
from s3_proxy import Passed, Proxy, s3_proxy
from s3_servers import S3Server

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.http_bounds import RETRY_PAUSES
from upload_pipeline.storage.objects import StoredObject
from upload_pipeline.storage.store import ObjectStore, open_store

MEGABYTE = 1024 * 1024
SIZE = 9 * MEGABYTE
WHOLE = b"".join(bytes([number]) * MEGABYTE for number in range(9))


@pytest.fixture
async def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    async with s3_proxy(s3_server.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def store(proxy: Proxy, s3_bucket: str) -> ObjectStore:
    return open_store(f"s3://{s3_bucket}/some")


async def megabytes() -> AsyncIterator[bytes]:
    for number in range(9):
        yield bytes([number]) * MEGABYTE


async def first_listed(store: ObjectStore) -> None:
    async with aclosing(store.list("raw/listed")) as listing:
        assert (await anext(listing)).key == "raw/listed/x"


async def calls(store: ObjectStore) -> dict[str, Awaitable[object]]:
    """One call by the kind of request that is to suffer; each has objects of its own, so they go at once."""
    for key in ("raw/got", "raw/looked-at", "raw/moved", "raw/deleted", "raw/listed/x"):
        await store.put_bytes(key, b"here")
    return {
        "PutObject": store.put_bytes("raw/put", b"x"),
        "CreateMultipartUpload": store.put_stream("raw/created", megabytes()),
        "UploadPart": store.put_stream("raw/part", megabytes()),
        "CompleteMultipartUpload": store.put_stream("raw/completed", megabytes()),
        "GET": store.get_bytes("raw/got", 4),
        "HEAD": store.head("raw/looked-at"),
        "CopyObject": store.move("raw/moved", "raw/copied"),
        "Delete": store.delete(["raw/deleted"]),
        "List": first_listed(store),
    }


SUFFERS = {
    "PutObject": "raw/put",
    "CreateMultipartUpload": "raw/created",
    "UploadPart": "raw/part",
    "CompleteMultipartUpload": "raw/completed",
    "GET": "raw/got",
    "HEAD": "raw/looked-at",
    "CopyObject": "raw/copied",
}
"""The object at which a kind suffers; the other kinds name none in their path."""


def is_the_one(seen: Passed) -> bool:
    return seen.path.endswith(SUFFERS.get(seen.kind, "")) if seen.kind in SUFFERS else seen.kind in ("Delete", "List")


async def hang_up(request: web.Request) -> web.Response:
    await request.read()
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def too_busy(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=503, text="<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>")


async def denied(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=403, text="<Error><Code>AccessDenied</Code><Message>No</Message></Error>")


@pytest.mark.parametrize("fault", [hang_up, too_busy])
async def test_every_kind_of_request_is_sent_again(
    proxy: Proxy, store: ObjectStore, fault: Callable[[web.Request], Awaitable[web.Response]]
) -> None:
    spoiled: set[str] = set()

    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        if not is_the_one(seen) or seen.kind in spoiled:
            return None
        spoiled.add(seen.kind)
        return await fault(request)

    wanted = await calls(store)
    proxy.spoil = spoil
    await asyncio.gather(*wanted.values())
    assert spoiled == wanted.keys()
    for key in ("raw/created", "raw/part", "raw/completed"):
        assert await store.get_bytes(key, SIZE) == WHOLE
    assert await store.get_bytes("raw/copied", 4) == b"here"
    for key in ("raw/moved", "raw/deleted"):
        assert await store.head(key) is None


async def test_what_fails_four_times_is_told_and_leaves_nothing(
    proxy: Proxy, store: ObjectStore, s3_server: S3Server, s3_bucket: str
) -> None:
    tries: dict[str, int] = {}

    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        # Of an upload in parts two are on their way at once.
        if not is_the_one(seen) or seen.query.get("partNumber", "1") != "1":
            return None
        tries[seen.kind] = tries.get(seen.kind, 0) + 1
        return await (hang_up if tries[seen.kind] % 2 else too_busy)(request)

    wanted = await calls(store)
    proxy.spoil = spoil
    errors = await asyncio.gather(*wanted.values(), return_exceptions=True)
    for kind, error in zip(wanted, errors, strict=True):
        assert isinstance(error, PipelineError), kind
        assert (error.code, error.retryable) == (ErrorCode.STORAGE_UNAVAILABLE, True), kind
        assert "UPLOAD_PIPELINE_STORAGE_URL" in error.message
    assert tries == dict.fromkeys(wanted, 1 + len(RETRY_PAUSES))
    proxy.spoil = None
    for key in ("raw/put", "raw/created", "raw/part", "raw/completed", "raw/copied"):
        assert await store.head(key) is None
    assert await store.get_bytes("raw/moved", 4) == b"here"
    assert "<UploadId>" not in s3_server.listing(s3_bucket, "uploads")


async def test_what_is_denied_is_told_at_once(proxy: Proxy, store: ObjectStore) -> None:
    tries: dict[str, int] = {}

    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        if seen.kind == "GET" and seen.path.endswith(SUFFERS["HEAD"]):
            return await denied(request)  # asked for once more, as no answer to HEAD can say what is denied
        if not is_the_one(seen) or seen.query.get("partNumber", "1") != "1":
            return None
        tries[seen.kind] = tries.get(seen.kind, 0) + 1
        return await denied(request)

    wanted = await calls(store)
    proxy.spoil = spoil
    errors = await asyncio.gather(*wanted.values(), return_exceptions=True)
    for kind, error in zip(wanted, errors, strict=True):
        assert isinstance(error, PipelineError), kind
        assert error.code is ErrorCode.STORAGE_DENIED, kind
        assert "storage policies" in error.message, kind
    assert tries == dict.fromkeys(wanted, 1)


async def test_an_object_that_cannot_be_deleted_among_others_is_no_success(proxy: Proxy, store: ObjectStore) -> None:
    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        if seen.kind != "Delete":
            return None
        one = "<Error><Key>some/raw/b</Key><Code>AccessDenied</Code><Message>No</Message></Error>"
        return web.Response(text=f"<DeleteResult><Deleted><Key>some/raw/a</Key></Deleted>{one}</DeleteResult>")

    proxy.spoil = spoil
    with pytest.raises(PipelineError) as caught:
        await store.delete(["raw/a", "raw/b"])
    assert caught.value.code is ErrorCode.STORAGE_DENIED


# --- reading that breaks off in the midst


async def test_a_download_that_breaks_off_goes_on_where_it_was(proxy: Proxy, store: ObjectStore, tmp_path) -> None:
    await store.put_stream("raw/long", megabytes())
    proxy.cuts = [3 * MEGABYTE + 7, 1]
    stored = await store.download("raw/long", tmp_path / "file")
    assert stored == StoredObject("raw/long", SIZE, sha256(WHOLE).hexdigest(), WHOLE[:65536])
    assert (tmp_path / "file").read_bytes() == WHOLE
    begun = [seen.headers.get("range", "") for seen in proxy.passed if seen.kind == "GET"]
    assert len(begun) == 3
    # It went on from what had arrived, and not from the beginning.
    assert [int(text.removeprefix("bytes=").partition("-")[0]) > 0 for text in begun[1:]] == [True, True]


async def test_a_download_of_what_was_replaced_meanwhile_is_no_mixture(
    proxy: Proxy, store: ObjectStore, tmp_path
) -> None:
    await store.put_stream("raw/long", megabytes())
    proxy.cuts = [3 * MEGABYTE]
    blocks = store.stream("raw/long")
    assert (await anext(blocks))[:1] == WHOLE[:1]
    proxy.spoil = None
    await store.put_bytes("raw/long", b"another")
    with pytest.raises(PipelineError) as caught:
        async for _ in blocks:
            pass
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert caught.value.retryable


async def test_a_download_that_breaks_off_for_good_leaves_no_file(proxy: Proxy, store: ObjectStore, tmp_path) -> None:
    await store.put_stream("raw/long", megabytes())
    proxy.cuts = [100] * 20
    with pytest.raises(PipelineError) as caught:
        await store.download("raw/long", tmp_path / "file")
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert not (tmp_path / "file").exists()
