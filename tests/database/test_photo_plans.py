"""What looking at photos reads, counted in blocks, with 100,000 of them, under row-level security.

A tenth of the photos are in one project, some few have failed, and the asker is a member of one organisation of many.
The bounds are what a page of rows costs, whatever the size of the tables: three or four blocks an index entry, and as
many for each row that is joined to it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sessions import Connection

from upload_pipeline.database import member_photos
from upload_pipeline.database.as_user import become_user

PHOTOS = 100_000
PAGE = 50

WHO = UUID(int=0xA)
ORGANIZATION, PROJECT = UUID(int=0xB), UUID(int=0xC)

BLOCKS_OF_A_PAGE = PAGE * 35
"""Of each photo its row, its job, its outcome, and its history in every month that there is a partition for."""
BLOCKS_OF_ONE = 120

FILL = f"""
set session_replication_role = replica;
insert into upload_pipeline.organizations (organization_id, name)
select lpad(to_hex(i), 32, '0')::uuid, 'organization ' || i from generate_series(11, 200) i;
insert into upload_pipeline.organization_members (organization_id, user_id, role)
select lpad(to_hex(i), 32, '0')::uuid, lpad(to_hex(i * 1000 + u), 32, '0')::uuid, 'member'
  from generate_series(11, 200) i, generate_series(1, 50) u;
insert into upload_pipeline.organization_members values ('{ORGANIZATION}', '{WHO}', 'member');
insert into upload_pipeline.projects (project_id, organization_id, name)
select lpad(to_hex(i + 1), 32, '0')::uuid, lpad(to_hex(i), 32, '0')::uuid, 'project' from generate_series(11, 200) i;
-- a tenth of all are the asker's; one in a thousand of those has failed
insert into upload_pipeline.photos
  (photo_id, project_id, organization_id, user_id, file_name, file_bytes, media_type, raw_key, status, uploaded_at,
   created_at)
select lpad(to_hex(i + 4096), 32, '0')::uuid, lpad(to_hex(o + 1), 32, '0')::uuid, lpad(to_hex(o), 32, '0')::uuid,
       lpad(to_hex(o * 1000 + 1), 32, '0')::uuid, 'roof.jpg', 2048, 'image/jpeg', i::text,
       case when i % 10000 = 10 then 'failed' else 'completed' end, now(),
       now() - interval '1 day' + i * interval '0.5 s'
  from (select i, case when i % 10 = 0 then 11 else 12 + i % 189 end as o from generate_series(1, {PHOTOS}) i) s;
insert into upload_pipeline.upload_jobs
  (job_id, photo_id, user_id, pipeline, stage, pool, state, finished_at)
select p.photo_id, p.photo_id, p.user_id, 'photo', case p.status when 'failed' then 'extracting' else 'completed' end,
       'default', case p.status when 'failed' then 'deadletter' else 'done' end::upload_pipeline.job_state, now()
  from upload_pipeline.photos p where p.organization_id = '{ORGANIZATION}';
insert into upload_pipeline.job_outcomes (job_id, user_id, error_code, error_message)
select p.photo_id, p.user_id, 'CORRUPT_FILE', 'broken' from upload_pipeline.photos p
 where p.status = 'failed' and p.organization_id = '{ORGANIZATION}';
insert into upload_pipeline.events (at, code, user_id, job_id, payload)
select now(), 'photo_status_changed', p.user_id, p.photo_id, jsonb_build_object('status', s)
  from upload_pipeline.photos p, unnest(array['pending_upload', 'uploaded', 'completed']) s
 where p.organization_id = '{ORGANIZATION}';
set session_replication_role = origin;
analyze upload_pipeline.photos, upload_pipeline.projects, upload_pipeline.organization_members,
  upload_pipeline.upload_jobs;
"""


class Counted:
    """Runs each query under EXPLAIN and keeps its blocks and its plan."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.blocks: list[int] = []
        self.plan = ""

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        explained = await self.connection.fetchval(
            f"explain (analyze, buffers, verbose, format json) {query}", *arguments
        )
        plan = json.loads(explained)[0]["Plan"]
        self.blocks.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
        self.plan = json.dumps(plan)
        return list(await self.connection.fetch(query, *arguments))

    async def fetchrow(self, query: str, *arguments: Any) -> Any:
        return (await self.fetch(query, *arguments))[0]

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        raise AssertionError(query)


@pytest.fixture
async def member(database: Any, admin: Connection) -> AsyncIterator[Counted]:
    """The asker's connection, within a transaction as the service has it."""
    admin.execute(FILL)
    connection = await asyncpg.connect(database.worker_url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await become_user(connection, WHO, by_index=True)
        yield Counted(connection)
        await transaction.rollback()
    finally:
        await connection.close()


async def test_a_list_costs_a_page_and_a_photo_a_photo(member: Counted, admin: Connection) -> None:
    lists: dict[str, dict[str, Any]] = {
        "by project": {"project_id": PROJECT, "status": None},
        "by status": {"project_id": PROJECT, "status": "failed"},
        "of all projects": {"project_id": None, "status": None},
        "of all projects by status": {"project_id": None, "status": "failed"},
        "of a status that none has": {"project_id": PROJECT, "status": "processing"},
    }
    figures: dict[str, int] = {}
    await member_photos.list_photos(member, project_id=None, status=None, limit=1, before=None)  # reads the catalog
    for name, wanted in lists.items():
        found = await member_photos.list_photos(member, limit=PAGE, before=None, **wanted)
        assert len(found) == {None: PAGE, "failed": 10}.get(wanted["status"], 0), name
        assert all(photo.role == "member" for photo in found)
        figures[name] = member.blocks[-1]
        assert ("photos_listing" if wanted["status"] is None else "photos_status") in member.plan, name
        if name == "by project":
            behind = (found[-1].created_at, found[-1].photo_id)
            deep = await member_photos.list_photos(member, limit=PAGE, before=behind, **wanted)
            assert deep[0].created_at < found[-1].created_at
            figures["next page"] = member.blocks[-1]
    assert max(figures.values()) < BLOCKS_OF_A_PAGE, figures
    # ten photos cost a fifth of fifty, and none next to nothing
    assert figures["by status"] < BLOCKS_OF_A_PAGE / 4, figures
    assert figures["of a status that none has"] < BLOCKS_OF_ONE, figures

    for number in (10, PHOTOS - 10):
        photo = await member_photos.find_photo(member, UUID(int=number + 4096))
        assert photo is not None
        assert member.blocks[-1] < BLOCKS_OF_ONE, member.blocks[-1]

    # nor does it hang on statistics, or on which parameters a plan was made for
    admin.execute(
        """
        delete from pg_catalog.pg_statistic
         where starelid::regclass::text in
           ('upload_pipeline.photos', 'upload_pipeline.projects', 'upload_pipeline.upload_jobs')
        """
    )
    await member.connection.execute("set local plan_cache_mode = force_generic_plan")
    for status in (None, "failed"):
        await member_photos.list_photos(member, project_id=PROJECT, status=status, limit=PAGE, before=None)
        assert member.blocks[-1] < BLOCKS_OF_A_PAGE, (status, member.blocks[-1])
