"""The simulator as the official client sees it: statuses in bodies, policies, signed URLs, paging, faults; and S3."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import quote
from uuid import uuid4

import httpx
import obstore
import pytest
from obstore.exceptions import PermissionDeniedError
from obstore.store import S3Store
from s3_servers import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.types import CreateSignedUploadUrlOptions

from tests.simulators.object_server import Bucket
from tests.simulators.simulator_process import running_simulator
from tests.simulators.supabase_storage import API, SupabaseStorage
from tests.simulators.supabase_wire import PUBLISHABLE_KEY, SECRET_KEY

USER = str(uuid4())
KEY = f"raw/{USER}/document"


@pytest.fixture
async def server() -> AsyncIterator[SupabaseStorage]:
    async with SupabaseStorage(buckets={"files": Bucket()}) as server:
        yield server


def client(server: SupabaseStorage, bearer: str, apikey: str = PUBLISHABLE_KEY) -> AsyncStorageClient:
    return AsyncStorageClient(f"{server.url}{API}/", {"apikey": apikey, "Authorization": f"Bearer {bearer}"})


@pytest.fixture
async def user(server: SupabaseStorage) -> AsyncIterator[AsyncStorageClient]:
    async with client(server, server.token(USER)) as opened:
        yield opened


async def refused(call: object) -> tuple[str, str]:
    """The true status and the error of a call, which the client finds in the body."""
    with pytest.raises(StorageApiError) as caught:
        await call  # type: ignore[misc]
    return str(caught.value.status), str(caught.value.code)


async def test_an_object_goes_in_and_out_and_tells_of_itself(server, user):
    files = user.from_("files")
    sent = await files.upload(KEY, b"bytes", {"content-type": "text/plain", "metadata": {"a": 1}})
    assert sent.full_path == f"files/{KEY}"
    assert await files.download(KEY) == b"bytes"
    told = await files.info(KEY)
    assert (told["size"], told["content_type"], told["metadata"]) == (5, "text/plain", {"a": 1})
    assert told["cache_control"] == "max-age=3600"
    assert await files.exists(KEY)
    assert not await files.exists(f"raw/{USER}/other")
    assert server.buckets["files"].objects[KEY].owner == USER


async def test_the_status_is_400_and_the_true_one_stands_in_the_body(server):
    headers = {"apikey": PUBLISHABLE_KEY, "Authorization": f"Bearer {server.token(USER)}"}
    async with httpx.AsyncClient(headers=headers) as http:
        answer = await http.get(f"{server.url}{API}/object/files/{KEY}")
    assert answer.status_code == 400
    assert answer.json() == {
        "statusCode": "404",
        "error": "not_found",
        "message": "Object not found",
        "code": "NoSuchKey",
    }


async def test_a_second_upload_is_a_duplicate_and_upsert_needs_more_rights(server, user):
    files = user.from_("files")
    await files.upload(KEY, b"first")
    assert await refused(files.upload(KEY, b"second")) == ("409", "Duplicate")
    assert await refused(files.upload(KEY, b"second", {"x-upsert": "true"})) == ("403", "Unauthorized")
    assert await refused(files.update(KEY, b"second")) == ("403", "Unauthorized")
    assert await files.download(KEY) == b"first"
    async with client(server, SECRET_KEY, SECRET_KEY) as service:
        await service.from_("files").update(KEY, b"second")
    assert await files.download(KEY) == b"second"


async def test_policies_show_each_user_the_own_folder_alone(server, user):
    await user.from_("files").upload(KEY, b"mine")
    async with client(server, server.token(str(uuid4()))) as stranger:
        files = stranger.from_("files")
        assert await refused(files.download(KEY)) == ("404", "not_found")
        assert await refused(files.upload(f"raw/{USER}/mine", b"x")) == ("403", "Unauthorized")
        assert await refused(files.create_signed_upload_url(f"raw/{USER}/mine")) == ("403", "Unauthorized")
        assert await refused(files.create_signed_url(KEY, 60)) == ("404", "not_found")
        assert await files.list(f"raw/{USER}") == []
        assert await files.remove([KEY]) == []
    async with client(server, PUBLISHABLE_KEY) as nobody:
        assert await refused(nobody.from_("files").download(KEY)) == ("404", "not_found")
    assert server.keys("files") == {KEY}


@pytest.mark.parametrize(
    ("claims", "error"), [({"exp": int(time.time()) - 1}, "InvalidJWT"), ({"aud": "other"}, "Unauthorized")]
)
async def test_a_token_that_is_not_good_is_refused(server, claims, error):
    async with client(server, server.token(USER, **claims)) as caller:
        assert (await refused(caller.from_("files").download(KEY)))[1] == error


async def test_the_gateway_asks_for_a_key_that_it_knows(server):
    async with client(server, server.token(USER), apikey="sb_publishable_other") as caller:
        with pytest.raises(StorageApiError) as caught:
            await caller.from_("files").download(KEY)
    assert caught.value.status == 401


async def test_a_signed_upload_is_for_its_key_once_and_past_the_policies(server, user):
    files = user.from_("files")
    signed = await files.create_signed_upload_url(KEY)
    assert await refused(files.upload_to_signed_url(f"raw/{USER}/other", signed["token"], b"x")) == (
        "400",
        "InvalidSignature",
    )
    server.policy = lambda *_: False
    sent = await files.upload_to_signed_url(KEY, signed["token"], b"bytes", {"content-type": "text/plain"})
    assert sent.full_path == f"files/{KEY}"
    assert await refused(files.upload_to_signed_url(KEY, signed["token"], b"again")) == ("409", "Duplicate")
    stored = server.buckets["files"].objects[KEY]
    assert (stored.data, stored.content_type, stored.owner) == (b"bytes", "text/plain", USER)


async def test_a_signed_upload_takes_raw_bytes_and_forms_whose_field_has_no_name(server, user):
    """As supabase-js sends them; without any credentials."""
    async with httpx.AsyncClient() as anybody:
        for name, body in (
            ("raw", {"content": b"bytes", "headers": {"Content-Type": "text/plain"}}),
            ("form", {"files": {"": ("blob", b"bytes", "text/plain")}, "data": {"cacheControl": "60"}}),
        ):
            signed = await user.from_("files").create_signed_upload_url(f"raw/{USER}/{name}")
            answer = await anybody.put(signed["signed_url"], **body)
            assert answer.json() == {"Key": f"files/raw/{USER}/{name}"}
            stored = server.buckets["files"].objects[f"raw/{USER}/{name}"]
            assert (stored.data, stored.content_type) == (b"bytes", "text/plain")


async def test_an_upload_with_upsert_replaces_where_policies_allow(server):
    server.policy = lambda *_: True
    async with client(server, server.token(USER)) as caller:
        files = caller.from_("files")
        await files.upload(KEY, b"first")
        assert await refused(files.create_signed_upload_url(KEY)) == ("409", "Duplicate")
        signed = await files.create_signed_upload_url(KEY, CreateSignedUploadUrlOptions(upsert="true"))
        await files.upload_to_signed_url(KEY, signed["token"], b"second")
        await files.upload_to_signed_url(KEY, signed["token"], b"third")
        assert await files.download(KEY) == b"third"


async def test_tokens_end(server, user):
    server.upload_seconds = -1
    files = user.from_("files")
    signed = await files.create_signed_upload_url(KEY)
    assert await refused(files.upload_to_signed_url(KEY, signed["token"], b"x")) == ("400", "InvalidJWT")
    await files.upload(KEY, b"x")
    ended = await files.create_signed_url(KEY, -1)
    async with httpx.AsyncClient() as anybody:
        answer = await anybody.get(ended["signedURL"])
    assert (answer.status_code, answer.json()["statusCode"]) == (400, "400")


async def test_a_signed_download_is_for_its_key_and_may_name_the_file(server, user):
    files = user.from_("files")
    await files.upload(KEY, b"0123456789", {"content-type": "text/plain"})
    upload = await files.create_signed_upload_url(f"raw/{USER}/other")
    signed = await files.create_signed_url(KEY, 60, {"download": "Über uns.txt"})
    plain = await files.create_signed_urls([KEY, "raw/none/none"], 60)
    assert plain[1]["error"]
    async with httpx.AsyncClient() as anybody:
        answer = await anybody.get(signed["signedURL"])
        assert (answer.content, answer.headers["content-type"]) == (b"0123456789", "text/plain")
        assert answer.headers["content-disposition"].endswith("filename*=UTF-8''%C3%9Cber%20uns.txt;")
        part = await anybody.get(plain[0]["signedURL"], headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
        assert "content-disposition" not in part.headers
        other = await anybody.get(signed["signedURL"].replace("document", "other"))
        assert other.json()["code"] == "InvalidSignature"
        wrong = await anybody.get(f"{server.url}{API}/object/sign/files/{KEY}?token={upload['token']}")
        assert wrong.json()["code"] == "InvalidSignature"


@pytest.mark.parametrize("name", ["Ünïcode.pdf", "a#b", "a%b"])
async def test_keys_are_ascii_and_of_few_signs(server, name):
    headers = {"apikey": SECRET_KEY, "Authorization": f"Bearer {SECRET_KEY}"}
    async with httpx.AsyncClient(headers=headers) as http:
        answer = await http.post(f"{server.url}{API}/object/files/raw/{quote(name)}", content=b"x")
    assert answer.json()["code"] == "InvalidKey"
    assert server.keys("files") == set()


async def test_limits_of_the_bucket_hold_at_the_upload(server, user):
    server.buckets["files"] = Bucket(max_bytes=3, media_types=("text/plain",))
    files = user.from_("files")
    signed = await files.create_signed_upload_url(KEY)
    plain = {"content-type": "text/plain"}
    assert (await refused(files.upload_to_signed_url(KEY, signed["token"], b"1234", plain)))[0] == "413"
    assert (await refused(files.upload_to_signed_url(KEY, signed["token"], b"1", {"content-type": "a/b"})))[0] == "415"
    await files.upload_to_signed_url(KEY, signed["token"], b"123", plain)


async def test_lists_come_in_pages(server, user):
    files = user.from_("files")
    for number in range(7):
        await files.upload(f"raw/{USER}/{number}", b"x")
    first = await files.list(f"raw/{USER}", {"limit": 3})
    third = await files.list(f"raw/{USER}", {"limit": 3, "offset": 6})
    assert [item["name"] for item in [*first, *third]] == ["0", "1", "2", "6"]
    assert [item["name"] for item in await files.list()] == ["raw"]
    page = await files.list_v2({"prefix": f"raw/{USER}", "limit": 5})
    assert (len(page.objects), page.hasNext) == (5, True)
    rest = await files.list_v2({"prefix": f"raw/{USER}", "limit": 5, "cursor": page.nextCursor})
    assert ([item.name for item in rest.objects], rest.hasNext) == ([f"raw/{USER}/5", f"raw/{USER}/6"], False)


async def test_missing_names_are_simply_absent_from_what_was_removed(server, user):
    await user.from_("files").upload(KEY, b"x")
    async with client(server, SECRET_KEY, SECRET_KEY) as service:
        files = service.from_("files")
        assert [item["name"] for item in await files.remove([KEY, "raw/none"])] == [KEY]
        await files.upload("raw/a", b"a")
        await files.copy("raw/a", "raw/b")
        await files.move("raw/b", "raw/c")
        assert await refused(files.move("raw/a", "raw/c")) == ("409", "Duplicate")
        assert await refused(service.from_("other").download("raw/a")) == ("404", "Bucket not found")
        await service.create_bucket("other", options={"public": False})
        assert await refused(service.from_("other").download("raw/a")) == ("404", "not_found")
    assert server.keys("files") == {"raw/a", "raw/c"}


def s3(server: SupabaseStorage, secret: str = SECRET_ACCESS_KEY) -> S3Store:
    return S3Store(
        "files",
        endpoint=f"{server.url}{API}/s3",
        region=REGION,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=secret,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


async def test_s3_sees_the_same_objects_and_replaces_whatever_is_asked(server, user):
    await user.from_("files").upload(KEY, b"by rest")
    place = s3(server)
    assert bytes(await (await obstore.get_async(place, KEY)).bytes_async()) == b"by rest"
    await obstore.put_async(place, KEY, b"by s3", mode="create")  # as the real one, it does not heed If-None-Match
    assert await user.from_("files").download(KEY) == b"by s3"
    assert bytes(await obstore.get_range_async(place, KEY, start=3, end=5)) == b"s3"
    async with httpx.AsyncClient() as anybody:
        signed = await obstore.sign_async(place, "GET", KEY, timedelta(minutes=1))
        assert (await anybody.get(signed)).content == b"by s3"
        assert "SignatureDoesNotMatch" in (await anybody.get(signed.replace("document", "other"))).text
    await obstore.delete_async(place, [KEY, "raw/none"])
    assert server.keys("files") == set()
    assert server.requests[f"POST {API}/s3/files"] == 1


async def test_s3_checks_every_signature(server):
    with pytest.raises(PermissionDeniedError, match="SignatureDoesNotMatch"):
        await obstore.put_async(s3(server, "wrong"), KEY, b"x")
    with pytest.raises(Exception, match="InvalidKey"):
        await obstore.put_async(s3(server), "raw/Ünïcode", b"x")
    assert server.keys("files") == set()


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [("server_error", "500", "Internal"), ("timeout", "544", "DatabaseTimeout"), ("slow_down", "429", "SlowDown")],
)
async def test_faults_come_as_often_as_asked_and_where(server, user, fault, status, error):
    files = user.from_("files")
    server.misbehave(fault, of="GET")
    await files.upload(KEY, b"x")
    assert await refused(files.download(KEY)) == (status, error)
    assert await files.download(KEY) == b"x"


async def test_an_answer_can_be_dropped_when_all_is_done_or_never_come(server):
    headers = {"apikey": PUBLISHABLE_KEY, "Authorization": f"Bearer {server.token(USER)}"}
    async with httpx.AsyncClient(headers=headers, timeout=0.3) as http:
        server.misbehave("dropped")
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(f"{server.url}{API}/object/files/{KEY}", content=b"x")
        assert server.keys("files") == {KEY}
        server.misbehave("hang")
        with pytest.raises(httpx.ReadTimeout):
            await http.get(f"{server.url}{API}/object/files/{KEY}")


def test_it_runs_on_its_own():
    with running_simulator("tests.simulators.supabase_storage", "--bucket", "files", "--upload-seconds", "-1") as url:
        headers = {"apikey": SECRET_KEY, "Authorization": f"Bearer {SECRET_KEY}"}
        with httpx.Client(base_url=url, headers=headers) as http:
            metadata = base64.b64encode(json.dumps({"a": "b"}).encode()).decode()
            assert http.post(f"{API}/object/files/raw/x", content=b"1", headers={"x-metadata": metadata}).is_success
            assert http.get(f"{API}/object/info/files/raw/x").json()["metadata"] == {"a": "b"}
            signed = http.post(f"{API}/object/upload/sign/files/raw/late").json()["url"]
            assert http.put(f"{API}{signed}", content=b"1").json()["error"] == "InvalidJWT"
            assert http.post("/misbehave", json={"fault": "slow_down"}).json() == {}
            assert http.get(f"{API}/object/files/raw/x").status_code == 429
            assert http.get("/requests").json()[f"POST {API}/object/files/raw/x"] == 1


def test_a_fault_that_is_none_stops_the_start() -> None:
    with pytest.raises(ValueError, match="no fault bogus"):
        SupabaseStorage(faults={"dropped": 0.1, "bogus": 0.1})
