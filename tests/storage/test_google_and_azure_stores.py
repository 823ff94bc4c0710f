"""What buckets of Google and containers of Azure do that other stores do not: parts, refusals, URLs for others."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import aiohttp
import obstore
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from obstore.store import AzureStore, GCSStore

from tests.simulators.azure_blob import ACCOUNT, KEY, AzureBlob
from tests.simulators.gcs import EMAIL, POWERLESS, GoogleStorage
from tests.simulators.object_server import ObjectServer
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.azure_urls import AzureUrls
from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.google_urls import GoogleUrls, account_key, sign_again
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.store import ObjectStore, open_store

DOCUMENT = "raw/user/document"
MINUTE = timedelta(minutes=1)
MEGABYTE = 1024 * 1024
OTHER_KEY = base64.b64encode(b"another").decode()


@dataclass
class Place:
    """A simulated store, its address, and how its credentials are made worse."""

    server: ObjectServer
    scheme: str
    wrong: Callable[[], None]
    powerless: Callable[[], None]
    remedies: tuple[str, str]

    def open(self, bucket: str = "files/some/prefix") -> ObjectStore:
        return open_store(f"{self.scheme}://{bucket}")


@pytest.fixture(params=["google", "azure"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "google":
        google: GoogleStorage = request.getfixturevalue("google")
        stranger = rsa.generate_private_key(65537, 2048)
        return Place(
            google,
            "gs",
            lambda: monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google.account(key=stranger)),
            lambda: monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google.account(POWERLESS)),
            ("GOOGLE_APPLICATION_CREDENTIALS", "roles/storage.objectUser"),
        )
    azure: AzureBlob = request.getfixturevalue("azure")
    return Place(
        azure,
        "az",
        lambda: monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", OTHER_KEY),
        lambda: setattr(azure, "powerless", True),
        ("AZURE_STORAGE_ACCOUNT_KEY", "Storage Blob Data Contributor"),
    )


async def megabytes(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * MEGABYTE


async def test_objects_lie_below_the_prefix_and_their_keys_do_not_show_it(place):
    store = place.open()
    await store.put_bytes(DOCUMENT, b"x")
    assert place.server.keys("files") == {f"some/prefix/{DOCUMENT}"}
    assert [info.key async for info in store.list("raw")] == [DOCUMENT]


async def test_an_object_of_eight_megabytes_is_one_put_and_a_larger_one_is_sent_in_parts(place):
    store = place.open("files")
    await store.put_stream("raw/whole", megabytes(8))
    assert place.server.requests.total() == 1
    await store.put_stream("raw/parts", megabytes(17))
    # four parts, and one or two requests around them
    assert 5 <= place.server.requests.total() - 1 <= 6
    assert await store.get_bytes("raw/parts", 17 * MEGABYTE) == b"".join([m async for m in megabytes(17)])


async def test_a_large_put_that_fails_leaves_no_object(place):
    async def breaking() -> AsyncIterator[bytes]:
        async for block in megabytes(20):
            yield block
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        await place.open().put_stream(DOCUMENT, breaking())
    assert place.server.keys("files") == set()
    if place.scheme == "gs":  # Azure forgets the blocks after a week, and cannot be told to before
        assert place.server.buckets["files"].uploads == {}


# --- refusals


async def refusals(store: ObjectStore) -> list[PipelineError]:
    errors = []
    for call in (
        store.put_bytes(DOCUMENT, b"x"),
        store.put_stream(DOCUMENT, megabytes(9)),
        store.get_bytes(DOCUMENT, 1),
        store.head(DOCUMENT),
        store.move(DOCUMENT, "raw/other"),
        anext(store.list()),
    ):
        with pytest.raises(PipelineError) as caught:
            await call
        errors.append(caught.value)
    return errors


async def test_a_missing_bucket_is_no_missing_object(place):
    for error in await refusals(place.open("no-such-bucket")):
        assert error.code is ErrorCode.STORAGE_UNAVAILABLE
        assert "the bucket does not exist. Create it, or correct UPLOAD_PIPELINE_STORAGE_URL" in error.message


async def test_credentials_that_are_wrong_are_named(place):
    place.wrong()
    for error in await refusals(place.open()):
        assert error.code is ErrorCode.STORAGE_DENIED
        assert OTHER_KEY not in error.message
        if "look at" not in error.message:  # an answer to HEAD has no body to say more
            assert place.remedies[0] in error.message


async def test_credentials_without_rights_are_told_which_they_lack(place):
    place.powerless()
    for error in await refusals(place.open()):
        assert error.code is ErrorCode.STORAGE_DENIED
        if "look at" not in error.message:
            assert place.remedies[1] in error.message


@pytest.mark.parametrize("fault", ["server_error", "timeout", "slow_down", "dropped"])
async def test_what_passes_is_tried_again(place, fault):
    place.server.misbehave(fault, of="PUT")
    await place.open().put_bytes(DOCUMENT, b"x")
    assert place.server.keys("files") == {f"some/prefix/{DOCUMENT}"}
    assert place.server.requests.total() == 2


@pytest.mark.parametrize("lost", ["PUT", "the deletion"])
async def test_a_move_whose_answer_was_lost_is_done_all_the_same(place, lost):
    store = place.open()
    await store.put_bytes(DOCUMENT, b"x")
    deletion = "DELETE" if place.scheme == "gs" else "POST"
    place.server.misbehave("dropped", of=deletion if lost == "the deletion" else lost)
    await store.move(DOCUMENT, "raw/moved")
    assert place.server.keys("files") == {"some/prefix/raw/moved"}
    with pytest.raises(PipelineError) as caught:
        await store.move(DOCUMENT, "raw/moved")
    assert caught.value.code is ErrorCode.OBJECT_MISSING
    assert place.server.keys("files") == {"some/prefix/raw/moved"}


async def test_a_server_that_never_answers_is_given_up(place):
    place.server.misbehave("hang", times=9)
    store = replace(place.open(), progress_seconds=0.2)
    for call in (store.put_bytes(DOCUMENT, b"x"), store.get_bytes(DOCUMENT, 1), store.delete([DOCUMENT])):
        with pytest.raises(PipelineError) as caught:
            await call
        assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
        assert "nothing moved for 0.2 s" in caught.value.message


# --- opening


@pytest.mark.parametrize(
    ("url", "variables", "named"),
    [
        ("az://files", {"AZURE_STORAGE_ACCOUNT_NAME": ""}, "AZURE_STORAGE_ACCOUNT_NAME is not set"),
        ("az://files", {"AZURE_STORAGE_ACCOUNT_KEY": "not base64: hunter2"}, "AZURE_"),
        ("az://files", {"AZURE_STORAGE_ENDPOINT": "http://storage.example.com"}, "AZURE_ALLOW_HTTP"),
        ("gs://files", {"GOOGLE_BASE_URL": "http://storage.example.com"}, "GOOGLE_ALLOW_HTTP"),
        ("gs://files", {"GOOGLE_SERVICE_ACCOUNT_KEY": "hunter2"}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://files", {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "hunter2"}'}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://files", {"GOOGLE_SERVICE_ACCOUNT": "/nowhere/at/all.json"}, "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_variables_that_do_not_fit_are_named(monkeypatch, url, variables, named):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError) as caught:
        open_store(url)
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert named in caught.value.message
    assert "hunter2" not in caught.value.message


# --- URLs for others


async def put(signed: SignedUrl, body: bytes, **other: str) -> int:
    headers = dict(signed.headers) | {name.replace("_", "-"): value for name, value in other.items()}
    async with aiohttp.ClientSession() as session, session.put(signed.url, data=body, headers=headers) as answer:
        return answer.status


async def sign_put(store: ObjectStore) -> SignedUrl | None:
    return await store.sign_put(
        DOCUMENT, media_type="text/plain", file_bytes=5, file_sha256="0" * 64, expires_in=MINUTE, caller_token="any"
    )


async def test_a_put_to_google_binds_length_and_type_and_no_content(google):
    store = open_store("gs://files/some/prefix")
    signed = await sign_put(store)
    assert signed is not None
    assert signed.headers == {
        "content-type": "text/plain",
        "x-goog-content-length-range": "5,5",
        "x-goog-if-generation-match": "0",
    }
    assert await put(signed, b"1234") == 400
    assert await put(signed, b"123456") == 400
    assert await put(signed, b"12345", content_type="text/html") == 403
    assert await put(signed, b"123456", x_goog_content_length_range="6,6") == 403
    unbound = SignedUrl(signed.url, {"content-type": "text/plain"})
    assert await put(unbound, b"123456") == 403
    assert google.keys("files") == set()
    assert await put(signed, b"12345") == 200
    assert await put(signed, b"again") == 412
    assert await store.get_bytes(DOCUMENT, 5) == b"12345"


@pytest.mark.parametrize("file_sha256", [None, "0" * 64])
async def test_what_was_sent_to_google_is_replaced_by_nobody_but_the_service(google, file_sha256):
    store = open_store("gs://files")

    async def sign() -> SignedUrl | None:
        return await store.sign_put(
            DOCUMENT, media_type="text/plain", file_bytes=5, file_sha256=file_sha256, expires_in=MINUTE
        )

    signed = await sign()
    assert signed is not None
    assert await put(signed, b"first") == 200
    assert await put(signed, b"again") == 412
    assert await put(signed, b"again", x_goog_if_generation_match="1") == 403
    unbound = {name: value for name, value in signed.headers.items() if name != "x-goog-if-generation-match"}
    assert await put(SignedUrl(signed.url, unbound), b"again") == 403
    assert await store.get_bytes(DOCUMENT, 5) == b"first"
    assert await sign() is None
    await store.delete([DOCUMENT])
    assert await sign() is not None


async def test_azure_signs_no_put_as_it_could_bind_nothing(azure):
    assert await sign_put(open_store("az://files")) is None
    assert "clients send bytes to URLs of the service" in await open_store("az://files").check_urls()


async def test_a_get_is_saved_under_its_name(place):
    store = place.open()
    await store.put_bytes(DOCUMENT, b"<script>alert(1)</script>")
    signed = await store.sign_get(DOCUMENT, filename='Über "x".html', media_type="text/html", expires_in=MINUTE)
    assert signed is not None
    async with aiohttp.ClientSession() as session:
        async with session.get(signed.url) as answer:
            assert answer.status == 200
            assert await answer.read() == b"<script>alert(1)</script>"
            assert answer.headers["Content-Disposition"] == attachment('Über "x".html')
            assert answer.headers["Content-Type"] == "text/html"
        for changed in (signed.url.replace("attachment", "inline"), signed.url.replace("document", "other")):
            async with session.get(changed) as answer:
                assert answer.status == 403
        async with session.put(signed.url, data=b"x") as answer:
            assert answer.status == 403
    assert KEY not in signed.url


async def test_signed_urls_end(place):
    store = place.open()
    await store.put_bytes(DOCUMENT, b"x")
    signed = await store.sign_get(DOCUMENT, filename="a", expires_in=timedelta(seconds=1))
    assert signed is not None
    await asyncio.sleep(2.1)  # whole seconds
    async with aiohttp.ClientSession() as session, session.get(signed.url) as answer:
        assert answer.status == 403


async def test_clients_are_sent_to_the_public_endpoint(place):
    store = open_store(f"{place.scheme}://files", public_endpoint="https://files.example.com/")
    signed = await store.sign_get(DOCUMENT, filename="a", expires_in=MINUTE)
    assert signed is not None
    assert signed.url.startswith(f"https://files.example.com/files/{DOCUMENT}?")


async def test_whether_an_object_stands_is_asked_where_this_process_reaches_the_bucket(google):
    store = open_store("gs://files", public_endpoint="https://files.example.com/")
    signed = await sign_put(store)
    assert signed is not None
    assert signed.url.startswith(f"https://files.example.com/files/{DOCUMENT}?")
    await store.put_bytes(DOCUMENT, b"12345")
    assert await sign_put(store) is None


async def test_signing_again_with_nothing_more_gives_the_signature_of_obstore(google, azure, monkeypatch):
    """So what is signed is what Google and Azure are known to check, not only what the simulators do."""
    bucket = open_store("gs://files/some/prefix").backend
    assert isinstance(bucket, ObstoreBackend)
    assert isinstance(bucket.urls, GoogleUrls)
    monkeypatch.delenv("GOOGLE_BASE_URL")  # with one obstore signs for the host of Google all the same
    standard = GCSStore("files", config={"service_account_key": google.account()})
    url = obstore.sign(standard, "PUT", DOCUMENT, MINUTE)
    again = sign_again(url, "PUT", bucket.urls.key, headers={}, query={})
    assert parse_qs(urlsplit(again).query) == parse_qs(urlsplit(url).query)
    monkeypatch.delenv("AZURE_STORAGE_ENDPOINT")
    container = open_store("az://files/some/prefix").backend
    assert isinstance(container, ObstoreBackend)
    assert isinstance(container.place, AzureStore)
    assert isinstance(container.urls, AzureUrls)
    # It makes sure of that itself, each time: with another key there is no URL.
    assert (
        await container.urls.get(DOCUMENT, filename="a", media_type=None, expires_in=MINUTE, caller_token=None)
        is not None
    )
    other = replace(container.urls, account_key=OTHER_KEY)
    assert await other.get(DOCUMENT, filename="a", media_type=None, expires_in=MINUTE, caller_token=None) is None


async def test_google_signs_nothing_without_the_accounts_own_key(google, monkeypatch, tmp_path: Path):
    file = tmp_path / "account.json"
    file.write_text(google.account())
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    assert account_key({}) is None
    key = account_key({"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    assert key is not None
    assert key.email == EMAIL
    assert "PRIVATE" not in repr(key)
    user = {"type": "authorized_user", "refresh_token": "x"}
    assert account_key({"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(user)}) is None
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    store = open_store("gs://files")
    assert await sign_put(store) is not None
    assert isinstance(store.backend, ObstoreBackend)
    assert isinstance(store.backend.urls, GoogleUrls)
    stranger = replace(store.backend.urls, key=replace(key, email="another@example.com"))
    assert await sign_put(replace(store, backend=replace(store.backend, urls=stranger))) is None
