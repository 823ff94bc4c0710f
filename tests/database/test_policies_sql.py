"""Policies: a row beside the document's, made with it, mended by the same bytes again, gone with it."""

from __future__ import annotations

from datetime import date
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid5

import psycopg
import pytest
from sessions import Connect, Connection
from verbs import await_lock_wait, in_background, user_number, value

USER = user_number(1)
SAID = ("Acme Mutual", "Home Plus", date(2026, 2, 28))


def accept(
    db: Connection, said: tuple[str, str, date] = SAID, content: bytes = b"bytes", user: UUID = USER, **more: Any
) -> Any:
    digest = sha256(content).hexdigest()
    document = uuid5(user, digest)
    return db.execute(
        """
        select * from upload_pipeline.accept_policy(%s, %s, 'policy.pdf', 'application/pdf', %s, %s, %s, %s, %s, %s,
          %s::jsonb, 3::smallint, 'trace')
        """,
        [document, user, len(content), digest, f"raw/{document}", *said, more.get("metadata", "{}")],
    ).fetchone()


def accept_plain(db: Connection, content: bytes = b"bytes", user: UUID = USER) -> Any:
    digest = sha256(content).hexdigest()
    document = uuid5(user, digest)
    return db.execute(
        "select * from upload_pipeline.accept_document(%s, %s, 'a.pdf', 'application/pdf', %s, %s, %s, '{\"a\": 1}')",
        [document, user, len(content), digest, f"raw/{document}"],
    ).fetchone()


def policy(admin: Connection) -> tuple[Any, ...]:
    row = admin.execute(
        """
        select user_id, insurer, product_name, launch_date, d.metadata
          from upload_pipeline.policies p join upload_pipeline.documents d using (document_id, user_id)
        """
    ).fetchone()
    assert row is not None
    return tuple(row)


def in_metadata(said: tuple[str, str, date]) -> dict[str, str]:
    return {"insurer": said[0], "product_name": said[1], "launch_date": said[2].isoformat()}


def test_document_job_and_policy_are_made_together(worker: Connection, admin: Connection) -> None:
    made = accept(worker, metadata='{"insurer": "what it says here has no say", "tag": "x"}')
    assert not made.duplicate
    assert policy(admin) == (USER, *SAID, {"tag": "x", **in_metadata(SAID)})
    job = admin.execute("select * from upload_pipeline.upload_jobs where job_id = %s", [made.job_id]).fetchone()
    assert job is not None
    assert (job.document_id, job.pipeline, job.stage, job.state) == (made.document_id, "document", "queued", "queued")
    assert (job.priority, job.correlation_id) == (3, "trace")


