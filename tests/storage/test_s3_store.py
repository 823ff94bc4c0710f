"""What a bucket does that other stores do not: prefix, parts, refusals by name, URLs for others."""

from __future__ import annotations

import asyncio
import os
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from hashlib import sha256
from unittest.mock import patch

import aiohttp
import pytest
from aiohttp import web
from s3_servers import POWERLESS_KEY_ID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.obstore_backend import SINGLE_PUT_BYTES
from upload_pipeline.storage.store import ObjectStore, open_store

KEY = "raw/user/document"
MINUTE = timedelta(minutes=1)
MEGABYTE = 1024 * 1024


@pytest.fixture
def store(s3_bucket: str) -> ObjectStore:
    return open_store(f"s3://{s3_bucket}/some/prefix")


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Other AWS_* variables for a while; None removes one."""
    with patch.dict(os.environ):
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield


@asynccontextmanager
async def server_that(handler) -> AsyncIterator[str]:
    """An HTTP server of the test's own; its address."""
    app = web.Application(client_max_size=64 * MEGABYTE)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def megabytes(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * MEGABYTE


# --- where objects lie


async def test_objects_lie_below_the_prefix_and_their_keys_do_not_show_it(s3_server, s3_bucket):
    inner, outer = open_store(f"s3://{s3_bucket}/a/b/"), open_store(f"s3://{s3_bucket}")
    await inner.put_bytes(KEY, b"x")
    await outer.put_bytes("a/bc/other", b"y")
    assert [info.key async for info in inner.list()] == [KEY]
    assert [info.key async for info in inner.list("raw")] == [KEY]
    assert {info.key async for info in outer.list()} == {f"a/b/{KEY}", "a/bc/other"}
    await inner.move(KEY, "raw/user/moved")
    assert await outer.get_bytes("a/b/raw/user/moved", 1) == b"x"
    await inner.delete(["raw/user/moved"])
    assert {info.key async for info in outer.list()} == {"a/bc/other"}


async def test_an_object_of_eight_megabytes_is_one_put_and_a_larger_one_is_sent_in_parts(store, s3_server, s3_bucket):
    assert SINGLE_PUT_BYTES == 8 * MEGABYTE
    await store.put_stream("raw/whole", megabytes(8))
    await store.put_stream("raw/parts", megabytes(17))
    tags = dict(re.findall(r"<Key>some/prefix/raw/(\w+)</Key>.*?<ETag>([^<]+)</ETag>", s3_server.listing(s3_bucket)))
    # S3 writes the number of parts behind the hash.
    assert {name: tag.strip('"&quot;').partition("-")[2] for name, tag in tags.items()} == {"whole": "", "parts": "4"}
    assert (await store.get_bytes("raw/parts", 17 * MEGABYTE)) == b"".join([m async for m in megabytes(17)])


async def test_a_large_put_that_fails_leaves_neither_object_nor_parts(store, s3_server, s3_bucket):
    async def breaking() -> AsyncIterator[bytes]:
        async for block in megabytes(20):
            yield block
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        await store.put_stream(KEY, breaking())
    with pytest.raises(PipelineError) as caught:
        await store.put_stream(KEY, megabytes(20), max_bytes=19 * MEGABYTE)
    assert caught.value.code is ErrorCode.FILE_TOO_LARGE
    assert "<Key>" not in s3_server.listing(s3_bucket)
    assert "<UploadId>" not in s3_server.listing(s3_bucket, "uploads")


async def test_a_large_put_that_is_cancelled_leaves_neither_object_nor_parts(store, s3_server, s3_bucket):
    under_way = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        async for block in megabytes(20):
            yield block
        under_way.set()
        await asyncio.Event().wait()

    put = asyncio.create_task(store.put_stream(KEY, stuck()))
    await under_way.wait()
    assert "<UploadId>" in s3_server.listing(s3_bucket, "uploads")
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert "<Key>" not in s3_server.listing(s3_bucket)
    assert "<UploadId>" not in s3_server.listing(s3_bucket, "uploads")


# --- refusals


def calls(store: ObjectStore) -> list:
    return [
        store.put_bytes(KEY, b"x"),
        store.put_stream(KEY, megabytes(9)),
        store.get_bytes(KEY, 1),
        store.head(KEY),
        store.move(KEY, "raw/other"),
        store.delete([KEY]),
        anext(store.list()),
        store.check_writable(),
    ]


async def refusals(store: ObjectStore) -> list[PipelineError]:
    errors = []
    for call in calls(store):
        with pytest.raises(PipelineError) as caught:
            await call
        errors.append(caught.value)
    return errors


async def test_a_missing_bucket_is_no_missing_object(s3_bucket):
    for error in await refusals(open_store("s3://no-such-bucket")):
        assert error.code is ErrorCode.STORAGE_UNAVAILABLE
        assert "the bucket does not exist" in error.message
        assert "UPLOAD_PIPELINE_STORAGE_URL" in error.message


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "InvalidAccessKeyId"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
    ],
)
async def test_credentials_that_are_wrong_are_named(s3_bucket, variables, code):
    with environment(**variables):
        store = open_store(f"s3://{s3_bucket}")
    for error in await refusals(store):
        assert error.code is ErrorCode.STORAGE_DENIED
        assert "wrong" not in error.message
        if "look at" not in error.message:  # an answer to HEAD has no body to say more
            assert code in error.message
            assert "AWS_SECRET_ACCESS_KEY" in error.message


