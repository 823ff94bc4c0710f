"""What Supabase Storage does that other stores do not: whose token signs, statuses in bodies, one PUT a URL."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import aiohttp
import pytest
from aiohttp import web

from tests.simulators.object_server import Bucket
from tests.simulators.supabase_storage import API
from tests.simulators.supabase_wire import PUBLISHABLE_KEY
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_pipeline.storage.supabase_answers import Verdict, read_answer
from upload_pipeline.storage.supabase_urls import SupabaseUrls, expiry_of

USER = str(uuid4())
KEY = f"raw/{USER}/document"
MINUTE = timedelta(minutes=1)


class Forgetful(dict):
    """Uploads that end before they are complete."""

    def pop(self, *_: object) -> None:
        return None


def quick(store: ObjectStore) -> ObjectStore:
    """The same store, which waits for hardly anything before it tries again."""
    assert isinstance(store.backend, ObstoreBackend)
    assert isinstance(store.backend.urls, SupabaseUrls)
    urls = replace(store.backend.urls, pauses=(0.01, 0.01, 0.01))
    return replace(store, backend=replace(store.backend, urls=urls))


async def sign_put(store: ObjectStore, token: str | None, key: str = KEY) -> SignedUrl | None:
    return await store.sign_put(
        key, media_type="text/plain", file_bytes=5, file_sha256="0" * 64, expires_in=MINUTE, caller_token=token
    )


async def sign_get(store: ObjectStore, token: str | None, key: str = KEY) -> SignedUrl | None:
    return await store.sign_get(key, filename="Ü & b.txt", expires_in=MINUTE, caller_token=token)


async def put(signed: SignedUrl, body: bytes) -> tuple[int, dict[str, str]]:
    headers = dict(signed.headers)
    async with aiohttp.ClientSession() as session, session.put(signed.url, data=body, headers=headers) as answer:
        return answer.status, await answer.json()


# --- URLs


async def test_bytes_go_in_and_out_by_urls_of_the_callers_own(supabase, supabase_store):
    token = supabase.token(USER)
    upload = await sign_put(supabase_store, token)
    assert upload is not None
    assert upload.headers == {"content-type": "text/plain"}
    assert PUBLISHABLE_KEY not in upload.url
    assert token not in upload.url
    assert (await put(upload, b"bytes"))[0] == 200
    assert await supabase_store.get_bytes(KEY, 5) == b"bytes"
    assert supabase.keys("files") == {f"some/prefix/{KEY}"}
    assert supabase.buckets["files"].objects[f"some/prefix/{KEY}"].owner == USER
    download = await sign_get(supabase_store, token)
    assert download is not None
    async with aiohttp.ClientSession() as session, session.get(download.url) as answer:
        assert (answer.status, await answer.read()) == (200, b"bytes")
        assert answer.headers["Content-Type"] == "text/plain"
        assert "filename*=UTF-8''%C3%9C%20%26%20b.txt" in answer.headers["Content-Disposition"]


async def test_the_url_binds_neither_length_nor_type_and_replaces_nothing(supabase, supabase_store):
    upload = await sign_put(supabase_store, supabase.token(USER))
    assert upload is not None
    assert (await put(SignedUrl(upload.url, {"content-type": "text/html"}), b"longer than announced"))[0] == 200
    status, told = await put(upload, b"bytes")
    assert (status, told["statusCode"], told["error"]) == (400, "409", "Duplicate")
    assert await supabase_store.get_bytes(KEY, 100) == b"longer than announced"


async def test_where_an_object_stands_no_url_is_signed_that_could_not_be_used(supabase, supabase_store):
    await supabase_store.put_bytes(KEY, b"other")
    assert await sign_put(supabase_store, supabase.token(USER)) is None


async def test_without_a_callers_token_or_a_publishable_key_there_are_no_urls(supabase, supabase_store):
    assert await sign_put(supabase_store, None) is None
    assert await sign_get(supabase_store, None) is None
    keyless = open_store(supabase.url.replace("http", "supabase+http") + "/files")
    assert await sign_put(keyless, supabase.token(USER)) is None
    assert not any("/object/" in asked for asked in supabase.requests)


async def test_the_end_of_an_upload_is_the_servers(supabase, supabase_store):
    supabase.upload_seconds = 60
    upload = await sign_put(supabase_store, supabase.token(USER))
    assert upload is not None
    assert upload.expires_at is not None
    assert abs((upload.expires_at - datetime.now(UTC)).total_seconds() - 60) < 5


@pytest.mark.parametrize("token", ["", "a.b.c", "a.e30.c", "a.eyJleHAiOiJ4In0.c", "a.eyJleHAiOjFlOTk5fQ.c"])
def test_an_end_that_cannot_be_read_is_none(token):
    assert expiry_of(token) is None


async def test_clients_are_sent_to_the_public_endpoint(supabase, supabase_store):
    address = supabase.url.replace("http", "supabase+http") + "/files"
    store = open_store(address, publishable_key=PUBLISHABLE_KEY, public_endpoint="https://files.example.com/")
    upload = await sign_put(store, supabase.token(USER))
    assert upload is not None
    assert upload.url.startswith(f"https://files.example.com{API}/object/upload/sign/files/{KEY}?token=")
    await store.close()


# --- refusals


async def refusal(call: object) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await call  # type: ignore[misc]
    assert caught.value.details.get("key") == KEY
    return caught.value


async def test_what_policies_refuse_is_denied_and_says_where_they_are(supabase, supabase_store):
    error = await refusal(sign_put(supabase_store, supabase.token(str(uuid4()))))
    assert error.code is ErrorCode.STORAGE_DENIED
    assert "row-level security" in error.message
    assert "storage_policies.sql" in error.message


async def test_an_object_that_is_missing_or_hidden_is_missing(supabase, supabase_store):
    for token in (supabase.token(USER), supabase.token(str(uuid4()))):
        error = await refusal(sign_get(supabase_store, token))
        assert error.code is ErrorCode.OBJECT_MISSING
        assert "select policy" in error.message
        await supabase_store.put_bytes(KEY, b"x")


@pytest.mark.parametrize("claims", [{"exp": int(time.time()) - 1}, {"aud": "another"}])
async def test_a_token_that_the_project_does_not_take_is_named_and_not_shown(supabase, supabase_store, claims):
    token = supabase.token(USER, **claims)
    error = await refusal(sign_put(supabase_store, token))
    assert error.code is ErrorCode.STORAGE_DENIED
    assert "UPLOAD_PIPELINE_JWT_ISSUER" in error.message
    assert token not in error.message


async def test_a_publishable_key_of_another_project_is_named(supabase, supabase_store):
    address = supabase.url.replace("http", "supabase+http") + "/files"
    store = open_store(address, publishable_key="sb_publishable_other")
    error = await refusal(sign_put(store, supabase.token(USER)))
    assert error.code is ErrorCode.STORAGE_DENIED
    assert "UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY" in error.message
    assert "sb_publishable_other" not in error.message
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_SUPABASE_PUBLISHABLE_KEY"):
        await store.check_urls()
    await store.close()


async def test_whether_urls_can_be_signed_is_known_before_anybody_asks_for_one(supabase, supabase_store):
    assert "users with tokens get URLs of Supabase" in await supabase_store.check_urls()
    assert supabase.keys("files") == set()
    keyless = open_store(supabase.url.replace("http", "supabase+http") + "/files")
    assert "URLs of the service" in await keyless.check_urls()
    del supabase.buckets["files"]
    with pytest.raises(PipelineError, match="the bucket does not exist"):
        await supabase_store.check_urls()


async def test_a_missing_bucket_is_no_missing_object(supabase, supabase_store):
    del supabase.buckets["files"]
    for call in (
        sign_put(supabase_store, supabase.token(USER)),
        supabase_store.put_bytes(KEY, b"x"),
        supabase_store.get_bytes(KEY, 1),
        supabase_store.head(KEY),
        supabase_store.delete([KEY]),
    ):
        error = await refusal(call)
        assert error.code is ErrorCode.STORAGE_UNAVAILABLE
        assert "the bucket does not exist" in error.message


async def test_s3_keys_that_are_wrong_are_named(supabase, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store(supabase.url.replace("http", "supabase+http") + "/files")
    error = await refusal(store.put_bytes(KEY, b"x"))
    assert error.code is ErrorCode.STORAGE_DENIED
    assert "SignatureDoesNotMatch" in error.message


@pytest.mark.parametrize("fault", ["server_error", "timeout", "slow_down", "dropped"])
async def test_what_passes_is_tried_again(supabase, supabase_store, fault):
    assert supabase_store.backend.urls.pauses == (1, 2, 4)
    store = quick(supabase_store)
    supabase.misbehave(fault, times=3, of="upload/sign")
    assert await sign_put(store, supabase.token(USER)) is not None
    assert supabase.requests[f"POST {API}/object/upload/sign/files/some/prefix/{KEY}"] == 4
    supabase.misbehave(fault, of="s3/files/some/prefix/raw")
    await supabase_store.put_bytes(KEY, b"x")
    assert supabase.keys("files") == {f"some/prefix/{KEY}"}
    await store.close()


async def test_a_large_object_stands_though_the_last_answer_was_lost(supabase, supabase_store):
    content = b"0123456789abcdef" * 600_000
    supabase.misbehave("dropped", of=f"{KEY}?uploadId")
    await supabase_store.put_bytes(KEY, content)
    assert await supabase_store.get_bytes(KEY, len(content)) == content


async def test_a_large_object_that_does_not_stand_is_told(supabase, supabase_store):
    content = b"0123456789abcdef" * 600_000

    supabase.buckets["files"].uploads = Forgetful()
    error = await refusal(supabase_store.put_bytes(KEY, content))
    assert error.code is ErrorCode.STORAGE_UNAVAILABLE
    assert "NoSuchUpload" in error.message
    assert supabase.keys("files") == set()


async def test_what_does_not_pass_is_given_up(supabase, supabase_store):
    store = quick(supabase_store)
    supabase.misbehave("timeout", times=9)
    error = await refusal(sign_put(store, supabase.token(USER)))
    assert error.code is ErrorCode.STORAGE_UNAVAILABLE
    assert "timed out" in error.message
    assert supabase.requests.total() == 4
    await store.close()


async def test_a_server_that_never_answers_is_given_up(supabase, supabase_store):
    supabase.misbehave("hang", times=9)
    store = replace(supabase_store, progress_seconds=0.2)
    for call in (sign_put(store, supabase.token(USER)), store.put_bytes(KEY, b"x")):
        error = await refusal(call)
        assert error.code is ErrorCode.STORAGE_UNAVAILABLE
        assert "nothing moved for 0.2 s" in error.message


@pytest.mark.parametrize("body", ["[]", "{}", '{"url": 5}', '{"url": "//elsewhere"}', "not JSON"])
async def test_an_answer_without_a_url_is_no_success(monkeypatch, supabase, body):
    async def odd(request: web.Request) -> web.Response:
        return web.Response(text=body)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", odd)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    store = open_store(url.replace("http", "supabase+http") + "/files", publishable_key=PUBLISHABLE_KEY)
    error = await refusal(sign_put(store, "token"))
    assert error.code is ErrorCode.STORAGE_UNAVAILABLE
    await store.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, b'{"statusCode": "404"}', Verdict.DONE),
        (400, b'{"statusCode":"409","error":"Duplicate","message":"The resource already exists"}', Verdict.DUPLICATE),
        (400, b'{"statusCode":"404","error":"Bucket not found","message":"Bucket not found"}', Verdict.NO_BUCKET),
        (400, b'{"statusCode":"404","error":"x","message":"x","code":"NoSuchBucket"}', Verdict.NO_BUCKET),
        (400, b'{"statusCode":"404","error":"not_found","message":"Object not found"}', Verdict.NO_OBJECT),
        (404, b'{"statusCode":"404","error":"not_found","message":"Object not found"}', Verdict.NO_OBJECT),
        (400, b'{"statusCode":"403","error":"Unauthorized","message":"new row violates"}', Verdict.DENIED),
        (400, b'{"statusCode":"403","error":"Unauthorized","message":"\\"exp\\" claim"}', Verdict.BAD_TOKEN),
        (400, b'{"statusCode":"403","error":"Unauthorized","message":"jwt malformed"}', Verdict.BAD_TOKEN),
        (400, b'{"statusCode":"400","error":"InvalidJWT","message":"x"}', Verdict.BAD_TOKEN),
        (401, b'{"message":"Invalid API key"}', Verdict.BAD_KEY),
        (403, b"<html>", Verdict.BAD_KEY),
        (400, b'{"statusCode":"429","error":"x","message":"x"}', Verdict.TRY_AGAIN),
        (400, b'{"statusCode":"x","code":"SlowDown","message":"x"}', Verdict.TRY_AGAIN),
        (544, b"", Verdict.TRY_AGAIN),
        (500, b"\xff", Verdict.TRY_AGAIN),
        (400, b'{"statusCode":"400","error":"InvalidKey","message":"Invalid key: x"}', Verdict.REFUSED),
        (400, b"", Verdict.REFUSED),
    ],
)
def test_answers_are_read_by_their_bodies(status, body, verdict):
    answer = read_answer(status, body)
    assert answer.verdict is verdict
    assert "\n" not in answer.reason


# --- opening


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_half_a_configuration_is_refused_with_what_is_missing(monkeypatch, missing):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    open_store("supabase://abcdefghijklmnopqrst/files")
    monkeypatch.delenv(missing)
    with pytest.raises(PipelineError) as caught:
        open_store("supabase://abcdefghijklmnopqrst/files")
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert caught.value.message.startswith(f"{missing} is not set")


def test_a_session_token_is_refused(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "a")
    with pytest.raises(PipelineError, match="AWS_SESSION_TOKEN"):
        open_store("supabase://abcdefghijklmnopqrst/files")


@pytest.mark.parametrize("variable", ["AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED"])
def test_encryption_that_the_environment_would_ask_for_is_refused(monkeypatch, variable):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a")
    open_store("supabase://abcdefghijklmnopqrst/files")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(PipelineError) as caught:
        open_store("supabase://abcdefghijklmnopqrst/files")
    assert (caught.value.code, variable in caught.value.message) == (ErrorCode.SETTING_INVALID, True)


async def test_endpoints_of_other_buckets_are_not_heeded(supabase, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    store = open_store(supabase.url.replace("http", "supabase+http") + "/files")
    await store.check_writable()
    assert re.search(rf"PUT {API}/s3/files/incoming/", " ".join(supabase.requests))


async def test_two_writers_of_one_key_leave_one_whole_object(supabase, supabase_store):
    """Nothing is written as `create only`, which its S3 does not heed: whoever ends last is found, and whole."""
    bodies = [bytes([65 + number]) * 100_000 for number in range(5)]
    await asyncio.gather(*(supabase_store.put_bytes(KEY, body) for body in bodies))
    assert await supabase_store.get_bytes(KEY, 100_000) in bodies
    assert supabase.buckets == {"files": Bucket(supabase.buckets["files"].objects)}


async def test_a_closed_store_signs_again(supabase, supabase_store):
    await supabase_store.close()
    assert await sign_put(supabase_store, supabase.token(USER)) is not None
    await supabase_store.close()
    await supabase_store.close()
