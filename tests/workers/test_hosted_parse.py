"""Documents that LlamaParse parses, step by step: paid for once, put off and failed as its answers ask for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from upload_pipeline.database import documents, parse_submissions, provider_budget, queue
from upload_pipeline.database.connection import connection_options
from upload_pipeline.database.pools import open_pool
from upload_pipeline.database.queue import Advance, ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.ids import document_id as document_id_of
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.llamaparse import LlamaParse
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.settings import Settings, load_settings
from upload_pipeline.stages import DOCUMENT_STAGES, Stage
from upload_pipeline.storage.keys import parser_output_key, raw_key
from upload_pipeline.storage.store import ObjectStore, open_store
from upload_workers.hosted_parse import HostedParser, open_hosted_parser
from upload_workers.models_in_use import ModelsInUse
from upload_workers.parse_turns import BUDGET
from upload_workers.pipelines import STEPS
from upload_workers.steps import Commit, Snooze, StepContext

TTL = timedelta(seconds=60)
USER = UUID("6f3c1d0e-5b1f-4e57-9d6e-0a6a5f3c2b11")
PATH = [row.stage for row in DOCUMENT_STAGES]
PDF, TEXT = "application/pdf", "text/plain"
PAGES = b"%PDF-1.7\n" + b"<< /Type /Page >>\n" * 4
TIMEOUT = 5.0
"""Seconds of a request; also the time to settle."""


@dataclass
class Line:
    """A document's job, each of its steps run by hand."""

    context: StepContext
    admin: asyncpg.Connection
    simulator: LlamaCloudSimulator
    document: UUID
    job: ClaimedJob

    async def step(self, context: StepContext | None = None) -> timedelta | None:
        """One step, and its outcome written as the runner does; the delay where it is a snooze."""
        context = context or self.context
        outcome = await STEPS[self.job.pipeline, self.job.stage](self.job, context)
        if isinstance(outcome, Snooze):
            await queue.snooze_job(context.db, self.job.lease, delay=outcome.delay)
            return outcome.delay
        if isinstance(outcome, Commit):
            moved = await outcome.verb(context.db, self.job.lease, keep=True, ttl=TTL)
        else:
            asked = Advance(self.job.lease, self.job.stage, PATH[PATH.index(Stage(self.job.stage)) + 1], True)
            moved = (await queue.advance_jobs(context.db, [asked], ttl=TTL))[self.job.job_id]
        self.job = replace(self.job, stage=moved.stage)
        return None

    async def fails(self) -> PipelineError:
        """A step whose error is written as the runner does."""
        with pytest.raises(PipelineError) as caught:
            await self.step()
        error = caught.value
        await queue.fail_job(
            self.context.db,
            self.job.lease,
            code=error.code,
            message=error.message,
            retryable=error.retryable,
            details=error.details,
        )
        return error

    async def claim(self) -> None:
        """The job, whatever it waits for."""
        await self.admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
        await queue.promote_due(self.context.db)
        (self.job,) = await queue.claim_jobs(
            self.context.db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL
        )

    async def take_over(self) -> ClaimedJob:
        """Its worker's lease ran out, and another has it; the lost one comes back."""
        lost = self.job
        await self.admin.execute("update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s'")
        assert await queue.reap_expired(self.context.db) == 1
        await self.claim()
        return lost

    async def restart(self, stage: str | None = None) -> None:
        """Somebody starts the job again."""
        await queue.retry_job(self.context.db, self.job.job_id, from_stage=stage)
        await self.claim()

    async def submitted(self) -> None:
        """On to `parsing`, and behind the wait for the first look."""
        assert await self.step() is None
        assert self.job.stage == "parsing"
        await self.pass_time(10)

    async def parsed(self) -> None:
        """On to `parsed`."""
        await self.submitted()
        assert await self.step() is None
        assert self.job.stage == "parsed"

    async def pass_time(self, seconds: float) -> None:
        """What was submitted and called is so much older."""
        await self.admin.execute(
            """
            update upload_pipeline.parse_submissions
               set submitted_at = submitted_at - $1::interval, called_at = called_at - $1::interval,
                   called_until = called_until - $1::interval
            """,
            timedelta(seconds=seconds),
        )

    def use(self, **settings: object) -> None:
        """Works on with these settings."""
        changed = self.context.settings.model_copy(update=settings)
        hosted = open_hosted_parser(self.context.db, ProviderCalls(), changed)
        self.context = replace(self.context, settings=changed, hosted_parser=hosted)

    async def row(self) -> asyncpg.Record:
        return await self.admin.fetchrow(
            "select * from upload_pipeline.documents where document_id = $1", self.document
        )

    async def submissions(self) -> list[asyncpg.Record]:
        return await self.admin.fetch("select * from upload_pipeline.parse_submissions order by begun_at")

    async def retries(self) -> int:
        count: int = await self.admin.fetchval("select retry_count from upload_pipeline.upload_jobs")
        return count

    @property
    def requests(self) -> dict[str, int]:
        return dict(self.simulator.books.requests)

    @property
    def paid(self) -> int:
        """How often the document was paid for."""
        return self.simulator.books.paid[str(self.document)]


