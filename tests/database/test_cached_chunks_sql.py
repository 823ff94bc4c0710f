"""Chunks whose vectors are in the cache and not in the buffer: what is committed, and what if one is forgotten."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from document_steps import FOUR, MODEL, accept, buffered, commit_embeddings, lead, pending, result
from paid_texts import cached, fill, keep
from session_verbs import claim_session, open_session
from sessions import Connection
from verbs import advance, claim_one, fail, retry, set_clock, value

VECTORS = ("[1,1,0]", "[2,1,0]", "[3,1,0]", "[4,1,0]")


@pytest.fixture(autouse=True)
def registered_model(worker: Connection) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'openai', 3)", [MODEL])


def led(worker: Connection, user: UUID, content: bytes = b"bytes") -> Any:
    """The lease of a user's new document, its four chunks to be embedded."""
    accept(worker, user, content)
    lease = claim_one(worker)
    lead(worker, lease, FOUR, until="embedding")
    return lease


def buy(worker: Connection, lease: Any, user: UUID, vectors: tuple[str, ...] = VECTORS) -> None:
    """Keeps a vector for each chunk that the document lacks one of."""
    lacking = [(chunk, text) for chunk, text in fill(worker, lease) if text is not None]
    waiting = [(lease, chunk, place) for place, (chunk, _) in enumerate(lacking, start=1)]
    assert keep(worker, user, [text for _, text in lacking], vectors, waiting) == len(lacking)


def buffered_chunks(admin: Connection) -> list[UUID]:
    rows = admin.execute("select chunk_id from upload_pipeline.document_chunk_buffer order by ordinal").fetchall()
    return [row.chunk_id for row in rows]


def live_vectors(admin: Connection) -> list[str]:
    return [chunk.embedding for chunk in result(admin)["chunks"] if chunk.live]


def to_commit(worker: Connection, lease: Any) -> None:
    advance(worker, lease, "embedding", "embeddings_buffered")


