"""The policies that `storage policies` prints are enough for the service and the workers, and say nothing too much."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from s3_servers import S3Server

from tests.api.live_service import LiveService, follow, new_user, running_service, service_settings
from tests.api.photo_rows import JPEG, add_office, announce
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings
from upload_pipeline.storage.configured import configured_store
from upload_pipeline.storage.keys import incoming_key, parser_output_key
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.photo_keys import photo_key
from upload_pipeline.storage.store_mark import Mark, read_mark, write_mark
from upload_pipeline.storage.store_setup import look_at_store, store_policies
from upload_workers.process import running_worker

MEGABYTE = 1024 * 1024
UPLOAD = "/api/v2/upload"
TEXT = b"# Hail\n\nThe roof was struck by hail as large as walnuts.\n"


def settings_of(database: Any, home: Path, bucket: str, **more: Any) -> Settings:
    url = f"s3://{bucket}/files"
    return service_settings(database.worker_url, home, storage_url=url, poll_max=0.3, **more)


def become(server: S3Server, monkeypatch: pytest.MonkeyPatch, settings: Settings, process: str) -> str:
    """What is opened from now on has the key of that process; its id."""
    policies = store_policies(settings)
    assert policies is not None
    key_id = f"AKIA{process.upper()}{uuid4().hex}"
    for name, value in server.give_policy(key_id, policies[process]).items():
        monkeypatch.setenv(name, value)
    return key_id


def granted(settings: Settings, process: str) -> set[tuple[str, str]]:
    policies = store_policies(settings)
    assert policies is not None
    return {
        (action, statement["Resource"])
        for statement in policies[process]["Statement"]
        for action in statement["Action"]
    }


def used_of(server: S3Server, key_id: str, given: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The rights of a policy that were used; that nothing was asked for besides is checked as well."""
    told = server.rights(key_id)
    assert told["lacked"] == set()
    return {
        (action, resource)
        for action, resource in given
        if any(
            a == action and re.fullmatch(resource.replace("?", ".").replace("*", ".*"), arn) for a, arn in told["used"]
        )
    }


async def chunks(*blocks: bytes, fail: bool = False) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block
    if fail:
        raise RuntimeError("the source broke")


