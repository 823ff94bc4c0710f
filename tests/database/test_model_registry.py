"""The registry of embedding models: which is the active one, and which is being filled."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest
from model_verbs import NEW, OLD, add, add_chunks, enqueue_refills, pending_refill, refused, retire, statuses, store
from paid_texts import start_job
from sessions import Connect, Connection
from verbs import await_lock_wait, claim_one, in_background, value


def test_the_first_model_is_the_active_one_and_a_worker_is_told_which_it_is(worker: Connection) -> None:
    for model, dimensions in (("a", 2), ("b", 3), ("a", 2)):
        row = worker.execute("select * from upload_pipeline.register_model(%s, 'test', %s)", [model, dimensions])
        assert tuple(row.fetchone() or ()) == ("a", "test", 2)
    assert statuses(worker) == {"a": "active"}


def test_a_model_with_other_dimensions_is_refused(worker: Connection) -> None:
    worker.execute("select upload_pipeline.register_model('a', 'test', 2)")
    refused(worker.execute, "select upload_pipeline.register_model('a', 'test', 3)", state="UP005")
    add(worker, "b", 2)
    refused(add, worker, "b", 3, state="UP005")
    retire(worker, "b")
    refused(add, worker, "z", 0, state="23514")


def test_two_first_models_at_once_leave_one_active(admin: Connection, worker: Connection, connect: Connect) -> None:
    other = connect()
    worker.execute("begin")
    worker.execute("select upload_pipeline.register_model('a', 'test', 2)")
    registered = in_background(other.execute, "select model::text from upload_pipeline.register_model('b', 'test', 2)")
    await_lock_wait(admin, other)
    worker.execute("commit")
    assert registered.result(timeout=10).fetchone() == ("a",)
    assert statuses(worker) == {"a": "active"}


def test_the_first_model_of_all_has_nothing_to_fill(worker: Connection) -> None:
    assert add(worker) == "active"
    assert statuses(worker) == {NEW: "active"}
    refused(add, worker, state="UP003", says="is the active one")


def test_one_model_at_a_time_is_filled(worker: Connection, old: None) -> None:
    assert add(worker) == "building"
    assert add(worker) == "building"
    error = refused(add, worker, "m5", 5, state="UP003", says='"m2" is being filled')
    assert "models retire m2" in str(error.diag.message_hint)
    retire(worker, NEW)
    assert add(worker, "m5", 5) == "building"


@pytest.mark.parametrize(
    "change", ["delete from {} where model = '{}'", "update {} set model = 'x' where model = '{}'"]
)
def test_a_model_that_vectors_name_is_not_deleted_nor_renamed(
    admin: Connection, worker: Connection, old: None, change: str
) -> None:
    """No vector has a foreign key to its model; whichever place names it, it stays."""
    add(worker)
    document = add_chunks(admin, count=1)
    admin.execute("update upload_pipeline.documents set embed_model = null, searchable_at = null")
    chunk = value(admin, "select chunk_id from upload_pipeline.document_chunks")
    admin.execute(
        """
        insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
        values (%s, 'm2', %s, '[0,1]')
        """,
        [chunk, document],
    )
    for model in (OLD, NEW):
        refused(
            admin.execute, change.format("upload_pipeline.embedding_models", model), state="23503", says="has vectors"
        )
    admin.execute("delete from upload_pipeline.chunk_vectors")
    admin.execute(
        """
        insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
        values (%s, 'm2', %s, '[0,1]')
        """,
        [chunk, document],
    )
    refused(admin.execute, change.format("upload_pipeline.embedding_models", NEW), state="23503", says="has vectors")
    admin.execute("delete from upload_pipeline.document_vector_buffer")
    admin.execute(
        """
        insert into upload_pipeline.document_cached_chunks (document_id, embed_model, chunk_ids)
        values (%s, 'm2', array[%s])
        """,
        [document, chunk],
    )
    refused(admin.execute, change.format("upload_pipeline.embedding_models", NEW), state="23503", says="has vectors")
    admin.execute("delete from upload_pipeline.document_cached_chunks")
    admin.execute("delete from upload_pipeline.document_chunks")
    for model in (OLD, NEW):
        admin.execute(change.format("upload_pipeline.embedding_models", model).replace("'x'", f"'x{model}'"))
    assert OLD not in statuses(admin)
    assert NEW not in statuses(admin)


def test_a_models_end_waits_for_vectors_that_are_being_written(
    admin: Connection, worker: Connection, old: None
) -> None:
    add(worker)
    add_chunks(admin)
    enqueue_refills(worker)
    lease = claim_one(worker, pool="background")
    worker.execute("begin")
    assert store(worker, lease, pending_refill(worker, lease.document_id)) == 3
    admin.execute("set lock_timeout = '200ms'")
    delete = f"delete from upload_pipeline.embedding_models where model = '{NEW}'"
    with pytest.raises(psycopg.errors.LockNotAvailable):
        admin.execute(delete)
    worker.execute("commit")
    refused(admin.execute, delete, state="23503", says="has vectors")
    assert statuses(worker) == {OLD: "active", NEW: "building"}


def test_vectors_that_meet_their_models_end_are_refused_and_nothing_is_written(
    admin: Connection, worker: Connection, connect: Connect, old: None
) -> None:
    add(worker)
    lease, chunks = start_job(admin, worker, uuid4(), ["text"])
    admin.execute("begin")
    admin.execute(f"delete from upload_pipeline.embedding_models where model = '{NEW}'")
    storing = in_background(store, worker, lease, chunks)
    await_lock_wait(connect(), worker)
    admin.execute("commit")
    with pytest.raises(psycopg.Error, match=f'no embedding model "{NEW}" any more') as caught:
        storing.result(timeout=10)
    assert caught.value.sqlstate == "UP002"
    assert value(admin, "select count(*) from upload_pipeline.document_vector_buffer") == 0


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_models_end_is_refused_where_vectors_may_have_come_unseen(
    admin: Connection, worker: Connection, old: None, level: str
) -> None:
    add(worker)
    add_chunks(admin)
    enqueue_refills(worker)
    lease = claim_one(worker, pool="background")
    admin.execute(f"begin isolation level {level}")
    admin.execute("select 1 from upload_pipeline.embedding_models")
    store(worker, lease, pending_refill(worker, lease.document_id))
    refused(
        admin.execute,
        f"delete from upload_pipeline.embedding_models where model = '{NEW}'",
        state="25001",
        says="READ COMMITTED",
    )
    admin.execute("rollback")