async def test_credentials_without_rights_are_told_which_they_lack(s3_bucket):
    with environment(AWS_ACCESS_KEY_ID=POWERLESS_KEY_ID):
        store = open_store(f"s3://{s3_bucket}")
    for error in await refusals(store):
        assert error.code is ErrorCode.STORAGE_DENIED
        if "look at" not in error.message:
            assert "s3:PutObject" in error.message


async def test_no_credentials_at_all_are_named(s3_bucket):
    async def no_role(request: web.Request) -> web.Response:
        return web.Response(status=404)

    async with server_that(no_role) as metadata:
        with environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_METADATA_ENDPOINT=metadata):
            store = open_store(f"s3://{s3_bucket}")
            with pytest.raises(PipelineError) as caught:
                await store.get_bytes(KEY, 1)
            assert await store.sign_get(KEY, filename="a", expires_in=MINUTE) is None
    assert caught.value.code is ErrorCode.STORAGE_DENIED
    assert "AWS_ACCESS_KEY_ID" in caught.value.message


async def test_a_server_that_fails_once_is_asked_again(s3_bucket):
    asked = []

    async def failing_first(request: web.Request) -> web.Response:
        asked.append(await request.read())
        return web.Response(status=503 if len(asked) == 1 else 200, headers={"ETag": '"1"'})

    async with server_that(failing_first) as endpoint:
        with environment(AWS_ENDPOINT_URL=endpoint):
            store = open_store(f"s3://{s3_bucket}")
        await store.put_bytes(KEY, b"bytes")
    assert asked == [b"bytes", b"bytes"]


async def test_a_server_that_never_answers_is_given_up(s3_bucket):
    async def silent(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async with server_that(silent) as endpoint:
        with environment(AWS_ENDPOINT_URL=endpoint):
            store = open_store(f"s3://{s3_bucket}", progress_seconds=0.2)
        for call in (store.put_bytes(KEY, b"x"), store.get_bytes(KEY, 1), store.head(KEY), store.delete([KEY])):
            with pytest.raises(PipelineError) as caught:
                await call
            assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
            assert "nothing moved for 0.2 s" in caught.value.message


# --- opening


@pytest.mark.parametrize(
    "endpoint", ["http://storage.example.com", "http://10.0.0.1:9000", "ftp://x", "127.0.0.1:9000"]
)
def test_files_are_not_sent_in_the_clear_unless_that_is_wished(endpoint):
    with environment(AWS_ENDPOINT_URL=endpoint, AWS_ENDPOINT_URL_S3=None, AWS_ALLOW_HTTP=None):
        with pytest.raises(PipelineError) as caught:
            open_store("s3://bucket")
        assert caught.value.code is ErrorCode.SETTING_INVALID
        assert f"AWS_ENDPOINT_URL={endpoint!r}" in caught.value.message
        if endpoint.startswith("http:"):
            os.environ["AWS_ALLOW_HTTP"] = "true"
            open_store("s3://bucket")


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000", "https://s"]
)
def test_this_machine_and_tls_need_no_wish(endpoint):
    with environment(AWS_ENDPOINT_URL=endpoint, AWS_ALLOW_HTTP=None):
        open_store("s3://bucket")


def test_the_endpoint_of_s3_alone_goes_before_that_of_all_services():
    with environment(AWS_ENDPOINT_URL="http://elsewhere.example.com", AWS_ENDPOINT_URL_S3="https://s3.example.com"):
        open_store("s3://bucket")


def test_half_a_pair_of_keys_is_refused():
    with environment(AWS_ACCESS_KEY_ID="AKIA", AWS_SECRET_ACCESS_KEY=None), pytest.raises(PipelineError) as caught:
        open_store("s3://bucket")
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.message


