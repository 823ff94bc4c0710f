"""What uploads have left in a service: its store, its scratch folder, its tables."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from tests.api.live_service import LiveService


@dataclass(frozen=True)
class Traces:
    """Looks at a service from behind."""

    service: LiveService
    admin: asyncpg.Connection

    async def keys(self) -> set[str]:
        """The objects in the store."""
        return {info.key async for info in self.service.resources.store.list()}

    async def files(self) -> list[str]:
        """All files of the home, unfinished ones and local copies too, but for its secrets."""
        home = self.service.settings.home
        return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and "secret" not in path.name]

    async def rows(self) -> int:
        """Documents and jobs."""
        count: int = await self.admin.fetchval(
            "select (select count(*) from upload_pipeline.documents)"
            " + (select count(*) from upload_pipeline.upload_jobs)"
        )
        return count

    async def document(self, user: UUID | None = None) -> asyncpg.Record:
        """The only document (of a user) with its only job."""
        (row,) = await self.admin.fetch(
            "select d.*, j.job_id, j.stage, j.state, j.correlation_id "
            "from upload_pipeline.documents d left join upload_pipeline.upload_jobs j using (document_id) "
            "where d.user_id = coalesce($1, d.user_id)",
            user,
        )
        return row

    async def nothing(self) -> bool:
        """Whether nothing is left; what a request that broke off leaves goes in a moment."""
        left: Any = None
        for _ in range(100):
            left = (await self.files(), await self.rows())
            if left == ([], 0):
                return True
            await asyncio.sleep(0.05)
        print(left)
        return False

    async def uploads_counted(self) -> dict[tuple[str, str], float]:
        """The metric of uploads, by mode and outcome."""
        text = (await self.service.client().get("/metrics")).text
        found = {}
        for line in text.splitlines():
            if line.startswith("upload_pipeline_uploads_total{"):
                labels, value = line.partition("{")[2].split("} ")
                named = dict(label.replace('"', "").split("=") for label in labels.split(","))
                found[named["mode"], named["outcome"]] = float(value)
        return found
