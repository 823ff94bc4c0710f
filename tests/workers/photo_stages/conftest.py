"""Photos at the beginning of their way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from photo_line import DAY, PHOTO, USER, OpenLine, PhotoLine
from probe_world import FAST

from upload_pipeline.database import photos
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.photo_types import JPEG
from upload_pipeline.providers.calls import MeasuredPhotoReader, ProviderCalls
from upload_pipeline.providers.local_photo_reader import LocalPhotoReader
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.photo_keys import photo_key
from upload_pipeline.storage.photo_objects import remove_photo_objects
from upload_pipeline.storage.store import open_store
from upload_workers.steps import StepContext


@pytest.fixture(scope="module")
def reader() -> Any:
    reader = LocalPhotoReader(30.0, 512 * 1024**2, 20_000_000)
    yield reader
    reader.close()


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, reader: LocalPhotoReader
) -> AsyncIterator[OpenLine]:
    """Announces a photo, and stores its bytes unless they are to be awaited."""
    settings = load_settings(**{**FAST, "home": tmp_path, "database_url": database.worker_url})
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    store = open_store(settings.effective_storage_url)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    organization = await admin.fetchval("select upload_pipeline.add_organization('Roofs')")
    await admin.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, USER)
    project = await admin.fetchval("select upload_pipeline.add_project($1, 'Hail')", organization)
    context = StepContext(
        pool,
        store,
        None,
        None,
        settings,
        scratch,
        photos=MeasuredPhotoReader(reader, ProviderCalls()),  # type: ignore[arg-type]
    )

    async def begin(
        data: bytes = PHOTO,
        media_type: str = JPEG,
        *,
        stored: bool = True,
        window: float = 900,
        photo: UUID | None = None,
    ) -> PhotoLine:
        photo = photo or uuid4()
        key = photo_key(project, DAY, photo, media_type)
        await photos.reserve_photo(
            pool,
            photo_id=photo,
            user_id=USER,
            project_id=project,
            file_name="roof.jpg",
            media_type=media_type,
            file_bytes=len(data),
            raw_key=key,
            window=timedelta(seconds=window),
        )
        line = PhotoLine(context, admin, photo, key)
        if stored:
            await line.put(data)
        return line

    yield begin
    await pool.close()


@pytest.fixture
async def undisturbed(open_line: OpenLine) -> Any:
    """The row and the objects of a photo that nothing happened to."""

    async def of(drop: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
        line = await open_line()
        await line.drop_gps(drop)
        job = await line.run_to(await line.claim(), "extracted")
        found = await line.row(), await line.objects()
        await remove_photo_objects(line.context.store, line.raw_key)
        await line.admin.execute("delete from upload_pipeline.upload_jobs where job_id = $1", job.job_id)
        return found

    return of
