"""Documents are accepted once and deleted for good, whoever dies or comes at the same moment."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from document_steps import (
    FOUR,
    accept,
    claim_accepted,
    commit_embeddings,
    lead,
)
from sessions import Connect, Connection
from verbs import (
    advance,
    await_lock_wait,
    event_codes,
    in_background,
    job_row,
    terminate,
    value,
)


@pytest.fixture
def lease(worker: Connection) -> Any:
    return claim_accepted(worker)


def test_accepting_the_same_bytes_again_gives_the_document_and_job_there_are(worker: Connection) -> None:
    user = uuid4()
    first, again = accept(worker, user), accept(worker, user)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert (first.document_id, first.job_id) == (again.document_id, again.job_id)
    assert accept(worker, user, b"other").document_id != first.document_id
    assert accept(worker, uuid4()).duplicate is False
    codes = worker.execute(
        "select code from upload_pipeline.events where document_id = %s order by event_id", [first.document_id]
    ).fetchall()
    assert [row.code for row in codes] == ["document_accepted", "job_enqueued"]


def test_two_acceptances_at_once_make_one_document(admin: Connection, worker: Connection, connect: Connect) -> None:
    user, other = uuid4(), connect()
    worker.execute("begin")
    first = accept(worker, user)
    second = in_background(accept, other, user)
    await_lock_wait(admin, other)
    worker.execute("commit")
    answer = second.result(timeout=10)
    assert (answer.document_id, answer.job_id, answer.duplicate) == (first.document_id, first.job_id, True)


def test_an_acceptance_whose_rival_dies_is_the_first(admin: Connection, worker: Connection, connect: Connect) -> None:
    user, victim = uuid4(), connect()
    victim.execute("begin")
    accept(victim, user)
    second = in_background(accept, worker, user)
    await_lock_wait(admin, worker)
    terminate(admin, victim)
    assert second.result(timeout=10).duplicate is False


@pytest.mark.parametrize(("size", "digest", "name"), [(0, "a" * 64, "x"), (1, "A" * 64, "x"), (1, "a" * 64, "")])
def test_a_document_that_cannot_be_leaves_no_row(worker: Connection, size: int, digest: str, name: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        worker.execute(
            "select upload_pipeline.accept_document(%s, %s, %s, 'text/plain', %s, %s, 'k')",
            [uuid4(), uuid4(), name, size, digest],
        )
    assert value(worker, "select count(*) from upload_pipeline.events") == 0


def test_a_duplicate_whose_jobs_are_gone_has_no_job(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    first = accept(worker, user)
    admin.execute("delete from upload_pipeline.upload_jobs")
    again = accept(worker, user)
    assert (again.document_id, again.job_id, again.duplicate) == (first.document_id, None, True)


def test_a_deletion_hides_first_and_removes_later(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR)
    row = worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id]).fetchone()
    assert (row.document_id, row.user_id) == (lease.document_id, lease.user_id)
    assert worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id]).fetchone() == row
    with pytest.raises(psycopg.Error, match="being deleted") as error:
        accept(worker, lease.user_id)
    assert error.value.sqlstate == "UP003"
    unfinished = "select count(*) from upload_pipeline.unfinished_deletions(%s)"
    assert value(worker, unfinished, "2031-05-17 13:00+00") == 1
    assert value(worker, unfinished, "2031-05-17 12:00+00") == 0
    finish = "select upload_pipeline.finish_deletion(%s)"
    assert [value(worker, finish, lease.document_id) for _ in range(2)] == [True, False]
    for table in ("documents", "upload_jobs", "job_outcomes", "document_chunks", "document_nodes", "document_edges"):
        assert value(worker, f"select count(*) from upload_pipeline.{table}") == 0
    codes = worker.execute(
        "select code from upload_pipeline.events where document_id = %s", [lease.document_id]
    ).fetchall()
    assert [row.code for row in codes].count("document_deletion_started") == 1
    assert [row.code for row in codes].count("document_deleted") == 1
    assert accept(worker, lease.user_id).duplicate is False


def test_a_deletion_ends_the_live_job_and_fences_its_worker_off(worker: Connection, lease: Any) -> None:
    lead(worker, lease, FOUR, until="chunked")
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    assert job_row(worker, lease.job_id).state == "cancelled"
    assert event_codes(worker, lease.job_id)[-1] == "job_cancelled"
    with pytest.raises(psycopg.Error) as error:
        advance(worker, lease, "chunked", "embedding")
    assert error.value.sqlstate == "UP001"


def test_what_is_not_being_deleted_is_not_removed(worker: Connection, lease: Any) -> None:
    assert value(worker, "select upload_pipeline.finish_deletion(%s)", lease.document_id) is False
    assert worker.execute("select * from upload_pipeline.begin_deletion(%s)", [uuid4()]).fetchall() == []
    assert job_row(worker, lease.job_id).state == "working"


def test_a_deletion_waits_for_the_results_being_written(
    admin: Connection, worker: Connection, connect: Connect, lease: Any
) -> None:
    lead(worker, lease, FOUR, until="embeddings_buffered")
    other = connect()
    worker.execute("begin")
    commit_embeddings(worker, lease)
    deleted = in_background(other.execute, "select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    await_lock_wait(admin, other)
    worker.execute("commit")
    deleted.result(timeout=10)
    assert value(worker, "select deleted_at is not null from upload_pipeline.documents")
    assert job_row(worker, lease.job_id).state == "done"
