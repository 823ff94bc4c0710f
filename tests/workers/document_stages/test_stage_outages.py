"""The provider of the model that is filled is away, or fails at one text: what becomes of fillings and of documents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from document_line import TTL, Line, OpenLine
from pydantic import SecretStr

from tests.simulators.openai_embeddings import KEY, Fault, OpenAISimulator
from upload_pipeline.database import queue
from upload_pipeline.errors import PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_workers import embedding_batcher
from upload_workers.models_in_use import AHEAD_REST, LONGEST_REST, ModelsInUse
from upload_workers.pipelines import STEPS
from upload_workers.stages import embed, refill
from upload_workers.steps import Commit, Snooze

MODEL = "text-embedding-3-small@16"
OUTCOMES = """
select j.document_id, j.state::text, j.retry_count, o.error_code
  from upload_pipeline.upload_jobs j left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
 where j.pipeline = 'reembed' order by j.seq
"""
OVERVIEW = "select * from upload_pipeline.model_overview where status = 'building'"


@dataclass
class Filling:
    """Documents that a paid model is filled with, and the worker's clock."""

    line: Line
    documents: list[UUID]
    simulator: OpenAISimulator
    seconds: float = 0.0

    async def turn(self) -> list[str]:
        """Makes due what waits and does each job once, as a worker does; how each turn ended."""
        db, admin = self.line.context.db, self.line.admin
        await admin.execute("update upload_pipeline.upload_jobs set run_at = now() where state = 'retryable'")
        await queue.promote_due(db)
        ended: list[str] = []
        while jobs := await queue.claim_jobs(
            db, worker_id=uuid4(), pool="background", limit=2, after_user=None, ttl=TTL
        ):
            ended += await asyncio.gather(*map(self._do, jobs))
        return ended

    async def _do(self, job: queue.ClaimedJob) -> str:
        db = self.line.context.db
        try:
            outcome: Any = await STEPS[job.pipeline, job.stage](job, self.line.context)
            if isinstance(outcome, Commit):
                outcome = await outcome.verb(db, job.lease, keep=True, ttl=TTL)
        except PipelineError as error:
            failed = await queue.fail_job(
                db, job.lease, code=error.code, message=error.message, retryable=error.retryable
            )
            return failed.state
        if not isinstance(outcome, Snooze):
            return str(outcome.state)
        await queue.snooze_job(db, job.lease, delay=outcome.delay)
        return "snoozed"

    async def outcomes(self) -> dict[UUID, tuple[str, int, str | None]]:
        """State, retries and error code of each document's job."""
        return {row[0]: tuple(row)[1:] for row in await self.line.admin.fetch(OUTCOMES)}


@pytest.fixture
async def filling(open_line: OpenLine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Filling]:
    """Two documents with local vectors, the second of which has a text with the word poison in it."""
    monkeypatch.setattr(embedding_batcher, "_FIRST_DELAY", 0.001)
    documents = []
    for name in ("well", "poison"):
        text = "\n\n".join(f"# {name} {part}\n\n{name} {'word ' * 300}" for part in range(2))
        line = await open_line("md", text.encode())
        await line.run_to(await line.claim(), "embedded")
        documents.append(line.document)
    async with OpenAISimulator() as simulator:
        settings = line.context.settings.model_copy(
            update={
                "openai_api_key": SecretStr(KEY),
                "openai_base_url": simulator.url,
                "openai_timeout": 1.0,
                "embed_batch_size": 8,
            }
        )
        found = Filling(line, documents, simulator)
        models = ModelsInUse(line.context.db, ProviderCalls(), settings, lambda: found.seconds)
        found.line = replace(line, context=replace(line.context, settings=settings, models=models))
        await line.admin.execute("select upload_pipeline.add_model($1, 'openai', 16)", MODEL)
        assert await line.admin.fetchval("select jobs from upload_pipeline.enqueue_refills()") == 2
        yield found
        await models.close()


async def test_an_outage_costs_a_filling_no_document_and_no_retry(filling: Filling) -> None:
    filling.simulator.faults = {Fault.SERVER_ERROR: 1.0}
    asked = []
    for _ in range(60):
        filling.seconds += 30
        assert await filling.turn() == ["snoozed", "snoozed"]
        asked.append(filling.simulator.books.requests)
    assert {row[:2] for row in (await filling.outcomes()).values()} == {("retryable", 0)}
    # half an hour: at 30, 60, 120 … 300 s, each time both documents at most, and a trial of each
    assert len(set(asked)) <= 10
    assert asked[-1] <= len(set(asked)) * 4 * embedding_batcher.TRIES
    told = await filling.line.admin.fetchrow(OVERVIEW)
    assert told["failure"].startswith("The embedder failed (500)")
    assert told["failed_documents"] == 0

    filling.simulator.behave()
    filling.seconds += LONGEST_REST
    assert await filling.turn() == ["done", "done"]
    assert await filling.line.admin.fetchval("select upload_pipeline.activate_model($1, '1 day')", MODEL)
    assert sum(filling.simulator.books.paid_again().values()) == 0


