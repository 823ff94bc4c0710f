"""Each thing that a policy needs fails once its bytes are under way: no job, no row, no object is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from clamd_server import Conversation, misbehaving
from live_service import new_user, running_service, service_settings
from policy_forms import INGEST, PDF, SAID, manager, send
from raw_requests import connected
from upload_traces import Traces

from tests.intake.failing_parts import FailingBackend, HookedDatabase, raising
from tests.scenarios.service_process import service_process
from upload_pipeline.api.resources import Resources
from upload_pipeline.database import documents
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.orphans import sweep
from upload_pipeline.storage.store import ObjectStore, open_store

WAITING = "from pg_catalog.pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

Change = Callable[[Resources], Resources]


def failing_store(method: str, *, after: bool) -> Change:
    def change(resources: Resources) -> Resources:
        store = ObjectStore(FailingBackend(resources.store.backend, method, after))  # type: ignore[arg-type]
        return replace(resources, intake=replace(resources.intake, store=store))

    return change


def failing_statement(error: BaseException, *, after: bool = False) -> Change:
    def change(resources: Resources) -> Resources:
        hook = {("accept_policy", 1): raising(error)}
        db = HookedDatabase(resources.db, after=hook) if after else HookedDatabase(resources.db, before=hook)
        return replace(resources, intake=replace(resources.intake, db=db, retry_seconds=0.0))

    return change


def failing_inspection(error: Exception) -> Change:
    async def inspect(_path: Path, _media_type: str) -> None:
        raise error

    def change(resources: Resources) -> Resources:
        return replace(resources, intake=replace(resources.intake, inspect=inspect))

    return change


FAULTS: dict[str, tuple[Change, int]] = {
    "writing fails": (failing_store("write", after=False), 503),
    "writing fails at its end": (failing_store("write", after=True), 503),
    "reading back fails": (failing_store("read", after=False), 503),
    "reading back fails at its end": (failing_store("read", after=True), 503),
    "the file cannot be opened": (failing_inspection(PipelineError(ErrorCode.CORRUPT_FILE, "does not open")), 400),
    "opening it breaks": (failing_inspection(RuntimeError("who would have thought")), 500),
    "moving fails": (failing_store("move", after=False), 503),
    "moving fails at its end": (failing_store("move", after=True), 503),
    "the statement is refused": (failing_statement(asyncpg.DivisionByZeroError("1/0")), 500),
    "the database is away": (failing_statement(ConnectionRefusedError("no server")), 503),
    "the connection is lost": (failing_statement(asyncpg.ConnectionDoesNotExistError("closed")), 503),
    "the statement takes too long": (failing_statement(asyncpg.QueryCanceledError("statement timeout")), 503),
}


async def assert_whole(traces: Traces, user: UUID) -> None:
    """One policy with its document, its job and its object, and nothing else."""
    row = await traces.document()
    assert row["user_id"] == user
    assert await traces.admin.fetchval("select document_id from upload_pipeline.policies") == row["document_id"]
    assert await traces.keys() == {row["raw_key"]}
    assert len(await traces.files()) == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_fails_leaves_nothing_and_the_next_try_works(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, fault: str
) -> None:
    change, expected = FAULTS[fault]
    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        user, traces = new_user(), Traces(service, admin)
        answer = await send(service, user)
        assert answer.status_code == expected, answer.text
        assert await traces.nothing()
        assert await admin.fetchval("select count(*) from upload_pipeline.policies") == 0
        if "inspect" not in change.__qualname__:
            assert (await send(service, user)).status_code == 202
            await assert_whole(traces, user)


async def test_an_answer_that_is_lost_is_one_whole_policy(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    change = failing_statement(asyncpg.ConnectionDoesNotExistError("closed"), after=True)
    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        user, traces = new_user(), Traces(service, admin)
        assert (await send(service, user)).status_code == 503
        await assert_whole(traces, user)
        assert (await send(service, user)).status_code == 200
        await assert_whole(traces, user)


async def test_where_the_estimate_cannot_be_told_the_policy_is_accepted_all_the_same(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    class Refusing:
        """The service's pool, of which nobody becomes a user."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        @asynccontextmanager
        async def acquire(self) -> Any:
            raise ConnectionRefusedError("no server")
            yield

    def change(resources: Resources) -> Resources:
        return replace(resources, db=Refusing(resources.db))  # type: ignore[arg-type]

    async with running_service(service_settings(database.worker_url, tmp_path), change) as service:
        user = new_user()
        answer = await send(service, user)
        assert answer.status_code == 202
        told = answer.json()
        assert (told["status"], told["estimated_completion_time"], told["estimated_completion_minutes"]) == (
            *("pending", None, None),
        )
        await assert_whole(Traces(service, admin), user)


async def has_it_all_and_says_nothing(with_: Conversation) -> None:
    await with_.read_stream()
    await asyncio.sleep(60)


async def hangs_up(with_: Conversation) -> None:
    await with_.read_stream()