@pytest.mark.parametrize(
    "said",
    [("", "Home Plus", date(2026, 2, 28)), ("Acme", "", date(2026, 2, 28)), ("A" * 201, "Home", date(2026, 2, 28))],
)
def test_a_policy_that_does_not_fit_leaves_neither_document_nor_job(
    worker: Connection, admin: Connection, said: tuple[str, str, date]
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        accept(worker, said)
    for table in ("documents", "upload_jobs", "policies", "events"):
        assert value(admin, f"select count(*) from upload_pipeline.{table}") == 0, table


def test_the_same_bytes_again_are_the_first_job_and_what_is_said_last_stands(
    worker: Connection, admin: Connection
) -> None:
    first = accept(worker)
    newer = ("Acme Mutual AG", "Home Plus II", date(2026, 3, 1))
    second = accept(worker, newer)
    assert (second.document_id, second.job_id, second.duplicate) == (first.document_id, first.job_id, True)
    assert policy(admin) == (USER, *newer, in_metadata(newer))
    assert value(admin, "select count(*) from upload_pipeline.upload_jobs") == 1


def test_a_plain_document_becomes_a_policy_and_keeps_its_job_and_metadata(
    worker: Connection, admin: Connection
) -> None:
    plain = accept_plain(worker)
    made = accept(worker)
    assert (made.document_id, made.job_id, made.duplicate) == (plain.document_id, plain.job_id, True)
    assert policy(admin) == (USER, *SAID, {"a": 1, **in_metadata(SAID)})


def test_a_policy_that_comes_again_as_a_plain_document_stays_a_policy(worker: Connection, admin: Connection) -> None:
    accept(worker)
    assert accept_plain(worker).duplicate
    assert policy(admin) == (USER, *SAID, in_metadata(SAID))


def test_a_document_whose_jobs_were_removed_gets_one(worker: Connection, admin: Connection) -> None:
    first = accept(worker)
    admin.execute("delete from upload_pipeline.upload_jobs")
    again = accept(worker)
    assert again.duplicate
    assert again.job_id not in (None, first.job_id)
    assert value(admin, "select job_id from upload_pipeline.upload_jobs") == again.job_id


def test_the_same_bytes_of_two_users_are_two_policies(worker: Connection, admin: Connection) -> None:
    other = user_number(2)
    assert accept(worker).document_id != accept(worker, user=other).document_id
    assert value(admin, "select count(*) from upload_pipeline.policies") == 2


def test_while_the_document_is_being_deleted_it_becomes_no_policy_and_goes_with_it(
    worker: Connection, admin: Connection
) -> None:
    made = accept(worker)
    worker.execute("select upload_pipeline.begin_deletion(%s)", [made.document_id])
    with pytest.raises(psycopg.DatabaseError) as caught:
        accept(worker)
    assert caught.value.sqlstate == "UP003"
    worker.execute("select upload_pipeline.finish_deletion(%s)", [made.document_id])
    assert value(admin, "select count(*) from upload_pipeline.policies") == 0
    assert not accept(worker).duplicate


def test_a_deletion_that_comes_in_between_makes_it_wait_and_then_refuses(
    worker: Connection, admin: Connection, connect: Connect
) -> None:
    """The duplicate was seen, and its deletion commits before its row is written."""
    accept_plain(worker)
    deleting = connect()
    deleting.execute("begin")
    deleting.execute("select upload_pipeline.begin_deletion(document_id) from upload_pipeline.documents")
    late = connect()
    answer = in_background(lambda: accept(late))
    await_lock_wait(admin, late)
    deleting.execute("commit")
    with pytest.raises(psycopg.DatabaseError) as caught:
        answer.result(timeout=30)
    assert caught.value.sqlstate == "UP003"
    assert value(admin, "select count(*) from upload_pipeline.policies") == 0


def test_a_document_that_awaits_these_bytes_has_them_and_becomes_a_policy(
    worker: Connection, admin: Connection
) -> None:
    digest = sha256(b"bytes").hexdigest()
    document = uuid5(USER, digest)
    reserved = worker.execute(
        """
        select * from upload_pipeline.reserve_document(%s, %s, 'a.pdf', 'application/pdf', 5, %s, %s, '20 minutes',
          '{"a": 1}')
        """,
        [document, USER, digest, f"raw/{document}"],
    ).fetchone()
    assert reserved is not None
    made = accept(worker)
    assert (made.document_id, made.job_id, made.duplicate) == (document, reserved.job_id, False)
    assert policy(admin) == (USER, *SAID, in_metadata(SAID))
    assert value(admin, "select upload_deadline from upload_pipeline.documents") is None


def test_a_policy_goes_with_its_document_to_a_new_owner(worker: Connection, admin: Connection) -> None:
    accept(worker)
    admin.execute("update upload_pipeline.documents set user_id = %s", [user_number(2)])
    assert policy(admin) == (user_number(2), *SAID, in_metadata(SAID))


def test_two_at_once_make_one_document_and_one_policy(worker: Connection, admin: Connection, connect: Connect) -> None:
    first, second = connect(), connect()
    first.execute("begin")
    made = accept(first)
    answer = in_background(lambda: accept(second, ("B", "B", date(2026, 1, 1))))
    await_lock_wait(admin, second)
    first.execute("commit")
    assert answer.result(timeout=30) == (made.document_id, made.job_id, True)
    assert policy(admin)[1] == "B"
    assert value(admin, "select count(*) from upload_pipeline.upload_jobs") == 1