async def test_a_model_that_is_opened_while_the_worker_stops_asks_nothing(filling: Filling) -> None:
    filling.line.context.models.send_no_more()
    assert await filling.turn() == ["snoozed", "snoozed"]
    assert filling.simulator.books.requests == 0


async def test_a_text_at_which_the_provider_always_fails_fails_its_own_document(filling: Filling) -> None:
    filling.simulator.poison = {"poison": Fault.SERVER_ERROR}
    well, poisoned = filling.documents
    ended: list[str] = []
    while "deadletter" not in ended:
        ended = await filling.turn()
        assert "snoozed" not in ended, "nothing is wrong with the provider"
    outcomes = await filling.outcomes()
    assert outcomes[poisoned] == ("deadletter", 3, "EMBED_FAILED")
    # both shared the first request
    assert outcomes[well] in (("done", 0, None), ("done", 1, "EMBED_FAILED"), ("done", 1, None))


async def test_a_text_that_is_refused_fails_its_own_document_at_once(filling: Filling) -> None:
    filling.simulator.poison = {"poison": Fault.REJECTED}
    well, poisoned = filling.documents
    assert sorted(await filling.turn()) == ["deadletter", "done"]
    assert await filling.outcomes() == {well: ("done", 0, None), poisoned: ("deadletter", 0, "EMBED_REJECTED")}
    assert (await filling.line.admin.fetchrow(OVERVIEW))["failed_documents"] == 1


async def test_a_provider_that_does_not_answer_is_an_outage_too(
    filling: Filling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refill, "TRIAL_SECONDS", 0.2)
    context = filling.line.context
    settings = context.settings.model_copy(update={"stage_timeout": 1.0})
    filling.line = replace(filling.line, context=replace(context, settings=settings))
    filling.simulator.faults = {Fault.HANG: 1.0}
    began = time.monotonic()
    assert await filling.turn() == ["snoozed", "snoozed"]
    assert time.monotonic() - began < 1.5
    assert {row[:2] for row in (await filling.outcomes()).values()} == {("retryable", 0)}
    filling.simulator.behave()
    await asyncio.sleep(1.2)  # what is under way ends by itself
    filling.seconds += LONGEST_REST
    assert await filling.turn() == ["done", "done"]


Upload = Callable[[str], Awaitable[int]]


@pytest.fixture
def upload(filling: Filling, open_line: OpenLine, monkeypatch: pytest.MonkeyPatch) -> Upload:
    """Leads a document to its end while the model is filled; how many requests its provider got by it."""
    monkeypatch.setattr(embed, "AHEAD_SECONDS", 2.5)

    async def lead(name: str) -> int:
        before = filling.simulator.books.requests
        line = await open_line("md", f"# {name}\n\n{name} {'word ' * 300}".encode())
        line = replace(line, context=filling.line.context)
        await line.run_to(await line.claim(), "embedded")
        return filling.simulator.books.requests - before

    return lead


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.SERVER_ERROR])
async def test_one_document_waits_for_a_provider_that_is_away_and_those_behind_it_do_not(
    filling: Filling, upload: Upload, fault: Fault
) -> None:
    filling.simulator.faults = {fault: 1.0}
    assert await upload("first") > 0
    assert await upload("second") == 0
    assert await upload("third") == 0
    filling.seconds += AHEAD_REST + 1
    assert await upload("fourth") > 0
    filling.simulator.behave()
    await asyncio.sleep(1.2)  # what is under way ends by itself
    assert await upload("fifth") == 0
    filling.seconds += AHEAD_REST + 1
    assert [await upload(name) for name in ("sixth", "seventh")] == [1, 1]


async def test_documents_are_not_embedded_ahead_while_the_filling_rests(filling: Filling, upload: Upload) -> None:
    filling.simulator.faults = {Fault.SERVER_ERROR: 1.0}
    assert "snoozed" in await filling.turn()
    assert await upload("first") == 0


async def test_a_text_that_is_refused_stops_no_other_document_from_being_embedded_ahead(
    filling: Filling, upload: Upload
) -> None:
    filling.simulator.poison = {"poison": Fault.REJECTED}
    assert await upload("poison") > 0
    assert await upload("well") == 1
