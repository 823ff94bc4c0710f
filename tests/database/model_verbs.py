"""The verbs of embedding models as the tests call them, and documents whose vectors are of one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from document_steps import accept, buffer_vectors, lead
from sessions import Connection
from verbs import add_document, claim, claim_one, user_number, value

OLD, NEW = "m3", "m2"
USER = user_number(1)
FOUR = ("one", "two", "three", "four")
LACKING = """
select c.chunk_id from upload_pipeline.document_chunks c
 where c.live and c.embed_model <> (select model from upload_pipeline.embedding_models where status = 'active')
   and not exists (select from upload_pipeline.chunk_vectors s
                    where s.chunk_id = c.chunk_id
                      and s.embed_model = (select model from upload_pipeline.embedding_models where status = 'active'))
"""


def refused(call: Any, *arguments: Any, state: str, says: str | None = None) -> psycopg.Error:
    with pytest.raises(psycopg.Error, match=says) as caught:
        call(*arguments)
    assert caught.value.sqlstate == state
    return caught.value


def add(db: Connection, model: str = NEW, dimensions: int = 2, paused: bool = False) -> str:
    return str(value(db, "select upload_pipeline.add_model(%s, 'test', %s, %s)::text", model, dimensions, paused))


def activate(db: Connection, model: str = NEW, grace: str = "1 day") -> Any:
    return value(db, "select upload_pipeline.activate_model(%s, %s::interval)", model, grace)


def retire(db: Connection, model: str, now: bool = False) -> int:
    return int(value(db, "select upload_pipeline.retire_model(%s, %s)", model, now))


def enqueue_refills(db: Connection, limit: int = 500, most_open: int = 1000) -> tuple[int, bool]:
    row = db.execute("select * from upload_pipeline.enqueue_refills(%s, %s)", [limit, most_open]).fetchone()
    assert row is not None
    return row.jobs, row.more


def settle(db: Connection, limit: int = 1000) -> tuple[int, int]:
    row = db.execute("select * from upload_pipeline.settle_models(%s)", [limit]).fetchone()
    assert row is not None
    return row.moved, row.removed


def pending_refill(db: Connection, document: UUID, model: str = NEW) -> list[UUID]:
    rows = db.execute("select chunk_id from upload_pipeline.pending_refill(%s, %s)", [document, model]).fetchall()
    return [row.chunk_id for row in rows]


def store(db: Connection, lease: Any, ids: Sequence[UUID], vector: str = "[0,1]", model: str = NEW) -> int:
    return buffer_vectors(db, lease, ids, [vector] * len(ids), model)


def commit_refill(db: Connection, lease: Any) -> Any:
    return db.execute(
        "select * from upload_pipeline.commit_refill(%s, %s)", [lease.job_id, lease.lease_token]
    ).fetchone()


def statuses(db: Connection) -> dict[str, str]:
    rows = db.execute("select model, status::text from upload_pipeline.embedding_models").fetchall()
    return {row.model: row.status for row in rows}


def add_chunks(admin: Connection, user: UUID = USER, count: int = 3) -> UUID:
    """A searchable document whose chunks have vectors of OLD."""
    document = add_document(admin, user)
    admin.execute(
        """
        insert into upload_pipeline.document_chunks
          (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
           heading_path, section_ids, embed_model, embedding, live)
        select gen_random_uuid(), %s, %s, i, 'word ' || i, repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm3', '[1,0,0]', true
          from generate_series(1, %s) i
        """,
        [document, user, count],
    )
    admin.execute(
        "update upload_pipeline.documents set embed_model = 'm3', chunk_count = %s, searchable_at = now()"
        " where document_id = %s",
        [count, document],
    )
    return document


def fill(db: Connection) -> int:
    """Does all the jobs that are there; how many."""
    done = 0
    while True:
        enqueue_refills(db)
        leases = claim(db, limit=10, pool="background")
        if not leases:
            return done
        for lease in leases:
            store(db, lease, pending_refill(db, lease.subject_id))
            assert commit_refill(db, lease).state == "done"
            done += 1


def hits(admin: Connection, vector: str, model: str, user: UUID = USER) -> list[Any]:
    with admin.transaction(force_rollback=True):
        admin.execute("set local role authenticated")
        admin.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(user)})])
        return admin.execute(
            """
            select chunk_id, score from upload_pipeline.search_chunks(
              '', %s::text::extensions.vector, %s, p_mode => 'vector')
            """,
            [vector, model],
        ).fetchall()


def to_commit(db: Connection, user: UUID = USER, content: bytes = b"bytes") -> Any:
    """A document's job, one step before its chunks become live, with vectors of OLD."""
    accept(db, user, content)
    lease = claim_one(db)
    lead(db, lease, FOUR, until="embeddings_buffered")
    return lease