OpenLine = Callable[..., Awaitable[Line]]


@pytest.fixture
async def simulator() -> AsyncIterator[LlamaCloudSimulator]:
    async with LlamaCloudSimulator() as simulator:
        yield simulator


@pytest.fixture(scope="module")
def parser() -> Any:
    parser = LocalParser(60.0, 1024**3)
    yield parser
    parser.close()


@pytest.fixture
async def open_line(
    database: Any, admin: asyncpg.Connection, tmp_path: Path, parser: LocalParser, simulator: LlamaCloudSimulator
) -> AsyncIterator[OpenLine]:
    """Puts a document in the store, and its job at `job_validated`."""
    settings = load_settings(
        home=tmp_path,
        database_url=database.worker_url,
        parser="llamaparse",
        llamaparse_api_key=KEY,
        llamaparse_base_url=simulator.url,
        llamaparse_timeout=TIMEOUT,
        llamaparse_requests_per_minute=1000,
        prices={"llamaparse/cost_effective/2026-09-28": {"credits": 1.25}},
    )
    pool = await open_pool(database.worker_url, connection_options(settings), size=3)
    opened: list[HostedParser] = []

    async def begin(content: bytes = PAGES, media_type: str = PDF, user: UUID = USER, **changed: object) -> Line:
        context = await _context(pool, settings.model_copy(update=changed), parser)
        if context.hosted_parser is not None:
            opened.append(context.hosted_parser)
        document = await _accept(pool, context.store, content, media_type, user)
        (job,) = await queue.claim_jobs(pool, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL)
        asked = Advance(job.lease, "queued", "job_validated", True)
        await queue.advance_jobs(pool, [asked], ttl=TTL)
        return Line(context, admin, simulator, document, replace(job, stage="job_validated"))

    yield begin
    for hosted in opened:
        await hosted.close()
    await pool.close()


async def _context(pool: Any, settings: Settings, parser: LocalParser) -> StepContext:
    scratch = settings.home / "scratch"
    scratch.mkdir(exist_ok=True)
    return StepContext(
        pool,
        open_store(settings.effective_storage_url),
        parser,
        ModelsInUse(pool, ProviderCalls(), settings),
        settings,
        scratch,
        hosted_parser=open_hosted_parser(pool, ProviderCalls(), settings),
    )


async def _accept(pool: Any, store: ObjectStore, content: bytes, media_type: str, user: UUID) -> UUID:
    digest = sha256(content).hexdigest()
    document = document_id_of(user, digest)
    key = raw_key(user, document)
    await store.put_bytes(key, content)
    await documents.accept_document(
        pool,
        document_id=document,
        user_id=user,
        filename="claim",
        media_type=media_type,
        file_bytes=len(content),
        file_sha256=digest,
        raw_key=key,
        metadata={},
    )
    return document


class Crash(BaseException):
    """The process ends here."""


