"""Presigned S3 URLs: what they bind, and when there are none."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import obstore
import pytest
from obstore.store import MemoryStore, S3Store

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage.presigned import Presigner, sign_again
from upload_pipeline.storage.store import ObjectStore

KEY = "raw/user/document"
MINUTE = timedelta(minutes=1)
SECRET = "not/a+secret"


def bucket(**more: str) -> S3Store:
    config = {"access_key_id": "AKID", "secret_access_key": SECRET, "region": "eu-west-1"} | more
    return S3Store("bucket", prefix="some é/prefix", config=config)  # type: ignore[arg-type]


def signing(place: S3Store, signer: str = SECRET) -> ObjectStore:
    return ObjectStore(ObstoreBackend(place, Presigner(place, "AKID", signer)))


@pytest.mark.parametrize("more", [{}, {"session_token": "t/+o=k en"}, {"virtual_hosted_style_request": "true"}])
def test_signing_again_with_nothing_more_gives_the_signature_of_obstore(more):
    place = bucket(**more)
    url = obstore.sign(place, "PUT", KEY, MINUTE)
    again = sign_again(url, "PUT", SECRET, headers={}, query={})
    assert parse_qs(urlsplit(again).query) == parse_qs(urlsplit(url).query)
    assert urlsplit(again)[:3] == urlsplit(url)[:3]


async def test_a_put_binds_length_and_type_and_tells_what_to_send():
    signed = await signing(bucket()).sign_put(KEY, media_type="text/plain", file_bytes=12, expires_in=MINUTE)
    assert signed is not None
    asked = {"x-amz-server-side-encryption": "AES256"}
    once = {"if-none-match": "*"}
    assert signed.headers == {"content-type": "text/plain", "content-length": "12", **asked, **once}
    parameters = parse_qs(urlsplit(signed.url).query)
    bound = "content-length;content-type;host;if-none-match;x-amz-server-side-encryption"
    assert parameters["X-Amz-SignedHeaders"] == [bound]
    assert parameters["X-Amz-Expires"] == ["60"]
    assert SECRET not in signed.url
    assert signed.url not in repr(signed)


async def test_another_length_type_key_or_secret_is_another_signature():
    async def signature(signer: str = SECRET, key: str = KEY, media_type: str = "a/b", file_bytes: int = 1) -> str:
        store = signing(bucket(), signer)
        signed = await store.sign_put(key, media_type=media_type, file_bytes=file_bytes, expires_in=MINUTE)
        assert signed is not None
        return parse_qs(urlsplit(signed.url).query)["X-Amz-Signature"][0]

    signatures = {
        await signature(),
        await signature(signer="other"),
        await signature(key="raw/user/other"),
        await signature(media_type="a/c"),
        await signature(file_bytes=2),
    }
    assert len(signatures) == 5


async def test_a_get_names_the_file_and_its_type():
    signed = await signing(bucket()).sign_get(
        KEY, filename="Übersicht & Co.pdf", media_type="application/pdf", expires_in=MINUTE
    )
    assert signed is not None
    assert signed.headers == {}
    parameters = parse_qs(urlsplit(signed.url).query)
    assert parameters["response-content-disposition"] == [attachment("Übersicht & Co.pdf")]
    assert parameters["response-content-type"] == ["application/pdf"]
    assert parameters["X-Amz-SignedHeaders"] == ["host"]


async def test_nothing_is_signed_with_a_secret_that_is_not_the_one_of_the_store():
    store = signing(bucket(access_key_id="ASIA-of-a-role"))
    assert await store.sign_put(KEY, media_type="a/b", file_bytes=1, expires_in=MINUTE) is None
    assert await store.sign_get(KEY, filename="a", expires_in=MINUTE) is None


@pytest.mark.parametrize("backend", ["local", "memory"])
async def test_a_store_that_cannot_sign_gives_none(local, backend):
    store = local if backend == "local" else ObjectStore(ObstoreBackend(MemoryStore()))
    assert await store.sign_put(KEY, media_type="a/b", file_bytes=1, expires_in=MINUTE) is None
    assert await store.sign_get(KEY, filename="a", expires_in=MINUTE) is None


@pytest.mark.parametrize("key", ["", "../x", "raw//x"])
async def test_no_url_for_a_bad_key(key):
    for signed in (
        signing(bucket()).sign_put(key, media_type="a/b", file_bytes=1, expires_in=MINUTE),
        signing(bucket()).sign_get(key, filename="a", expires_in=MINUTE),
    ):
        with pytest.raises(PipelineError) as caught:
            await signed
        assert caught.value.code is ErrorCode.INVALID_KEY


@pytest.mark.parametrize(
    ("filename", "value"),
    [
        ("a b.pdf", 'attachment; filename="a b.pdf"'),
        ("", 'attachment; filename="document"'),
        ("\r\n\0\u202e", 'attachment; filename="document"'),
        ("a\r\nX-Evil: 1", 'attachment; filename="aX-Evil: 1"'),
        ('é"\\%;.pdf', "attachment; filename=\"e___;.pdf\"; filename*=UTF-8''%C3%A9%22%5C%25%3B.pdf"),
        ("报告.pdf", "attachment; filename=\"document.pdf\"; filename*=UTF-8''%E6%8A%A5%E5%91%8A.pdf"),
    ],
)
def test_a_name_becomes_a_header_on_one_line(filename, value):
    assert attachment(filename) == value
