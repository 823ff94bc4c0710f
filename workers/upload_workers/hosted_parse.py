"""A document's parse by LlamaParse: submitted once, whatever dies meanwhile, and looked at until it has ended.

Nothing is paid twice. A job costs when it is made, by a call that has no key to make a second one harmless. So:

1. A submission is a row, with an id of its own, that is written before anything is asked. The job carries the id, and
   can be found by it among all jobs of the account.
2. A call that makes a job is announced in that row first, under the lease, with the moment by which it is over. The
   caller gives it up at that moment by its own clock, which began to run before the announcement was sent: so the
   call is over when the row says so, also where the caller has lost its lease and does not know.
3. An announcement is refused until the call before it is over, and the time of one more call has passed, in which the
   provider may finish what it was asked (`settle`). Before an announcement that is not the first, the caller looks for
   the job, and looks after all that: `begin_submission` told it before the look that nothing is under way any more.
   Whoever announced since then held the lease in between, and then the announcement is fenced off.

So when a call goes out, every call before it is over, its job would be listed, and none is. A worker that dies with
the job's id in its hands leaves an announced call, and the next one finds the job. What remains open is a process that
is stopped between its last look at the clock and the system call that sends, for longer than a call and the time to
settle, and a provider that takes longer than that to list a job whose maker it gave no answer: LlamaParse does not
charge again for the same bytes and options within 48 h, so neither costs twice either.

A submission that has finished is not made again, at whatever stage its job is started anew: its result is in the
store. One whose job may exist unseen is looked for, whatever tier is set by then. One that failed brought nothing, and
the next try is a new one; so is one that has been at work for longer than the limit, when its job is started again
before `parsing`.

Limits on requests put a job off as often as it takes, with no retry counted: many documents at once may need hours of
them. `LLAMAPARSE_WAIT_TIMEOUT` bounds that, from the submission's beginning or the provider's last pause on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.database.parse_submissions import (
    BegunSubmission,
    StoredSubmission,
    announce_submission,
    begin_submission,
    end_submission_call,
    fail_submission,
    finish_submission,
    load_wait,
)
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import DOCX, HTML, MARKDOWN, PDF, PLAIN
from upload_pipeline.providers.llamaparse import open_llamaparse
from upload_pipeline.providers.llamaparse_results import PROVIDER, FinishedParse, ParseError, Remedy
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.storage.keys import hosted_output_key, uploader_of
from upload_workers.embedding_line import PutOff
from upload_workers.parse_accounts import ParseAccounts, record_parse
from upload_workers.parse_turns import NoRoom, ParseTurns, put_off
from upload_workers.stages.source import local_copy, store_text

if TYPE_CHECKING:
    from upload_pipeline.database.documents import Document
    from upload_pipeline.database.queue import ClaimedJob, Executor
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.providers.llamaparse import LlamaParse
    from upload_pipeline.settings import Settings
    from upload_workers.steps import StepContext

log = structlog.get_logger(__name__)

PARSED_HERE = frozenset({PLAIN, MARKDOWN})
"""What needs no parser: it is text already."""

_ENDINGS = {PDF: (".pdf",), DOCX: (".docx",), HTML: (".html", ".htm", ".xhtml")}

CLOCKS_APART = timedelta(minutes=5)
"""By how much the provider's clock and the database's may differ."""


@dataclass(frozen=True, slots=True)
class HostedParser:
    """LlamaParse as a worker uses it; one for each process.

    Attributes:
        turns: what each request of the client waits for.
        accounts: of parses that no job looks at any more.
        takes_new: whether documents are submitted; else only what was submitted before is followed.
    """

    client: LlamaParse
    turns: ParseTurns
    accounts: ParseAccounts
    calls: ProviderCalls
    takes_new: bool

    def takes(self, document: Document) -> bool:
        """Whether a document is to be submitted."""
        return self.takes_new and document.media_type not in PARSED_HERE

    async def submit(self, job: ClaimedJob, document: Document, context: StepContext) -> tuple[UUID, str]:
        """The document's submission and the provider's id of it: made now, or found.

        Raises:
            PutOff: not now.
            ParseError: `PARSE_UNAVAILABLE`, where a later call finds what this one made; `PARSE_REJECTED`.
            PipelineError: `PARSE_TIMEOUT`, where there has been no room for it for too long.
        """
        while True:
            begun = await begin_submission(
                context.db,
                job.lease,
                provider=PROVIDER,
                tier=self.client.tier,
                version=self.client.tier_version,
                settle=self._settle,
            )
            async with self._patience(begun.submission_id, context):
                parse_id = begun.parse_id or await self._find(begun)
                if parse_id is None:
                    if (begun.tier, begun.version) == (self.client.tier, self.client.tier_version):
                        return begun.submission_id, await self._make(job, document, begun, context)
                elif not await self._is_lost(begun, parse_id, context):
                    return begun.submission_id, parse_id
            await fail_submission(context.db, job.lease, begun.submission_id)

    async def look(self, job: ClaimedJob, submission: StoredSubmission, context: StepContext) -> FinishedParse | None:
        """What the provider has of a submission; None while it is at work. What it cost is recorded.

        Raises:
            PutOff: not now.
            ParseError: as `LlamaParse.look`; after `PARSE_FAILED` the submission has failed.
            PipelineError: `PARSE_TIMEOUT`, where its time is over and there has been no room for a look for too long.
        """
        try:
            if submission.age < context.settings.llamaparse_parse_timeout:
                finished = await self.client.look(submission.parse_id)
            else:
                async with self._patience(submission.submission_id, context):
                    finished = await self.client.look(submission.parse_id)
        except ParseError as error:
            if error.code is ErrorCode.PARSE_FAILED:
                if error.credits:
                    await self._record(job, submission, 0, error.credits, context)
                await fail_submission(context.db, job.lease, submission.submission_id)
            raise
        if finished is not None:
            self.calls.worked(PROVIDER, "parse", "pages", finished.page_count)
            await self._record(job, submission, finished.page_count, finished.credits, context)
        return finished

    async def keep(
        self,
        job: ClaimedJob,
        document: Document,
        submission: StoredSubmission,
        finished: FinishedParse,
        context: StepContext,
    ) -> None:
        """Stores what a submission brought, so that it is never asked for again; one without a good page has failed."""
        if len(finished.failed_pages) == finished.page_count:
            await fail_submission(context.db, job.lease, submission.submission_id)
            return
        key = hosted_output_key(uploader_of(document.raw_key), document.document_id, submission.parse_id)
        await store_text(document, key, finished.markdown.encode("utf-8", "replace"), context)
        await finish_submission(
            context.db,
            job.lease,
            submission.submission_id,
            page_count=finished.page_count,
            failed_pages=finished.failed_pages,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self.turns.close()
        await self.client.close()

    @property
    def _settle(self) -> timedelta:
        """How long after a call its job may be not listed yet: as long as a call may take."""
        return timedelta(seconds=self.client.timeout)

    @asynccontextmanager
    async def _patience(self, submission_id: UUID, context: StepContext) -> AsyncIterator[None]:
        """Bounds how long a document is put off for want of room."""
        try:
            yield
        except NoRoom as error:
            waited = (await load_wait(context.db, submission_id)).seconds
            limit = context.settings.llamaparse_wait_timeout
            if waited < limit:
                raise
            raise PipelineError(
                ErrorCode.PARSE_TIMEOUT,
                f"The limits on requests to LlamaParse have kept the document waiting for {waited:.0f} s; the limit "
                f"UPLOAD_PIPELINE_LLAMAPARSE_WAIT_TIMEOUT is {limit:g} s. Look at the plan of the account and at "
                "UPLOAD_PIPELINE_LLAMAPARSE_REQUESTS_PER_MINUTE, and retry the job, which may then wait as long again.",
                {"seconds": round(waited)},
            ) from error

    async def _is_lost(self, begun: BegunSubmission, parse_id: str, context: StepContext) -> bool:
        """Whether a job that has been at work for too long is given up for a new one."""
        if begun.age is None or begun.age < context.settings.llamaparse_parse_timeout:
            return False
        try:
            lost = await self.client.look(parse_id) is None
        except ParseError as error:
            if error.code is not ErrorCode.PARSE_FAILED:
                raise
            lost = True
        if lost:
            log.warning("parse_given_up", parse_id=parse_id, seconds=round(begun.age))
        return lost

    async def _find(self, begun: BegunSubmission) -> str | None:
        """The job that an earlier call made, or None once it is sure that there is none."""
        if begun.called_at is None or begun.called_until is None:
            return None
        found = await self.client.find_submission(
            str(begun.submission_id),
            since=begun.called_at - CLOCKS_APART,
            before=begun.called_until + self._settle + CLOCKS_APART,
        )
        if found is None and begun.wait > 0:
            raise put_off(begun.wait)
        return found

    async def _make(self, job: ClaimedJob, document: Document, begun: BegunSubmission, context: StepContext) -> str:
        file_id = await self._uploaded(document, context)
        announced = False

        async def announce(seconds: float) -> None:
            nonlocal announced
            announced = await announce_submission(
                context.db, job.lease, begun.submission_id, seconds=timedelta(seconds=seconds), settle=self._settle
            )
            if not announced:
                raise put_off(self.client.timeout)

        try:
            return await self.client.submit(
                file_id, document=str(document.document_id), submission=str(begun.submission_id), announce=announce
            )
        except (PutOff, ParseError) as error:
            if announced:
                made_nothing = isinstance(error, PutOff) or error.remedy is Remedy.NEVER
                await end_submission_call(context.db, job.lease, begun.submission_id, made_nothing=made_nothing)
            raise

    async def _uploaded(self, document: Document, context: StepContext) -> str:
        """The provider's id of the document's bytes; the same bytes of the same user are one file there."""
        external_id = str(document.document_id)
        found = await self.client.find_file(external_id)
        if found is not None:
            return found
        async with local_copy(document, context) as path:
            return await self.client.upload(
                path, name=_named(document), media_type=document.media_type, external_id=external_id
            )

    async def _record(
        self, job: ClaimedJob, submission: StoredSubmission, pages: int, told: float | None, context: StepContext
    ) -> None:
        await record_parse(
            context.db,
            context.settings.prices,
            parse_id=submission.parse_id,
            job_id=job.job_id,
            tier=submission.tier,
            version=submission.version,
            pages=pages,
            told=told,
        )


def _named(document: Document) -> str:
    """The file's name with an ending that tells its type, which is what LlamaParse goes by."""
    endings = _ENDINGS[document.media_type]
    return document.filename if document.filename.lower().endswith(endings) else document.filename + endings[0]


def open_hosted_parser(db: Executor, calls: ProviderCalls, settings: Settings) -> HostedParser | None:
    """The hosted parser of a worker, as its settings say; None where they name none.

    Raises:
        PipelineError: `SETTING_INVALID`.
    """
    client = open_llamaparse(settings)
    if client is None:
        return None
    turns = ParseTurns(db, calls, key_id_of(client.api_key), settings.llamaparse_requests_per_minute or None)
    client.turn = turns
    accounts = ParseAccounts(client, db, settings.prices)
    return HostedParser(client, turns, accounts, calls, takes_new=settings.parser == PROVIDER)