class CrashingDatabase:
    """A database at which the process dies, before the statement that a word names."""

    def __init__(self, db: Any, word: str) -> None:
        self._db, self._word = db, word

    def __getattr__(self, name: str) -> Any:
        async def run(query: str, *args: Any) -> Any:
            if self._word in query:
                raise Crash
            return await getattr(self._db, name)(query, *args)

        return run


# the way of a document


async def test_a_document_is_uploaded_submitted_and_looked_at_once_and_stored_with_what_it_cost(
    open_line: OpenLine,
) -> None:
    line = await open_line()
    await line.step()
    row = await line.row()
    assert line.job.stage == "parsing"
    assert (row["parse_provider"], row["parse_tier"], row["parse_version"]) == (
        "llamaparse",
        "cost_effective",
        "2026-09-28",
    )
    assert row["parse_id"].startswith("pjb-")
    assert row["parse_submitted_at"] is not None

    # too early for a look: no request
    delay = await line.step()
    assert delay is not None
    assert 4 < delay.total_seconds() <= 5
    await line.claim()
    await line.pass_time(10)
    await line.step()
    await line.step()
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "poll": 1}
    row = await line.row()
    assert (row["parser"], row["page_count"], row["warnings"]) == ("llamaparse@cost_effective/2026-09-28", 4, [])
    text = await line.context.store.get_text(row["markdown_key"], 10**6)
    assert "# Page 4" in text
    assert len(row["page_starts"]) == 4
    assert await line.context.store.head(parser_output_key(USER, line.document)) is None

    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["provider"], used["model"], used["operation"]) == ("llamaparse", "cost_effective/2026-09-28", "parse")
    assert (used["pages"], used["credits"], used["cost_micros"], used["job_id"]) == (4, 12, 15_000, line.job.job_id)
    (sent,) = line.simulator._files.values()
    assert (sent.name, sent.external_file_id) == ("claim.pdf", str(line.document))
    assert list(line.context.scratch.iterdir()) == []


async def test_a_job_that_ends_before_its_bill_is_written_costs_what_its_pages_cost(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.billed = False
    await line.parsed()
    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["pages"], used["credits"], used["cost_micros"]) == (4, 12, 15_000)


@pytest.mark.parametrize("media_type", [TEXT, "text/markdown"])
async def test_text_is_parsed_here_and_costs_nothing(open_line: OpenLine, media_type: str) -> None:
    line = await open_line(b"# One\n\nand a sentence of it\n", media_type)
    while line.job.stage != "parse_validated":
        await line.step()
    assert line.requests == {}
    assert (await line.row())["parse_id"] is None
    assert (await line.row())["parser"].startswith("local@")


async def test_waits_between_looks_grow_to_a_minute_and_end_at_the_limit(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_parse_timeout=300.0)
    line.simulator.running = 3600
    await line.submitted()
    seen = []
    for seconds in (0, 90, 155, 38):
        await line.pass_time(seconds)
        delay = await line.step()
        assert delay is not None
        seen.append(round(delay.total_seconds()))
        await line.claim()
    # at 10, 100, 255 and 293 s
    assert seen == [5, 50, 45, 7]
    assert await line.retries() == 0


# nothing is paid twice


async def test_a_worker_that_dies_with_the_jobs_id_in_its_hands_leaves_it_to_be_found(open_line: OpenLine) -> None:
    line = await open_line()
    with pytest.raises(Crash):
        await line.step(replace(line.context, db=CrashingDatabase(line.context.db, "commit_submission")))
    assert line.paid == 1
    lost = await line.take_over()
    await line.parsed()
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "list": 1, "poll": 1}
    assert line.paid == 1
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await parse_submissions.commit_submission(
            line.context.db,
            lost.lease,
            submission_id=uuid4(),
            parse_id="pjb-other",
            keep=True,
            ttl=TTL,
        )
    assert fenced.value.sqlstate == queue.LEASE_LOST


