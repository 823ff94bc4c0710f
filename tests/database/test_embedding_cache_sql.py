"""The cache of vectors that were paid for: whose they are, who gets them, and when they go."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from paid_texts import MODEL, cached, fill, keep, key, start_job
from session_verbs import GRACE, claim_session, clean_sessions, end_session, finish_deletions, open_session, upload
from sessions import Connect, Connection
from verbs import add_job, await_lock_wait, cancel, claim, fail, in_background, set_clock, value

DAY = 24 * 3600.0

BUFFERED = """
select chunk_id, {} as found
  from (select chunk_id, embedding from upload_pipeline.document_vector_buffer
        union all
        select b.chunk_id, e.embedding
          from upload_pipeline.document_cached_chunks k
         cross join unnest(k.chunk_ids) n (chunk_id)
          join upload_pipeline.document_chunk_buffer b on b.chunk_id = n.chunk_id
          left join upload_pipeline.embedding_cache e
            on e.user_id = b.user_id and e.model = k.embed_model and encode(e.text_sha256, 'hex') = b.chunk_sha256) v
 order by 1
"""


@pytest.fixture(autouse=True)
def registered_model(worker: Connection) -> None:
    worker.execute("select upload_pipeline.register_model(%s, 'openai', 3)", [MODEL])


@pytest.fixture
def user(admin: Connection, worker: Connection) -> UUID:
    """A user with a job that was."""
    user = uuid4()
    add_job(admin, worker, user)
    claim(worker)
    return user


def buffered(admin: Connection) -> dict[UUID, str | None]:
    """The vector of each chunk that has one in the buffer, or is known to have one in the cache."""
    rows = admin.execute(BUFFERED.format("embedding::text")).fetchall()
    return {row.chunk_id: row.found for row in rows}


def bits(admin: Connection) -> list[bytes]:
    """The same, as they are stored."""
    rows = admin.execute(BUFFERED.format("extensions.vector_send(embedding)")).fetchall()
    return [bytes(row.found) for row in rows]


def test_what_was_paid_for_fills_the_buffer_bit_for_bit_and_stands_in_the_books(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    odd = "[0.1,-1e-38,3.4028235e+38]"
    first, (_, chunk) = start_job(admin, worker, user, ["new", "known"])
    assert keep(worker, user, ["known"], [odd], [(first, chunk, 1)]) == 1
    stored = bytes(value(admin, "select extensions.vector_send(%s::text::extensions.vector)", odd))
    assert bits(admin) == [stored]
    admin.execute("delete from upload_pipeline.document_cached_chunks")

    lease, chunks = start_job(admin, worker, user, ["known", "other", "known"])
    assert fill(worker, lease) == [(chunks[0], None), (chunks[1], "other"), (chunks[2], None)]
    assert bits(admin) == [stored] * 2
    assert fill(worker, lease) == [(chunks[1], "other")]
    keep(worker, user, ["other"], ["[1,2,3]"], [(lease, chunks[1], 1)])
    assert fill(worker, lease) == []
    (book,) = admin.execute("select * from upload_pipeline.usage_records").fetchall()
    assert (book.provider, book.model, book.operation) == ("openai", "billed", "embed")
    assert (book.job_id, book.user_id, book.cached, book.requests) == (lease.job_id, user, 2, 0)
    assert (book.tokens, book.cost_micros) == (0, 0)


def test_only_so_many_chunks_are_looked_at_in_document_order(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    lease, chunks = start_job(admin, worker, user, ["a", "b", "c"])
    keep(worker, user, ["a", "b", "c"], ["[1,0,0]"] * 3)
    assert fill(worker, lease, limit=2) == [(chunks[0], None), (chunks[1], None)]
    assert fill(worker, lease, limit=2) == [(chunks[2], None)]


def test_nobody_is_given_what_another_user_paid_for_nor_another_models(admin: Connection, worker: Connection) -> None:
    mine, stranger = uuid4(), uuid4()
    lease, (chunk,) = start_job(admin, worker, mine, ["same"])
    start_job(admin, worker, stranger, ["same"])
    keep(worker, stranger, ["same"], ["[9,9,9]"])
    worker.execute("select upload_pipeline.add_model('other', 'openai', 3)")
    keep(worker, mine, ["same"], ["[8,8,8]"], model="other")
    assert fill(worker, lease) == [(chunk, "same")]
    assert value(worker, "select upload_pipeline.cached_vector(%s, %s, sha256('same'))", mine, MODEL) is None
    found = value(worker, "select upload_pipeline.cached_vector(%s, %s, sha256('same'))::text", stranger, MODEL)
    assert found == "[9,9,9]"


def test_a_lost_lease_leaves_the_vector_in_the_cache_and_the_others_get_theirs(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    lost, (orphan,) = start_job(admin, worker, user, ["shared"])
    held, (mine,) = start_job(admin, worker, user, ["shared"])
    cancel(worker, lost.job_id)
    admin.execute(
        "update upload_pipeline.upload_jobs set lease_token = lease_token + 1 where job_id = %s", [lost.job_id]
    )
    assert keep(worker, user, ["shared"], ["[1,2,3]"], [(lost, orphan, 1), (held, mine, 1)]) == 1
    assert buffered(admin) == {mine: "[1,2,3]"}
    assert cached(admin) == {key(user, "shared"): "[1,2,3]"}
    with pytest.raises(psycopg.Error) as caught:
        fill(worker, lost)
    assert caught.value.sqlstate == "UP001"


def test_a_chunk_of_another_document_gets_nothing_by_a_lease(admin: Connection, worker: Connection) -> None:
    mine, stranger = uuid4(), uuid4()
    lease, _ = start_job(admin, worker, mine, ["a"])
    _, (foreign,) = start_job(admin, worker, stranger, ["a"])
    assert keep(worker, mine, ["a"], ["[1,2,3]"], [(lease, foreign, 1)]) == 0
    assert buffered(admin) == {}


@pytest.mark.parametrize(
    ("vectors", "model", "state"),
    [(["[1,2]"], MODEL, "UP005"), (["[1,2,3]"], "nobody's", "UP002"), (["[1,2,3]"] * 2, MODEL, "UP005")],
)
def test_vectors_that_do_not_fit_are_refused_and_nothing_is_kept(
    admin: Connection, worker: Connection, user: UUID, vectors: list[str], model: str, state: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        keep(worker, user, ["a"], vectors, model=model)
    assert caught.value.sqlstate == state
    assert cached(admin) == {}


def test_writers_of_the_same_texts_do_not_wait_in_a_circle_and_the_first_stands(
    admin: Connection, connect: Connect, user: UUID
) -> None:
    first, second = connect(), connect()
    with first.transaction():
        keep(first, user, ["b", "a"], ["[1,1,1]", "[1,1,1]"])
        late = in_background(keep, second, user, ["a", "b", "c"], ["[2,2,2]"] * 3)
        await_lock_wait(admin, second)
    assert late.result(timeout=10) == 0
    assert cached(admin) == {
        key(user, "a"): "[1,1,1]",
        key(user, "b"): "[1,1,1]",
        key(user, "c"): "[2,2,2]",
    }


def test_use_is_written_down_once_a_day(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    set_clock(worker)

    def version() -> tuple[Any, ...]:
        row = admin.execute("select xmin::text, last_used_on::text from upload_pipeline.embedding_cache").fetchone()
        assert row is not None
        return tuple(row)

    def use() -> None:
        lease, _ = start_job(admin, worker, user, ["text"])
        assert [text for _, text in fill(worker, lease)] == [None]
        fail(worker, lease, retryable=False)

    lease, _ = start_job(admin, worker, user, [])
    fail(worker, lease, retryable=False)
    keep(worker, user, ["text"], ["[1,2,3]"])
    made = version()
    assert made[1] == "2031-05-17"
    use()
    assert version() == made
    set_clock(worker, DAY)
    use()
    touched = version()
    assert touched[1] == "2031-05-18"
    use()
    value(worker, "select upload_pipeline.cached_vector(%s, %s, sha256('text'))", user, MODEL)
    assert version() == touched
    set_clock(worker, 2 * DAY)
    value(worker, "select upload_pipeline.cached_vector(%s, %s, sha256('text'))", user, MODEL)
    assert version()[1] == "2031-05-19"


def test_a_row_that_another_call_is_touching_is_used_without_waiting(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    user = uuid4()
    lease, (chunk,) = start_job(admin, worker, user, ["text"])
    keep(worker, user, ["text"], ["[1,2,3]"])
    admin.execute("update upload_pipeline.embedding_cache set last_used_on = '2001-01-01'")
    with admin.transaction():
        admin.execute("select from upload_pipeline.embedding_cache for update")
        worker.execute("set statement_timeout = '5s'")
        assert fill(worker, lease) == [(chunk, None)]
        assert value(connect(), "select upload_pipeline.forget_unused_vectors('1 day')") == 0


def test_what_nobody_uses_goes_the_oldest_first_and_bounded(admin: Connection, worker: Connection, user: UUID) -> None:
    set_clock(worker)
    for days, text in enumerate(["oldest", "older", "old", "young"]):
        set_clock(worker, days * DAY)
        keep(worker, user, [text], ["[1,2,3]"])
    forget = "select upload_pipeline.forget_unused_vectors('10 days', 2)"
    set_clock(worker, 10 * DAY)
    assert value(worker, forget) == 0
    set_clock(worker, 13 * DAY)
    assert value(worker, forget) == 2
    assert set(cached(admin)) == {key(user, "old"), key(user, "young")}
    assert value(worker, forget) == 1
    assert value(worker, forget) == 0
    assert set(cached(admin)) == {key(user, "young")}


def test_a_deleted_documents_text_is_paid_for_once_also_while_its_answer_is_on_the_way(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    lease, (chunk,) = start_job(admin, worker, user, ["text"])
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [lease.document_id])
    finish_deletions(worker)
    assert keep(worker, user, ["text"], ["[1,2,3]"], [(lease, chunk, 1)]) == 0
    again, (chunk,) = start_job(admin, worker, user, ["text"])
    assert fill(worker, again) == [(chunk, None)]


def a_sessions_job(worker: Connection, admin: Connection) -> tuple[Any, UUID]:
    session = open_session(worker, "t")
    lease, (chunk,) = start_job(admin, worker, session.user_id, ["text"])
    return lease, chunk


def test_an_answer_that_comes_after_a_claim_is_the_claimants(admin: Connection, worker: Connection) -> None:
    lease, chunk = a_sessions_job(worker, admin)
    claimant = uuid4()
    keep(worker, lease.user_id, ["early"], ["[1,1,1]"])
    claim_session(worker, "t", claimant)
    assert cached(admin) == {key(claimant, "early"): "[1,1,1]"}
    assert keep(worker, lease.user_id, ["text"], ["[1,2,3]"], [(lease, chunk, 1)]) == 1
    assert buffered(admin) == {chunk: "[1,2,3]"}
    assert cached(admin) == {key(claimant, "early"): "[1,1,1]", key(claimant, "text"): "[1,2,3]"}


def test_a_claimant_keeps_what_was_paid_for_before(admin: Connection, worker: Connection, user: UUID) -> None:
    lease, _ = a_sessions_job(worker, admin)
    keep(worker, user, ["both"], ["[5,5,5]"])
    keep(worker, lease.user_id, ["both", "session"], ["[6,6,6]", "[7,7,7]"])
    claim_session(worker, "t", user)
    assert cached(admin) == {key(user, "both"): "[5,5,5]", key(user, "session"): "[7,7,7]"}


def test_a_text_of_both_is_used_when_either_used_it_last(admin: Connection, worker: Connection, user: UUID) -> None:
    set_clock(worker)
    lease, _ = a_sessions_job(worker, admin)
    keep(worker, user, ["old", "new"], ["[5,5,5]", "[5,5,5]"])
    keep(worker, lease.user_id, ["older"], ["[6,6,6]"])
    set_clock(worker, 20 * DAY)
    keep(worker, lease.user_id, ["old"], ["[6,6,6]"])
    keep(worker, user, ["older"], ["[5,5,5]"])
    claim_session(worker, "t", user)
    assert value(worker, "select upload_pipeline.forget_unused_vectors('10 days')") == 1
    assert cached(admin) == {key(user, "old"): "[5,5,5]", key(user, "older"): "[5,5,5]"}


def test_a_claim_waits_for_an_answer_that_is_being_written_and_takes_it_along(
    admin: Connection, worker: Connection, connect: Connect
) -> None:
    lease, _ = a_sessions_job(worker, admin)
    claimant, other = uuid4(), connect()
    with worker.transaction():
        keep(worker, lease.user_id, ["text"], ["[1,2,3]"])
        claimed = in_background(claim_session, other, "t", claimant)
        await_lock_wait(admin, other)
    claimed.result(timeout=10)
    assert cached(admin) == {key(claimant, "text"): "[1,2,3]"}


@pytest.mark.parametrize("removed", [False, True])
def test_nothing_of_a_session_that_is_over_stays_nor_comes_later(
    admin: Connection, worker: Connection, removed: bool
) -> None:
    session = open_session(worker, "t")
    upload(worker, session.user_id, "file")
    keep(worker, session.user_id, ["text"], ["[1,2,3]"])
    end_session(worker, "t")
    set_clock(worker, 40 * DAY)
    clean_sessions(worker, GRACE)
    assert cached(admin) == {}
    if removed:
        finish_deletions(worker)
        assert clean_sessions(worker, GRACE)[0] == 1
    keep(worker, session.user_id, ["late"], ["[1,2,3]"])
    if not removed:
        # its row is there still: what came late goes with it
        assert set(cached(admin)) == {key(session.user_id, "late")}
        finish_deletions(worker)
        assert clean_sessions(worker, GRACE)[0] == 1
    assert cached(admin) == {}


def test_all_of_one_user_can_be_forgotten(admin: Connection, worker: Connection, user: UUID) -> None:
    other = uuid4()
    add_job(admin, worker, other)
    for who in (user, other):
        keep(worker, who, ["a", "b"], ["[1,2,3]"] * 2)
    assert value(worker, "select upload_pipeline.forget_user_vectors(%s)", user) == 2
    assert value(worker, "select upload_pipeline.forget_user_vectors(%s)", user) == 0
    assert {who for who, _ in cached(admin)} == {other}


def test_for_a_user_of_whom_nothing_is_known_nothing_is_kept(admin: Connection, worker: Connection) -> None:
    keep(worker, uuid4(), ["a"], ["[1,2,3]"])
    assert cached(admin) == {}