@pytest.mark.parametrize("behaviour", [has_it_all_and_says_nothing, hangs_up])
async def test_a_scanner_that_gives_no_verdict_leaves_nothing(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, behaviour: Callable[[Conversation], Awaitable[None]]
) -> None:
    async with misbehaving(behaviour) as url:
        settings = service_settings(database.worker_url, tmp_path, clamd_url=url, clamd_timeout=0.3)
        async with running_service(settings) as service:
            answer = await send(service, new_user())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "SCANNER_UNAVAILABLE")
            assert "retry-after" in answer.headers
            assert await Traces(service, admin).nothing()


def form() -> bytes:
    """A policy as bytes of a form with the boundary `b`."""
    parts = [(name, value.encode()) for name, value in SAID.items()]
    said = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in parts
    )
    return (
        said + b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + PDF + b"\r\n--b--\r\n"
    )


async def test_a_client_that_leaves_leaves_nothing(database: Any, tmp_path: Path, admin: asyncpg.Connection) -> None:
    async with running_service(service_settings(database.worker_url, tmp_path)) as service:
        traces, whole = Traces(service, admin), form()
        for sent in (0, 100, len(whole) // 2, len(whole) - 1):
            async with connected(service.url) as connection:
                await begin(connection, len(whole))
                await connection.send(whole[:sent])
                if sent > 1000:
                    while not await traces.files():
                        await asyncio.sleep(0.01)
            assert await traces.nothing(), sent


async def begin(connection: Any, length: int, user: UUID | None = None) -> None:
    await connection.start(
        "POST",
        INGEST,
        **manager(user or new_user()),
        Content_Type="multipart/form-data; boundary=b",
        Content_Length=str(length),
    )


class KilledError(Exception):
    """Tells `service_process` that there is nothing left to stop."""


class Killed:
    """A service of its own that is killed, and what the next maintenance finds."""

    def __init__(self, database: Any, home: Path, admin: asyncpg.Connection) -> None:
        self.database, self.home, self.admin = database, home, admin
        self.user = new_user()

    @asynccontextmanager
    async def receiving(self, body: bytes, length: int, **settings: str) -> Any:
        """The service with a request of which so much has come; killed at the end."""
        with suppress(KilledError), service_process(self.database.worker_url, self.home, **settings) as service:
            async with connected(service.url) as connection:
                await begin(connection, length, self.user)
                await connection.send(body)
                yield
            service.process.kill()
            service.process.wait()
            raise KilledError

    async def keys(self) -> set[str]:
        store = open_store(f"file://{self.home / 'storage'}")
        return {info.key async for info in store.list()}

    async def maintained(self) -> None:
        """Sweeps as maintenance does once the grace is over."""

        async def known(document_ids: Any) -> set[UUID]:
            return await documents.existing_documents(self.admin, document_ids)

        store = open_store(f"file://{self.home / 'storage'}")
        later = datetime.now(UTC) + timedelta(hours=2)
        await sweep(store, known, now=later, grace=timedelta(hours=1))

    async def counts(self) -> tuple[int, int, int]:
        """Policies, documents, jobs."""
        row = await self.admin.fetchrow(
            "select (select count(*) from upload_pipeline.policies), (select count(*) from upload_pipeline.documents), "
            "(select count(*) from upload_pipeline.upload_jobs)"
        )
        return tuple(row)


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_service_that_is_killed_with_half_a_policy_leaves_nothing_after_maintenance(
    database: Any, tmp_path: Path, admin: asyncpg.Connection
) -> None:
    killed, whole = Killed(database, tmp_path, admin), form()
    async with killed.receiving(whole[: len(whole) // 2], len(whole)):
        await until(lambda: _some_file(tmp_path))
    await killed.maintained()
    assert (await killed.keys(), await killed.counts()) == (set(), (0, 0, 0))
    assert not await _some_file(tmp_path)


async def _some_file(home: Path) -> bool:
    return any(path.is_file() for path in (home / "storage").rglob("*"))


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_service_that_is_killed_between_object_and_row_leaves_all_or_nothing_after_maintenance(
    database: Any, tmp_path: Path, admin: asyncpg.Connection, noticed: bool
) -> None:
    """The statement waits for a lock while the service dies: Postgres may notice, or else run it to its end."""
    killed, whole = Killed(database, tmp_path, admin), form()
    async with admin.transaction():
        await admin.execute("lock table upload_pipeline.policies in exclusive mode")
        async with killed.receiving(whole, len(whole)):
            await until(lambda: _waiting(admin))
            assert [key.partition("/")[0] for key in await killed.keys()] == ["raw"]
        if noticed:
            await admin.execute(f"select pg_terminate_backend(pid, 10000) {WAITING}")
    if not noticed:
        await until(lambda: admin.fetchval("select count(*) from upload_pipeline.policies"))
    await killed.maintained()
    assert await killed.counts() == ((0, 0, 0) if noticed else (1, 1, 1))
    assert len(await killed.keys()) == (0 if noticed else 1)
    async with running_service(service_settings(database.worker_url, tmp_path)) as service:
        assert (await send(service, killed.user)).status_code == (202 if noticed else 200)


async def _waiting(admin: asyncpg.Connection) -> bool:
    return bool(await admin.fetchval(f"select count(*) {WAITING}"))
