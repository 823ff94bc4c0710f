"""What parses by LlamaParse cost: recorded by the looks of their jobs, and later where no job looks any more.

A job that is cancelled, fails or is started again leaves a parse behind that is paid for all the same. Upkeep asks what
became of each: the pages or the credits that it tells are recorded under the parse's own id, so nothing counts twice.
Of one that is no longer kept, or of which nothing is learnt for as long as LlamaParse keeps anything, an estimate is
recorded: the pages that the document is known to have, or one.

A parse of a document that was deleted meanwhile is not known any more, and nothing is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline import ids
from upload_pipeline.database.parse_submissions import AbandonedParse, account_submission, take_abandoned
from upload_pipeline.database.usage import Usage, record_usage
from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.llamaparse import PAGE_CREDITS
from upload_pipeline.providers.llamaparse_results import PROVIDER, ParseError
from upload_workers.embedding_line import PutOff

if TYPE_CHECKING:
    from upload_pipeline.database.queue import Executor
    from upload_pipeline.prices import PriceTable
    from upload_pipeline.providers.llamaparse import LlamaParse

log = structlog.get_logger(__name__)

ASKED_FOR = timedelta(hours=48)
"""How long a parse that does not end is asked for: as long as LlamaParse keeps what it is made of."""

_AT_ONCE = 100  # parses of one round: each is a request, unless its job goes on


async def record_parse(
    db: Executor,
    prices: PriceTable,
    *,
    parse_id: str,
    job_id: UUID | None,
    tier: str,
    version: str,
    pages: int,
    told: float | None,
) -> None:
    """Records what a parse cost. Safe to repeat.

    Args:
        pages: that it brought; 0 where it failed.
        told: its credits; None where its bill was not written yet, or is not known: then those of its pages.
    """
    paid = PAGE_CREDITS.get(tier, 0) * pages if told is None else told
    used = Usage(
        ids.usage_id(PROVIDER, parse_id),
        PROVIDER,
        f"{tier}/{version}",
        "parse",
        job_id=job_id,
        requests=1,
        pages=pages,
        credits=Decimal(str(paid)),
    )
    await record_usage(db, [used], prices)


@dataclass(frozen=True, slots=True)
class ParseAccounts:
    """Those of one key's parses."""

    client: LlamaParse
    db: Executor
    prices: PriceTable

    async def settle(self) -> None:
        """One round. Safe beside others; what has no room within the limits is left to a later one."""
        try:
            for parse in await take_abandoned(self.db, provider=PROVIDER, limit=_AT_ONCE):
                await self._settle(parse)
        except PutOff as error:
            log.debug("parse_accounts_put_off", seconds=round(error.seconds))

    async def _settle(self, parse: AbandonedParse) -> None:
        pages, told = 0, None
        try:
            finished = await self.client.look(parse.parse_id)
            if finished is not None:
                pages, told = finished.page_count, finished.credits
            elif parse.age < ASKED_FOR.total_seconds():
                return
            else:
                pages = parse.page_count or 1
        except ParseError as error:
            ended = error.code is ErrorCode.PARSE_FAILED
            if not ended and parse.age < ASKED_FOR.total_seconds():
                log.warning("parse_not_accounted", parse_id=parse.parse_id, error=error.message)
                return
            told = error.credits
            if error.gone or not ended:
                pages = parse.page_count or 1
        if pages or told:
            await record_parse(
                self.db,
                self.prices,
                parse_id=parse.parse_id,
                job_id=parse.job_id,
                tier=parse.tier,
                version=parse.version,
                pages=pages,
                told=told,
            )
        await account_submission(self.db, parse.submission_id)
