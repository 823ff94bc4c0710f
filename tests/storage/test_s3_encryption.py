"""Encryption at rest is asked for with every write to a bucket, whoever makes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import aiohttp
import pytest
from aiohttp import web
from s3_proxy import Passed, Proxy, s3_proxy
from s3_servers import S3Server

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.configured import configured_store
from upload_pipeline.storage.encryption import Encryption
from upload_pipeline.storage.objects import SignedUrl
from upload_pipeline.storage.store import ObjectStore, open_store

MEGABYTE = 1024 * 1024
KEY_ARN = "arn:aws:kms:eu-central-1:123456789012:key/0b6ad4a2-1d4f-4d6a-9a0e-4b8f6f1b2c3d"
ASKED = {
    "aes256": (Encryption(), {"x-amz-server-side-encryption": "AES256"}),
    "kms": (Encryption("kms"), {"x-amz-server-side-encryption": "aws:kms"}),
    "kms key": (
        Encryption("kms", KEY_ARN),
        {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": KEY_ARN},
    ),
    "none": (Encryption("none"), {}),
}


@pytest.fixture
async def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    async with s3_proxy(s3_server.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


async def megabytes(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number]) * MEGABYTE


def about_encryption(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-amz-server-side-encryption")}


async def presigned_put(signed: SignedUrl | None, body: bytes, *without: str) -> int:
    assert signed is not None
    headers = {name: value for name, value in signed.headers.items() if name not in {"content-length", *without}}
    async with aiohttp.ClientSession() as session, session.put(signed.url, data=body, headers=headers) as answer:
        return answer.status


async def write_in_every_way(store: ObjectStore) -> None:
    await store.put_bytes("raw/one", b"x")
    await store.put_stream("raw/parts", megabytes(9))
    await store.move("raw/one", "raw/copy")
    url = await store.sign_put("raw/presigned", media_type="text/plain", file_bytes=1, expires_in=timedelta(minutes=1))
    assert await presigned_put(url, b"x") == 200


@pytest.mark.parametrize("asked", ASKED)
async def test_every_kind_of_write_asks_for_it(proxy: Proxy, s3_server: S3Server, s3_bucket: str, asked: str) -> None:
    encryption, expected = ASKED[asked]
    await write_in_every_way(open_store(f"s3://{s3_bucket}/some", encryption=encryption))
    writes: dict[str, list[dict[str, str]]] = {}
    for request in proxy.passed:
        writes.setdefault(request.kind, []).append(about_encryption(request.headers))
    assert writes.keys() == {
        *("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "CopyObject", "Delete")
    }
    assert writes["PutObject"] == [expected, expected]
    for kind in ("CreateMultipartUpload", "CopyObject"):
        assert writes[kind] == [expected]
    # S3 refuses these headers on parts; the request that began the upload speaks for them.
    assert not any(writes["UploadPart"] + writes["CompleteMultipartUpload"] + writes["Delete"])
    for name in ("parts", "copy", "presigned"):
        assert about_encryption(s3_server.headers(s3_bucket, f"some/raw/{name}")) == expected


@pytest.mark.parametrize("asked", ["aes256", "kms key"])
async def test_a_presigned_put_cannot_leave_it_out(proxy: Proxy, s3_bucket: str, asked: str) -> None:
    encryption, expected = ASKED[asked]
    store = open_store(f"s3://{s3_bucket}", encryption=encryption)
    signed = await store.sign_put("raw/x", media_type="text/plain", file_bytes=1, expires_in=timedelta(minutes=1))
    assert signed is not None
    assert expected.items() <= dict(signed.headers).items()
    for name in expected:
        assert await presigned_put(signed, b"x", name) == 403
    assert await presigned_put(signed, b"x") == 200


async def test_the_settings_reach_the_store(proxy: Proxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{s3_bucket}"
    for more, expected in (
        ({}, ASKED["aes256"][1]),
        ({"storage_encryption": "kms", "storage_kms_key_id": KEY_ARN}, ASKED["kms key"][1]),
        ({"storage_encryption": "none"}, {}),
    ):
        await configured_store(load_settings(storage_url=url, **more)).put_bytes("raw/x", b"x")
        assert about_encryption(proxy.passed[-1].headers) == expected


def test_a_key_without_its_service_is_refused() -> None:
    with pytest.raises(PipelineError, match="storage_kms_key_id is for storage_encryption=kms"):
        load_settings(storage_kms_key_id=KEY_ARN)
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_STORAGE_KMS_KEY_ID"):
        load_settings(storage_encryption="kms", storage_kms_key_id="a\r\nx-evil: 1")


@pytest.mark.parametrize(
    ("variable", "value", "encryption"),
    [
        ("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms", Encryption()),
        ("AWS_SERVER_SIDE_ENCRYPTION", "AES256", Encryption("none")),
        ("AWS_SSE_KMS_KEY_ID", "other", Encryption("kms", "mine")),
    ],
)
def test_a_variable_that_says_something_else_stops_the_start(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, encryption: Encryption
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(PipelineError) as caught:
        open_store(f"s3://{s3_bucket}", encryption=encryption)
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert variable in caught.value.message
    assert "UPLOAD_PIPELINE_STORAGE_ENCRYPTION" in caught.value.message


def test_a_variable_that_says_the_same_is_fine(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "AES256")
    open_store(f"s3://{s3_bucket}")


@pytest.mark.parametrize(
    ("status", "code", "message", "remedy"),
    [
        (400, "NotImplemented", "Server side encryption specified but KMS is not configured", "_ENCRYPTION=none"),
        (400, "InvalidArgument", "Server Side Encryption with AWS KMS managed key is not offered", "_ENCRYPTION=none"),
        (400, "KMS.NotFoundException", "Invalid keyId 'x'", "UPLOAD_PIPELINE_STORAGE_KMS_KEY_ID"),
        (403, "AccessDenied", "not authorized to perform: kms:GenerateDataKey", "kms:GenerateDataKey and kms:Decrypt"),
    ],
)
async def test_a_server_that_does_not_encrypt_is_told_with_the_remedy(
    proxy: Proxy, s3_bucket: str, status: int, code: str, message: str, remedy: str
) -> None:
    async def refuse(request: web.Request, seen: Passed, before: int) -> web.Response:
        await request.read()
        return web.Response(status=status, text=f"<Error><Code>{code}</Code><Message>{message}</Message></Error>")

    proxy.spoil = refuse
    with pytest.raises(PipelineError) as caught:
        await open_store(f"s3://{s3_bucket}").put_bytes("raw/x", b"x")
    denied = ErrorCode.STORAGE_DENIED if status == 403 else ErrorCode.STORAGE_UNAVAILABLE
    assert caught.value.code is denied
    assert code in caught.value.message
    assert remedy in caught.value.message