@pytest.mark.parametrize("word", ["finish_submission", "commit_parse"])
async def test_a_worker_that_dies_with_the_result_in_its_hands_leaves_it_to_be_fetched_and_counted_once(
    open_line: OpenLine, word: str
) -> None:
    line = await open_line()
    await line.submitted()
    with pytest.raises(Crash):
        await line.step(replace(line.context, db=CrashingDatabase(line.context.db, word)))
    lost = await line.take_over()
    await line.step()
    assert line.job.stage == "parsed"
    assert line.requests["poll"] == (2 if word == "finish_submission" else 1)
    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["pages"], line.paid) == (4, 1)
    # and the one that died, if it only slept, can write nothing
    held, line.job = line.job, replace(lost, stage="parsing")
    with pytest.raises(asyncpg.PostgresError) as fenced:
        await line.step()
    assert fenced.value.sqlstate == queue.LEASE_LOST
    line.job = held
    await line.step()
    assert line.job.stage == "parse_validated"


@pytest.mark.parametrize("fault", ["dropped", "truncated"])
async def test_an_answer_that_is_lost_is_found_by_the_next_try(open_line: OpenLine, fault: str) -> None:
    line = await open_line()
    line.simulator.misbehave(fault, operation="submit")
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_UNAVAILABLE, True)
    await line.claim()
    await line.parsed()
    assert (line.requests["submit"], line.paid) == (1, 1)


async def test_a_call_that_may_have_made_a_job_is_not_repeated_before_it_would_be_listed(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation="submit")
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    await line.claim()
    delay = await line.step()
    assert delay is not None
    assert TIMEOUT - 2 < delay.total_seconds() < TIMEOUT * 1.2
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "list": 1}
    await line.claim()
    await line.pass_time(TIMEOUT)
    await line.parsed()
    assert (line.requests["submit"], line.requests["list"], line.paid) == (2, 2, 1)


async def test_nobody_submits_while_a_worker_that_lost_its_lease_may_be_about_to(open_line: OpenLine) -> None:
    """The first has announced its call and is slow; what it sends in the end is within the time that it announced."""
    line = await open_line()
    hosted = line.context.hosted_parser
    assert hosted is not None
    slow = line.job
    file_id = await hosted.client.upload(_file(line), name="claim.pdf", media_type=PDF, external_id=str(line.document))
    db, client = line.context.db, hosted.client
    settle = timedelta(seconds=TIMEOUT)
    begun = await parse_submissions.begin_submission(
        db, slow.lease, provider=PROVIDER, tier=client.tier, version=client.tier_version, settle=settle
    )
    assert await parse_submissions.announce_submission(
        db, slow.lease, begun.submission_id, seconds=timedelta(seconds=TIMEOUT), settle=settle
    )
    await line.take_over()
    delay = await line.step()
    assert delay is not None
    assert delay.total_seconds() > TIMEOUT
    assert "submit" not in line.requests

    # the slow one's call gets through; its lease does not
    made = await client.submit(file_id, document=str(line.document), submission=str(begun.submission_id))
    for write in (
        parse_submissions.commit_submission(
            db, slow.lease, submission_id=begun.submission_id, parse_id=made, keep=True, ttl=TTL
        ),
        parse_submissions.end_submission_call(db, slow.lease, begun.submission_id, made_nothing=True),
        parse_submissions.announce_submission(db, slow.lease, begun.submission_id, seconds=settle, settle=settle),
        parse_submissions.fail_submission(db, slow.lease, begun.submission_id),
    ):
        with pytest.raises(asyncpg.PostgresError) as fenced:
            await write
        assert fenced.value.sqlstate == queue.LEASE_LOST
    await line.claim()
    await line.parsed()
    assert (await line.row())["parse_id"] == made
    assert (line.requests["submit"], line.paid) == (1, 1)