async def huge_form(megabytes: int) -> AsyncIterator[bytes]:
    """A form that does not say beforehand how long it is."""
    yield b'--edge\r\nContent-Disposition: form-data; name="file"; filename="huge.txt"\r\n\r\n'
    for _ in range(megabytes):
        yield b"words and more. " * (MEGABYTE // 16)
    yield b"\r\n--edge--\r\n"


async def announce_and_send(service: LiveService, client: httpx.AsyncClient, content: bytes) -> dict[str, Any]:
    announced = {
        "filename": "hail.md",
        "bytes_len": len(content),
        "mime": "text/markdown",
        "sha256": sha256(content).hexdigest(),
    }
    told: dict[str, Any] = (await client.post(UPLOAD, json=announced)).json()
    async with httpx.AsyncClient() as outside:
        assert (
            await outside.put(told["upload_url"], content=content, headers=told["upload_headers"])
        ).status_code == 200
    assert (await client.post(f"{UPLOAD}/{told['document_id']}/complete")).status_code < 300
    return told


async def test_the_service_and_a_worker_do_all_they_do_with_the_printed_policies(
    database: Any,
    admin: asyncpg.Connection,
    tmp_path: Path,
    s3_server: S3Server,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(database, tmp_path, s3_bucket, max_file_bytes=9 * MEGABYTE)
    api = become(s3_server, monkeypatch, settings, "api")
    async with running_service(settings) as service:
        await service.resources.store.check_writable()
        client = service.client(new_user())
        form = await client.post(UPLOAD, files={"file": ("roof.md", TEXT + b"\nAnd more.\n", "text/markdown")})
        assert form.status_code == 202, form.text
        # Of more than 8 MB it is sent in parts, which are given up when the limit is passed.
        form_of = {"Content-Type": "multipart/form-data; boundary=edge"}
        huge = await client.post(UPLOAD, content=huge_form(12), headers=form_of)
        assert huge.status_code == 413
        told = await announce_and_send(service, client, TEXT)
        office = await add_office(admin)
        photos = service.client(office.admin)
        shot = await announce(photos, office.project_id)
        async with httpx.AsyncClient() as outside:
            sent = await outside.put(shot["upload_url"], content=JPEG, headers=shot["headers"])
            assert sent.status_code == 200, sent.text
        path = f"/api/v1/photos/{shot['photo_id']}"
        assert (await photos.patch(f"{path}/status", json={"status": "uploaded"})).status_code == 200

        worker = become(s3_server, monkeypatch, settings, "workers")
        async with running_worker(settings, settings.database_url.get_secret_value()):
            for caller, job in ((client, form.json()["job_id"]), (client, told["job_id"]), (photos, shot["upload_id"])):
                assert (await follow(caller, job))[-1].data == {"state": "done"}
        store = configured_store(settings)
        photo = photo_key(uuid4(), date(2026, 11, 21), uuid4(), "image/jpeg")
        for key in (parser_output_key(uuid4(), uuid4()), photo):
            with pytest.raises(RuntimeError, match="the source broke"):
                await store.put_stream(key, chunks(bytes(9 * MEGABYTE), fail=True))

        document = f"/api/v2/documents/{told['document_id']}"
        async with httpx.AsyncClient() as outside:
            download = (await client.get(f"{document}/download")).json()["download_url"]
            assert (await outside.get(download)).content == TEXT
        assert (await client.get(f"{document}/markdown")).status_code == 200
        assert (await client.delete(document)).status_code == 204

        shown = (await photos.get(shot["status_url"])).json()
        async with httpx.AsyncClient() as outside:
            assert (await outside.get(shown["thumbnail_url"])).status_code == 200
        assert (await photos.delete(path)).status_code == 204

        # What is left belongs to nobody any more: a sweep may look at all of it and remove it.
        other = configured_store(settings)
        await other.put_bytes(incoming_key(uuid4()), b"an upload that never ended")
        await other.put_bytes(photo, b"nobody's")

        async def nobody(document_ids: list[Any]) -> set[Any]:
            return set()

        await write_mark(other, mark := uuid4())
        assert await read_mark(other) == Mark(mark)
        asked = 0

        async def somebody_at_last(document_ids: list[Any]) -> set[Any]:
            nonlocal asked
            asked += 1
            return set() if asked < 3 else set(document_ids)

        later = datetime.now(UTC) + timedelta(hours=2)
        assert (await sweep(other, somebody_at_last, now=later, grace=timedelta(hours=1))).objects == 1  # the upload
        swept = await sweep(other, nobody, now=later, grace=timedelta(hours=1))
        assert swept.objects == 4
    for key_id, process in ((api, "api"), (worker, "workers")):
        assert used_of(s3_server, key_id, granted(settings, process)) == granted(settings, process), process


async def test_neither_may_do_the_others_part(
    database: Any, tmp_path: Path, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(database, tmp_path, s3_bucket)
    for process, key in (
        ("api", parser_output_key(uuid4(), uuid4())),
        ("api", "somebody/elses"),
        ("workers", "somebody/elses"),
    ):
        become(s3_server, monkeypatch, settings, process)
        with pytest.raises(PipelineError) as caught:
            await configured_store(settings).put_bytes(key, b"x")
        assert caught.value.code is ErrorCode.STORAGE_DENIED
        outside = configured_store(settings.model_copy(update={"storage_url": f"s3://{s3_bucket}"}))
        with pytest.raises(PipelineError) as caught:
            await outside.get_bytes("raw/x/y", 1)
        assert caught.value.code is ErrorCode.STORAGE_DENIED


async def test_the_policy_for_the_setup_is_enough_and_no_more(
    database: Any, tmp_path: Path, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(database, tmp_path, f"new-{uuid4()}", cors_origins=("https://app.example.com",))
    key_id = become(s3_server, monkeypatch, settings, "setup")
    parts = await look_at_store(settings, mend=True)
    assert {part.state for part in parts} <= {"ok", "changed"}
    assert [part.state for part in await look_at_store(settings, mend=False)] == ["ok"] * len(parts)
    given = granted(settings, "setup")
    # Not asked for here: a new bucket's access list is private already, and TLS is not to be had from this server.
    spared = {right for right in given if right[0] in ("s3:PutBucketAcl", "s3:PutBucketPolicy")}
    assert used_of(s3_server, key_id, given) == given - spared