# --- URLs for others


async def put(signed: SignedUrl | None, body: bytes, **other: str) -> int:
    """The status of a PUT as a browser would make it; the server's check is botocore's, see s3_servers."""
    assert signed is not None
    headers = dict(signed.headers) | {name.replace("_", "-"): value for name, value in other.items()}
    del headers["content-length"]  # clients count for themselves, and browsers let no page set it
    async with aiohttp.ClientSession() as session, session.put(signed.url, data=body, headers=headers) as answer:
        return answer.status


async def test_a_presigned_put_stores_just_what_was_announced(store):
    signed = await store.sign_put(KEY, media_type="text/plain", file_bytes=5, expires_in=MINUTE)
    assert await put(signed, b"1234") == 403
    assert await put(signed, b"123456") == 403
    assert await put(signed, b"12345", content_type="text/html") == 403
    assert await store.head(KEY) is None
    assert await put(signed, b"12345") == 200
    assert await put(signed, b"again") == 412  # nobody has said which bytes: the first stay
    assert await store.get_bytes(KEY, 5) == b"12345"


async def test_a_presigned_put_takes_no_other_bytes_of_the_same_length(store):
    signed = await store.sign_put(
        KEY, media_type="text/plain", file_bytes=5, file_sha256=sha256(b"right").hexdigest(), expires_in=MINUTE
    )
    assert await put(signed, b"right") == 200
    assert await put(signed, b"wrong") == 400
    sum_of_wrong = b64encode(sha256(b"wrong").digest()).decode()
    assert await put(signed, b"wrong", x_amz_checksum_sha256=sum_of_wrong) == 403
    assert await store.get_bytes(KEY, 5) == b"right"


async def test_a_presigned_put_is_for_its_key_alone(store):
    signed = await store.sign_put(KEY, media_type="text/plain", file_bytes=1, expires_in=MINUTE)
    assert signed is not None
    assert await put(SignedUrl(signed.url.replace("document", "another"), signed.headers), b"x") == 403
    async with aiohttp.ClientSession() as session, session.get(signed.url) as answer:
        assert answer.status == 403
    assert [info async for info in store.list()] == []


async def test_presigned_urls_end(store):
    await store.put_bytes(KEY, b"x")
    upload = await store.sign_put(KEY, media_type="text/plain", file_bytes=1, expires_in=timedelta(seconds=1))
    download = await store.sign_get(KEY, filename="a", expires_in=timedelta(seconds=1))
    assert upload is not None
    assert download is not None
    await asyncio.sleep(2.1)  # whole seconds
    assert await put(upload, b"y") == 403
    async with aiohttp.ClientSession() as session, session.get(download.url) as answer:
        assert answer.status == 403
    assert await store.get_bytes(KEY, 1) == b"x"


async def test_a_presigned_get_is_saved_under_its_name(store):
    await store.put_bytes(KEY, b"<script>alert(1)</script>")
    signed = await store.sign_get(KEY, filename='Über "x".html', media_type="text/html", expires_in=MINUTE)
    assert signed is not None
    async with aiohttp.ClientSession() as session:
        async with session.get(signed.url) as answer:
            assert answer.status == 200
            assert await answer.read() == b"<script>alert(1)</script>"
            assert answer.headers["Content-Disposition"] == attachment('Über "x".html')
            assert answer.headers["Content-Type"] == "text/html"
        async with session.get(signed.url.replace("attachment", "inline")) as answer:
            assert answer.status == 403


async def test_temporary_keys_sign_with_their_token(s3_bucket):
    with environment(AWS_SESSION_TOKEN="to/k+en="):
        store = open_store(f"s3://{s3_bucket}")
    signed = await store.sign_put(KEY, media_type="text/plain", file_bytes=1, expires_in=MINUTE)
    assert signed is not None
    assert "X-Amz-Security-Token=to%2Fk%2Ben%3D" in signed.url
    assert await put(signed, b"x") == 200


@pytest.mark.parametrize("specific", [None, "http://127.0.0.1:9"])
async def test_clients_are_sent_to_the_public_endpoint(s3_server, s3_bucket, specific):
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ENDPOINT_URL_S3=specific):
        store = open_store(f"s3://{s3_bucket}", public_endpoint=s3_server.endpoint + "/")
    signed = await store.sign_put(KEY, media_type="text/plain", file_bytes=1, expires_in=MINUTE)
    assert await put(signed, b"x") == 200
    assert f"<Key>{KEY}</Key>" in s3_server.listing(s3_bucket)