async def test_a_second_call_is_announced_only_when_the_first_is_over(open_line: OpenLine) -> None:
    line = await open_line()
    db, second = line.context.db, timedelta(seconds=1)
    begun = await parse_submissions.begin_submission(
        db, line.job.lease, provider="p", tier="t", version="v", settle=second
    )
    assert (begun.called_at, begun.wait, begun.parse_id, begun.age) == (None, 0, None, None)

    async def announce() -> bool:
        return await parse_submissions.announce_submission(
            db, line.job.lease, begun.submission_id, seconds=second, settle=second
        )

    assert await announce()
    assert not await announce()
    await line.pass_time(1.5)  # over, and not settled
    assert not await announce()
    await line.pass_time(1)
    assert await announce()
    again = await parse_submissions.begin_submission(
        db, line.job.lease, provider="p", tier="t", version="v", settle=second
    )
    assert again.called_at is not None
    assert 1 < again.wait <= 2
    assert again.submission_id == begun.submission_id


def _file(line: Line) -> Path:
    path = line.context.settings.home / "claim.pdf"
    path.write_bytes(PAGES)
    return path


# started again


async def test_a_parse_that_has_finished_is_never_asked_for_again(open_line: OpenLine) -> None:
    line = await open_line()
    await line.parsed()
    first, output = await line.row(), line.requests
    # nothing is kept there any more, and it would fail if it were asked
    line.simulator._jobs.clear()
    line.simulator._files.clear()
    for stage in ("queued", "job_validated", "parsing", "parsed"):
        await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
        await line.restart(stage)
        if stage == "queued":
            assert (await line.row())["parse_id"] is None
            await queue.advance_jobs(
                line.context.db, [Advance(line.job.lease, "queued", "job_validated", True)], ttl=TTL
            )
            line.job = replace(line.job, stage="job_validated")
        while line.job.stage != "parse_validated":
            assert await line.step() is None
        row = await line.row()
        assert (row["parse_id"], row["page_count"]) == (first["parse_id"], 4)
    assert line.requests == output
    assert await line.admin.fetchval("select count(*) from upload_pipeline.usage_records") == 1


async def test_another_tier_is_paid_for_once_and_the_first_is_still_there(open_line: OpenLine) -> None:
    line = await open_line()
    await line.parsed()
    first = (await line.row())["parse_id"]
    parsers = []
    for tier, version in (("agentic", "2026-10-16"), ("cost_effective", "2026-09-28"), ("agentic", "2026-10-16")):
        line.use(llamaparse_tier=tier, llamaparse_version=version)
        await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
        await line.restart("job_validated")
        await line.parsed()
        parsers.append((await line.row())["parser"])
        assert line.context.hosted_parser is not None
        await line.context.hosted_parser.close()
    assert parsers == ["llamaparse@agentic/2026-10-16", "llamaparse@cost_effective/2026-09-28", parsers[0]]
    assert (line.paid, line.requests["submit"], line.requests["poll"]) == (2, 2, 2)
    # of the first, nothing is asked, and its output stands where it stood
    assert first in {row["parse_id"] for row in await line.submissions()}


