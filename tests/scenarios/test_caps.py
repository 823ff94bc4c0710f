"""Workers keep every user's cap: sixteen of one pipeline, and those of documents and photos beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import date, timedelta
from uuid import UUID, uuid4

import asyncpg
from photo_files import jpeg, picture

from tests.scenarios.world import World, spread_over_users, write_documents
from upload_pipeline.database import photos
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.photo_types import JPEG
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.photo_keys import photo_key
from upload_pipeline.storage.store import open_store
from upload_workers.process import running_worker
from upload_workers.steps import Advance, Outcome, StepContext

CAP = 2
WORKERS = 16
AT_WORK = """
    select pool, pipeline, max(n) as most
      from (select pool, pipeline, user_id, count(*) as n from upload_pipeline.upload_jobs
             where state = 'working' group by pool, pipeline, user_id) counted
     group by pool, pipeline
"""


async def short_work(job: ClaimedJob, context: StepContext) -> Outcome:
    """Takes long enough for others to claim meanwhile."""
    del job, context
    await asyncio.sleep(0.01)
    return Advance()


async def test_sixteen_workers_never_pass_the_cap_of_a_user(world: World) -> None:
    admin = await asyncpg.connect(world.admin_url)
    users = [uuid4() for _ in range(5)]
    documents = await documents_of(admin, users, 60)
    settings = load_settings(
        home=world.home, database_url=world.worker_url, pool_size=2, poll_min=0.01, poll_max=0.05, log_level="error"
    )
    samples: list[int] = []
    async with AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(
                running_worker(
                    settings, world.worker_url, pools=["caps"], concurrency=4, steps={("caps", "todo"): short_work}
                )
            )
        await admin.fetch("select * from upload_pipeline.enqueue_jobs($1, $2, 'caps')", *documents)
        async with asyncio.timeout(60):
            while await admin.fetchval("select count(*) from upload_pipeline.upload_jobs where state <> 'done'"):
                most = await admin.fetchval(
                    "select max(n) from (select count(*) as n from upload_pipeline.upload_jobs"
                    " where state = 'working' group by user_id) counted"
                )
                samples.append(most or 0)
    await admin.close()
    assert max(samples) == CAP, "the cap is reached and never passed"
    assert len(samples) >= 20


async def test_workers_of_photos_and_of_documents_keep_their_caps_beside_each_other(world: World) -> None:
    admin = await asyncpg.connect(world.admin_url)
    await admin.execute("update upload_pipeline.stages set pool = 'photos' where pipeline = 'photo'")
    files = spread_over_users(write_documents(world.home / "files", 24), users=3)
    users = sorted({user for _, user in files})
    await world.ingest(files)
    await photos_of(admin, world, users, 8)
    # each worker alone could lead more of a user's jobs than the cap lets
    world.environment["UPLOAD_PIPELINE_WORKER_CONCURRENCY"] = "6"
    for pool in ("photos", "photos", "default", "default"):
        world.environment["UPLOAD_PIPELINE_WORKER_POOLS"] = f'["{pool}"]'
        world.start_worker()

    at_work: list[dict[tuple[str, str], int]] = []
    try:
        async with asyncio.timeout(180):
            while await admin.fetchval("select count(*) from upload_pipeline.upload_jobs where finished_at is null"):
                rows = await admin.fetch(AT_WORK)
                at_work.append({(row["pool"], row["pipeline"]): row["most"] for row in rows})
                await asyncio.sleep(0.005)
        ended = await admin.fetch(
            "select pipeline, state::text, count(*) from upload_pipeline.upload_jobs group by 1, 2"
        )
    finally:
        await admin.close()
    assert {tuple(row) for row in ended} == {("document", "done", 24), ("photo", "done", 24)}
    lanes = {("photos", "photo"), ("default", "document")}
    assert {lane for seen in at_work for lane in seen} == lanes, "no pool has had a job of the other pipeline"
    assert any(seen.keys() == lanes for seen in at_work), "they worked beside each other"
    for lane in lanes:
        assert max(seen.get(lane, 0) for seen in at_work) == CAP, lane


async def photos_of(connection: asyncpg.Connection, world: World, users: Sequence[UUID], each: int) -> None:
    """Photos of each user, all in one project, their bytes in the store."""
    organization = await connection.fetchval("select upload_pipeline.add_organization('Roofs')")
    for user in users:
        await connection.execute("select upload_pipeline.set_member($1, $2, 'owner')", organization, user)
    project = await connection.fetchval("select upload_pipeline.add_project($1, 'Elm Street')", organization)
    store = open_store(world.settings.effective_storage_url)
    for number in range(each * len(users)):
        content, photo_id = jpeg(picture(900 + number, 700)), uuid4()
        key = photo_key(project, date(2031, 5, 17), photo_id, JPEG)
        await photos.reserve_photo(
            connection,
            photo_id=photo_id,
            user_id=users[number % len(users)],
            project_id=project,
            file_name=f"{number}.jpg",
            media_type=JPEG,
            file_bytes=len(content),
            raw_key=key,
            window=timedelta(minutes=15),
        )
        await store.put_bytes(key, content)


async def documents_of(
    connection: asyncpg.Connection, users: Sequence[UUID], each: int
) -> tuple[list[UUID], list[UUID]]:
    """Makes documents, so many for each user; returns their ids and owners."""
    await connection.execute(
        "insert into upload_pipeline.stages values ('caps', 'todo', 0, 0, 'caps', false), "
        "('caps', 'finished', 1, 100, 'caps', true) on conflict do nothing"
    )
    rows = await connection.fetch(
        """
        insert into upload_pipeline.documents
          (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key)
        select d.id, d.user_id, 'x', 'text/plain', 1, encode(sha256(d.id::text::bytea), 'hex'), d.id::text
          from (select gen_random_uuid() as id, user_id from unnest($1::uuid[]) user_id, generate_series(1, $2::int)) d
        returning document_id, user_id
        """,
        list(users),
        each,
    )
    return [row["document_id"] for row in rows], [row["user_id"] for row in rows]
