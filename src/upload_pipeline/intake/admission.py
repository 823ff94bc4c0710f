"""Who may send a large request now.

The bytes that are being sent and those of the jobs at work stay under a limit that all processes share. A request asks
before it reads its body, holds its admission while it does, and gives it back whatever becomes of it. What a killed
process held runs out by itself after `ADMISSION_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

import structlog

from upload_pipeline.database import admission
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.database.queue import Executor
from upload_pipeline.errors import ErrorCode, PipelineError

log = structlog.get_logger(__name__)

ADMISSION_SECONDS = 20.0
"""How long an admission lasts unless it is renewed."""

RENEW_SECONDS = ADMISSION_SECONDS / 4
RELEASE_SECONDS = 5.0


@dataclass
class Admissions:
    """The admissions of one process; `keep` must run as long as there may be any.

    Attributes:
        db: as role `upload_worker`.
        limit: bytes.
    """

    db: Executor
    limit: int
    _held: dict[UUID, int] = field(default_factory=dict)

    @asynccontextmanager
    async def admitted(self, size: int, correlation_id: str) -> AsyncGenerator[None, None]:
        """Holds the admission of a request while entered.

        Args:
            size: bytes that it announces.
            correlation_id: of the request.

        Raises:
            PipelineError: `FILE_TOO_LARGE` where it alone is more than the limit; `CAPACITY` where there is no room for
                it now; `DATABASE_UNAVAILABLE`.
        """
        if size > self.limit:
            raise PipelineError(
                ErrorCode.FILE_TOO_LARGE,
                f"The request has {size} bytes, and at most {self.limit} are taken at once. Send smaller batches.",
                {"bytes": size, "max_bytes": self.limit},
            )
        admission_id = uuid4()
        try:
            try:
                answer = await admission.admit_bytes(
                    self.db,
                    admission_id=admission_id,
                    size=size,
                    limit=self.limit,
                    ttl=timedelta(seconds=ADMISSION_SECONDS),
                    correlation_id=correlation_id,
                )
            except DATABASE_FAILURES as error:
                raise translate(error, "admit the request") from error
            if not answer.admitted:
                raise PipelineError(
                    ErrorCode.CAPACITY,
                    f"There is no room for {size} bytes now: {answer.bytes_in_use} of {self.limit} are in use. "
                    "Send the batch again in a while.",
                    {"bytes": size, "bytes_in_use": answer.bytes_in_use, "max_bytes": self.limit},
                )
            self._held[admission_id] = size
            yield
        finally:
            self._held.pop(admission_id, None)
            # Whether the request was admitted is not known where its answer was lost, so it is released in any case.
            await asyncio.shield(asyncio.create_task(self._release(admission_id)))

    async def keep(self) -> None:
        """Renews what is held until cancelled."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            held = dict(self._held)
            if not held:
                continue
            try:
                await admission.renew_admissions(self.db, held, ttl=timedelta(seconds=ADMISSION_SECONDS))
            except DATABASE_FAILURES as error:
                log.warning("admissions_not_renewed", requests=len(held), error=str(error) or type(error).__name__)
            # One that ended while the statement was on its way has been renewed behind its release.
            for ended in held.keys() - self._held.keys():
                await self._release(ended)

    async def _release(self, admission_id: UUID) -> None:
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await admission.release_admission(self.db, admission_id)
        except DATABASE_FAILURES as error:
            log.warning("admission_left_to_expire", error=str(error) or type(error).__name__)