async def test_a_job_that_may_exist_unseen_is_looked_for_under_another_setting_too(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("dropped", operation="submit")
    await line.fails()
    line.use(llamaparse_tier="agentic")
    await line.claim()
    await line.parsed()
    assert (await line.row())["parse_tier"] == "cost_effective"
    assert (line.requests["submit"], line.paid) == (1, 1)
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


async def test_where_it_does_not_exist_the_new_setting_holds(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation="submit")
    await line.fails()
    line.use(llamaparse_tier="agentic")
    await line.claim()
    await line.pass_time(2 * TIMEOUT)
    await line.parsed()
    assert (await line.row())["parse_tier"] == "agentic"
    assert line.paid == 1
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


async def test_a_job_in_flight_goes_on_when_the_parser_is_another_by_then(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    line.use(parser="local")
    await line.step()
    assert line.job.stage == "parsed"
    assert (await line.row())["parser"].startswith("llamaparse@")
    # started again from the start, it is parsed here
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart("job_validated")
    await line.step()
    assert (await line.row())["parse_id"] is None
    assert line.paid == 1
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


async def test_without_a_key_a_job_in_flight_says_what_is_missing(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    line.context = replace(line.context, hosted_parser=None)
    error = await line.fails()
    assert error.code is ErrorCode.SETTING_INVALID
    assert "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY" in error.message


# what the provider answers


async def test_a_limit_puts_the_job_off_as_long_as_it_says_and_freezes_the_others(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.retry_after = 40
    line.simulator.misbehave("rate_limited", operation="submit")
    delay = await line.step()
    assert delay is not None
    assert 40 <= delay.total_seconds() <= 44
    asked = line.requests
    other = await open_line(user=uuid4())
    delay = await other.step()
    assert delay is not None
    assert 30 < delay.total_seconds() <= 44
    assert line.requests == asked
    assert await line.admin.fetchval("select max(retry_count) from upload_pipeline.upload_jobs") == 0
    # the refused call made nothing: no look is needed
    await line.admin.execute("update upload_pipeline.provider_budgets set frozen_until = null")
    hosted = line.context.hosted_parser
    assert hosted is not None
    await line.admin.execute("delete from upload_pipeline.upload_jobs where user_id <> $1", USER)
    await line.claim()
    await line.parsed()
    assert (line.requests.get("list", 0), line.paid) == (0, 1)


@pytest.mark.parametrize(
    ("operation", "fault", "code"),
    [
        ("find", "unauthorised", "PARSE_DENIED"),
        ("upload", "quota", "PARSE_QUOTA"),
        ("submit", "quota", "PARSE_QUOTA"),
        ("poll", "unauthorised", "PARSE_DENIED"),
    ],
)
async def test_an_empty_account_pauses_everybody_with_one_alarm_and_goes_on_later(
    open_line: OpenLine, operation: str, fault: str, code: str
) -> None:
    line = await open_line()
    line.simulator.misbehave(fault, operation=operation)
    if operation == "poll":
        await line.submitted()
    delay = await line.step()
    assert delay is not None
    assert 600 <= delay.total_seconds() <= 660
    asked = line.requests
    await line.claim()
    delay = await line.step()
    assert delay is not None
    assert delay.total_seconds() > 500
    assert line.requests == asked
    alarms = await line.admin.fetch("select * from upload_pipeline.events where code = 'provider_paused'")
    assert [(json.loads(alarm["payload"])["code"], alarm["severity"]) for alarm in alarms] == [(code, "error")]
    assert KEY not in alarms[0]["payload"]
    assert await line.retries() == 0

    await line.admin.execute("update upload_pipeline.provider_budgets set frozen_until = null")
    await line.claim()
    if operation != "poll":
        await line.submitted()
    await line.step()
    assert line.job.stage == "parsed"
    assert line.paid == 1


async def test_a_file_that_is_refused_fails_at_once_and_may_be_sent_again(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.misbehave("rejected", operation="submit")
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_REJECTED, False)
    await line.restart()
    await line.parsed()
    assert (line.requests.get("list", 0), line.paid) == (0, 1)


@pytest.mark.parametrize("operation", ["find", "upload"])
async def test_a_server_in_trouble_before_the_submission_is_tried_again(open_line: OpenLine, operation: str) -> None:
    line = await open_line()
    line.simulator.misbehave("server_error", operation=operation)
    assert (await line.fails()).code is ErrorCode.PARSE_UNAVAILABLE
    assert await line.retries() == 1
    await line.claim()
    await line.parsed()
    assert line.paid == 1


@pytest.mark.parametrize("fault", ["server_error", "dropped"])
async def test_a_look_that_fails_costs_no_retry(open_line: OpenLine, fault: str) -> None:
    line = await open_line()
    await line.submitted()
    line.simulator.misbehave(fault, operation="poll")
    assert await line.step() is not None
    await line.claim()
    assert await line.retries() == 0
    assert await line.step() is None
    assert line.job.stage == "parsed"


async def test_failed_pages_are_named_in_the_documents_warnings(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.end_next(failed_pages=(2, 3))
    await line.parsed()
    row = await line.row()
    assert (row["warnings"], row["page_count"]) == (["LlamaParse could not read pages 2 to 3 of 4."], 4)


async def test_failed_pages_fail_the_document_where_that_is_asked_for_and_a_change_of_mind_is_free(
    open_line: OpenLine,
) -> None:
    line = await open_line(llamaparse_failed_pages="fail")
    line.simulator.end_next(failed_pages=(1,))
    await line.submitted()
    error = await line.fails()
    assert (error.code, error.details["failed_pages"]) == (ErrorCode.PARSE_FAILED, [1])
    assert "UPLOAD_PIPELINE_LLAMAPARSE_FAILED_PAGES" in error.message
    assert await line.admin.fetchval("select credits from upload_pipeline.usage_records") == 12
    cost = await line.admin.fetchval("select results from upload_pipeline.job_outcomes")
    assert json.loads(cost)["cost"]["pages"] == 4
    line.use(llamaparse_failed_pages="warn")
    await line.restart()
    await line.step()
    assert (await line.row())["warnings"] == ["LlamaParse could not read page 1 of 4."]
    assert (line.paid, line.requests["poll"]) == (1, 1)
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


@pytest.mark.parametrize(
    ("what", "stage"),
    [("FAILED", None), ("FAILED", "job_validated"), ("CANCELLED", None), ("gone", "job_validated"), ("no page", None)],
)
async def test_what_failed_is_told_and_submitted_anew_when_it_is_started_again(
    open_line: OpenLine, what: str, stage: str | None
) -> None:
    line = await open_line()
    if what == "no page":
        line.simulator.end_next(failed_pages=(1, 2, 3, 4))
    elif what != "gone":
        line.simulator.end_next(what)
    await line.submitted()
    failed = (await line.row())["parse_id"]
    if what == "gone":
        line.simulator.misbehave("gone", operation="poll")
    error = await line.fails()
    assert (error.code, error.retryable, error.details["parse_id"]) == (ErrorCode.PARSE_FAILED, False, failed)
    await line.restart(stage)
    if stage is None:
        assert await line.step() is not None
        await line.claim()
        await line.pass_time(10)
        await line.step()
    else:
        await line.parsed()
    assert line.job.stage == "parsed"
    assert (await line.row())["parse_id"] != failed
    assert line.requests["submit"] == 2
    first, second = await line.submissions()
    assert first["failed_at"] is not None
    assert second["finished_at"] is not None


async def test_a_failed_parse_is_not_submitted_by_who_does_not_submit(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.end_next("FAILED")
    await line.submitted()
    await line.fails()
    line.use(parser="local")
    await line.restart()
    error = await line.fails()
    assert error.code is ErrorCode.PARSE_FAILED
    assert "job_validated" in error.message
    assert line.context.hosted_parser is not None
    await line.context.hosted_parser.close()


# time


async def test_a_parse_that_takes_too_long_is_told_looked_at_again_and_given_up_on_demand(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.running = 10**6
    await line.submitted()
    await line.pass_time(3600)
    error = await line.fails()
    assert (error.code, error.retryable) == (ErrorCode.PARSE_TIMEOUT, True)
    assert "UPLOAD_PIPELINE_LLAMAPARSE_PARSE_TIMEOUT" in error.message
    # a retry looks again
    await line.claim()
    assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT
    await line.claim()
    line.simulator.misbehave("server_error", operation="poll")
    assert "cannot be looked at" in (await line.fails()).message
    assert line.requests["submit"] == 1
    # and one from an earlier stage looks once more, and submits anew
    await line.claim()
    assert (await line.fails()).code is ErrorCode.PARSE_TIMEOUT
    await line.restart("job_validated")
    await line.submitted()
    assert line.requests["submit"] == 2
    line.simulator.running = 0
    await line.step()
    assert line.job.stage == "parsed"


async def test_a_parse_that_ended_after_the_limit_is_taken_all_the_same(open_line: OpenLine) -> None:
    line = await open_line()
    await line.submitted()
    await line.pass_time(3600)
    await queue.fail_job(line.context.db, line.job.lease, code="X", message="x", retryable=False)
    await line.restart("job_validated")
    await line.parsed()
    assert (line.requests["submit"], line.paid) == (1, 1)


# the webhook's hint


async def test_a_hint_wakes_the_job_that_waits_and_no_other(open_line: OpenLine) -> None:
    line = await open_line()
    db = line.context.db

    async def wake(parse_id: str) -> int:
        return await parse_submissions.wake_parse(db, provider=PROVIDER, parse_id=parse_id)

    await line.step()
    parse_id = (await line.row())["parse_id"]
    line.simulator.running = 10**6
    await line.step()
    assert "poll" not in line.requests
    assert await wake("pjb-unknown") == 0
    assert await parse_submissions.wake_parse(db, provider="another", parse_id=parse_id) == 0
    assert await wake(parse_id) == 1
    assert await line.admin.fetchval("select state from upload_pipeline.upload_jobs") == "queued"
    assert await wake(parse_id) == 0
    (line.job,) = await queue.claim_jobs(db, worker_id=uuid4(), pool="default", limit=1, after_user=None, ttl=TTL)
    # at work: the snooze that follows is due at once
    assert await wake(parse_id) == 1
    await line.step()
    assert line.requests["poll"] == 1
    assert await queue.promote_due(db) == 1
    await line.claim()
    line.simulator.running = 0
    await line.step()
    assert line.job.stage == "parsed"
    assert await wake(parse_id) == 0


async def test_the_address_for_messages_goes_along_where_there_is_a_secret(open_line: OpenLine) -> None:
    line = await open_line()
    line.use(api_public_url="https://files.example.com/")
    assert line.context.hosted_parser is not None
    assert not line.context.hosted_parser.client.told
    await line.context.hosted_parser.close()
    secret = load_settings(llamaparse_webhook_secret="s" * 32).llamaparse_webhook_secret
    line.use(llamaparse_webhook_secret=secret)
    await line.step()
    (made,) = line.simulator._jobs.values()
    (hook,) = made.body["webhook_configurations"]
    assert hook["webhook_url"] == "https://files.example.com/api/v2/webhooks/llamaparse"
    assert (hook["webhook_signing_secret"], hook["webhook_output_format"]) == ("s" * 32, "json")
    await line.context.hosted_parser.close()


# the budget


async def test_requests_wait_for_the_budget_of_all_workers(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_requests_per_minute=2)
    delay = await line.step()
    assert delay is not None
    assert 40 < delay.total_seconds() <= 66
    assert line.requests == {"find": 1, "upload": 1}
    granted = await provider_budget.reserve(
        line.context.db,
        provider=PROVIDER,
        key_id=key_id_of(KEY),
        model=BUDGET,
        requests=1,
        tokens=0,
        request_limit=2,
    )
    assert isinstance(granted, provider_budget.Wait)
    # no place in line is left behind, and the call was not announced
    (submission,) = await line.submissions()
    assert submission["called_at"] is None


def test_the_client_is_opened_as_the_settings_say(tmp_path: Path) -> None:
    def opened(**settings: Any) -> HostedParser | None:
        return open_hosted_parser(None, ProviderCalls(), load_settings(home=tmp_path, **settings))  # type: ignore[arg-type]

    assert opened() is None
    with pytest.raises(PipelineError, match="LLAMAPARSE_API_KEY") as caught:
        opened(parser="llamaparse")
    assert caught.value.code is ErrorCode.SETTING_INVALID
    follower, parser = opened(llamaparse_api_key=KEY), opened(parser="llamaparse", llamaparse_api_key=KEY)
    assert follower is not None
    assert parser is not None
    assert (follower.takes_new, parser.takes_new) == (False, True)
    assert isinstance(parser.client, LlamaParse)
    assert (parser.client.tier, parser.client.tier_version) == ("cost_effective", "2026-09-28")


@pytest.mark.parametrize(
    ("value", "why"),
    [("latest", "name a date"), ("2026-9-28", "no date"), ("2026-13-01", "no date"), ("20260928", "no date")],
)
def test_a_version_is_a_date(value: str, why: str) -> None:
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_LLAMAPARSE_VERSION") as caught:
        load_settings(llamaparse_version=value)
    assert why in caught.value.message