def test_a_paid_vector_is_written_once_before_it_is_committed(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    lease = led(worker, user)
    buy(worker, lease, user)
    to_commit(worker, lease)
    assert value(admin, "select count(*) from upload_pipeline.document_vector_buffer") == 0
    assert buffered(admin) == (4, 4)
    assert pending(worker, lease.document_id) == []
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == list(VECTORS)
    assert buffered(admin) == (0, 0)


def test_a_second_call_and_another_worker_note_a_chunk_no_second_time(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    lease = led(worker, user)
    buy(worker, lease, user)
    waiting = [(lease, chunk, place) for place, chunk in enumerate(buffered_chunks(admin)[:3], start=1)]
    assert keep(worker, user, FOUR[:3], VECTORS[:3], waiting) == 3
    assert fill(worker, lease) == []
    assert buffered(admin) == (4, 4)


def test_a_chunk_whose_digest_is_not_of_its_text_has_its_vector_in_the_buffer(
    admin: Connection, worker: Connection
) -> None:
    """The cache has it under another name than the commit looks for: it would be pending, and paid for, for ever."""
    user = uuid4()
    lease = led(worker, user)
    admin.execute("update upload_pipeline.document_chunk_buffer set chunk_sha256 = repeat('b', 64) where ordinal = 1")
    buy(worker, lease, user)
    assert value(admin, "select embedding::text from upload_pipeline.document_vector_buffer") == VECTORS[1]
    assert pending(worker, lease.document_id) == []
    to_commit(worker, lease)
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == list(VECTORS)


def test_a_vector_that_another_user_paid_for_is_buffered_as_the_commit_looks_in_the_cache_of_the_jobs_user(
    admin: Connection, worker: Connection
) -> None:
    """As where a session was claimed, and its document stayed with the user it had been uploaded for."""
    user, payer = uuid4(), uuid4()
    accept(worker, payer, b"something else")
    claim_one(worker)
    lease = led(worker, user)
    waiting = [(lease, chunk, place) for place, chunk in enumerate(buffered_chunks(admin), start=1)]
    assert keep(worker, payer, FOUR, VECTORS, waiting) == 4
    assert {owner for owner, _ in cached(admin)} == {payer}
    assert pending(worker, lease.document_id) == []
    to_commit(worker, lease)
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == list(VECTORS)


def test_what_is_forgotten_before_the_commit_is_pending_again_and_nothing_becomes_live(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    lease = led(worker, user)
    buy(worker, lease, user)
    to_commit(worker, lease)
    admin.execute("delete from upload_pipeline.embedding_cache where text_sha256 in (sha256('three'), sha256('four'))")
    with pytest.raises(psycopg.Error, match="2 of 4 buffered chunks lack a vector") as caught:
        commit_embeddings(worker, lease)
    assert caught.value.sqlstate == "UP007"
    assert live_vectors(admin) == []
    assert pending(worker, lease.document_id) == buffered_chunks(admin)[2:]

    buy(worker, lease, user, ("[3,3,3]", "[4,4,4]"))
    assert pending(worker, lease.document_id) == []
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == [*VECTORS[:2], "[3,3,3]", "[4,4,4]"]
    assert buffered(admin) == (0, 0)


def test_what_was_forgotten_and_bought_for_another_document_is_not_bought_again(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    lease = led(worker, user)
    buy(worker, lease, user)
    admin.execute("delete from upload_pipeline.embedding_cache where text_sha256 = sha256('two')")
    keep(worker, user, ["two"], ["[2,2,2]"])
    assert fill(worker, lease) == []
    to_commit(worker, lease)
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == [VECTORS[0], "[2,2,2]", *VECTORS[2:]]


def test_a_claim_between_buffer_and_commit_takes_the_cached_vectors_along(
    admin: Connection, worker: Connection
) -> None:
    session, claimant = open_session(worker, "t"), uuid4()
    lease = led(worker, session.user_id)
    buy(worker, lease, session.user_id)
    to_commit(worker, lease)
    claim_session(worker, "t", claimant)
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == list(VECTORS)
    owners = admin.execute("select distinct user_id from upload_pipeline.document_chunks").fetchall()
    assert [row.user_id for row in owners] == [claimant]


def test_a_document_that_a_claim_leaves_for_later_keeps_the_vectors_that_it_had_in_the_cache(
    admin: Connection, worker: Connection
) -> None:
    """It stays the session's while the claimant's own of the same bytes is being deleted; what it paid for moves."""
    session, claimant = open_session(worker, "t"), uuid4()
    lease = led(worker, session.user_id)
    buy(worker, lease, session.user_id)
    to_commit(worker, lease)
    own = accept(worker, claimant)
    worker.execute("select upload_pipeline.begin_deletion(%s)", [own.document_id])
    assert claim_session(worker, "t", claimant).remaining == 1
    assert {user for user, _ in cached(admin)} == {claimant}
    assert pending(worker, lease.document_id) == []
    commit_embeddings(worker, lease)
    assert live_vectors(admin) == list(VECTORS)


def test_a_chunk_that_is_told_twice_and_a_text_of_two_who_became_one_are_written_once(
    admin: Connection, worker: Connection
) -> None:
    session, claimant = open_session(worker, "t"), uuid4()
    lease = led(worker, session.user_id)
    claim_session(worker, "t", claimant)
    placed = value(
        worker,
        """
        select upload_pipeline.keep_vectors(
          %s, array[%s, %s]::uuid[], array[sha256('one'), sha256('one')], '{"[1,1,1]","[1,1,1]"}',
          array[%s, %s]::uuid[], array[%s, %s]::bigint[], array[%s, %s]::uuid[], array[1, 2])
        """,
        MODEL,
        *(session.user_id, claimant),
        *(lease.job_id, lease.job_id),
        *(lease.lease_token, lease.lease_token),
        *(buffered_chunks(admin)[:1] * 2),
    )
    assert placed == 1
    assert value(admin, "select count(*) from upload_pipeline.embedding_cache") == 1
    assert len(pending(worker, lease.document_id)) == 3


def test_a_cached_vector_of_another_model_stands_beside_the_chunk(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    worker.execute("select upload_pipeline.add_model('next', 'openai', 3)")
    lease = led(worker, user)
    buy(worker, lease, user)
    waiting = [(lease, chunk, place) for place, chunk in enumerate(buffered_chunks(admin), start=1)]
    assert keep(worker, user, FOUR, ["[9,9,9]"] * 4, waiting, model="next") == 4
    admin.execute("delete from upload_pipeline.embedding_cache where model = 'next' and text_sha256 = sha256('one')")
    to_commit(worker, lease)
    commit_embeddings(worker, lease)
    rows = admin.execute("select embed_model, embedding::text from upload_pipeline.chunk_vectors").fetchall()
    assert [tuple(row) for row in rows] == [("next", "[9,9,9]")] * 3, "the one that was forgotten is the filling's"
    assert live_vectors(admin) == list(VECTORS)


def test_what_is_noted_of_a_model_that_was_given_up_goes_and_the_others_stays(
    admin: Connection, worker: Connection
) -> None:
    user = uuid4()
    worker.execute("select upload_pipeline.add_model('next', 'openai', 3)")
    lease = led(worker, user)
    buy(worker, lease, user)
    waiting = [(lease, chunk, place) for place, chunk in enumerate(buffered_chunks(admin), start=1)]
    assert keep(worker, user, FOUR, ["[9,9,9]"] * 4, waiting, model="next") == 4
    worker.execute("select upload_pipeline.retire_model('next')")
    worker.execute("select upload_pipeline.settle_models(1000)")
    rows = admin.execute("select embed_model from upload_pipeline.document_cached_chunks").fetchall()
    assert [row.embed_model for row in rows] == [MODEL]
    assert pending(worker, lease.document_id) == []


def test_a_restart_at_the_cut_begins_with_nothing_noted(admin: Connection, worker: Connection) -> None:
    user = uuid4()
    lease = led(worker, user)
    buy(worker, lease, user)
    fail(worker, lease, retryable=False)
    retry(worker, lease.job_id, "chunking")
    assert buffered(admin) == (0, 0)
    lease = claim_one(worker)
    lead(worker, lease, FOUR, until="embedding")
    assert all(text is None for _, text in fill(worker, lease)), "paid for before"
    assert buffered(admin) == (4, 4)
