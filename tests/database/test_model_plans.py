"""What an activation reads, counted in blocks, where a vector fills half a block; and what a refusal counts."""

from __future__ import annotations

import re
import time
from typing import Any

import psycopg
import pytest
from sessions import Connection
from verbs import value

OLD, NEW = "m1", "m2"

DOCUMENTS = 400
CHUNKS = 50
"""Of a document."""

BOUND = DOCUMENTS * CHUNKS // 2
"""Blocks of an activation: two looks at an index entry of each chunk and of each vector. The rows take 20,000."""

ADD_DOCUMENTS = """
insert into upload_pipeline.documents
  (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, chunk_count, embed_model,
   searchable_at)
select gen_random_uuid(), gen_random_uuid(), 'a.md', 'text/markdown', 1, lpad(i::text, 64, '0'), 'raw/' || i, %s, 'm1',
       now()
  from generate_series(1, %s) i
"""

ADD_CHUNKS = """
insert into upload_pipeline.document_chunks
  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, heading_path,
   section_ids, embed_model, embedding, live)
select gen_random_uuid(), d.document_id, d.user_id, i, 'word', repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm1',
       array_fill(0.1::real, array[1000])::extensions.vector, true
  from upload_pipeline.documents d, generate_series(1, %s) i
"""

FILL = """
insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
select chunk_id, 'm2', document_id, '[1,0]' from upload_pipeline.document_chunks
"""

TAKE = """
delete from upload_pipeline.chunk_vectors v using (select chunk_id from upload_pipeline.chunk_vectors limit %s) t
 where v.chunk_id = t.chunk_id
"""


@pytest.fixture
def filled(admin: Connection, worker: Connection) -> None:
    """A model beside the active one that has a vector of each chunk."""
    worker.execute("select * from upload_pipeline.register_model(%s, 'openai', 1000)", [OLD])
    admin.execute("set session_replication_role = replica")
    for table in ("documents", "document_chunks", "chunk_vectors"):
        admin.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
    admin.execute(ADD_DOCUMENTS, [CHUNKS, DOCUMENTS])
    admin.execute(ADD_CHUNKS, [CHUNKS])
    admin.execute("set session_replication_role = default")
    assert value(worker, "select upload_pipeline.add_model(%s, 'openai', 2)", NEW) == "building"
    admin.execute(FILL)


def vacuum(admin: Connection, command: str, table: str) -> None:
    """Until each page is known to be visible to all, which it is not to a snapshot that somebody else still has."""
    for _ in range(100):
        admin.execute(f"{command} upload_pipeline.{table}")
        if value(
            admin, "select relallvisible >= relpages from pg_class where oid = %s::regclass", f"upload_pipeline.{table}"
        ):
            return
        time.sleep(0.1)
    pytest.fail(f"{table} does not become visible to all")


def blocks_of_activation(worker: Connection) -> int:
    """Blocks that it touches, those of every statement within it included; nothing is changed."""
    query = f"explain (analyze, buffers, format json) select upload_pipeline.activate_model('{NEW}', '1 day')"
    with worker.transaction(force_rollback=True):
        node: dict[str, Any] = value(worker, query)[0]["Plan"]
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def refusal(worker: Connection) -> str:
    """What an activation is refused with."""
    with pytest.raises(psycopg.Error) as caught:
        worker.execute("select upload_pipeline.activate_model(%s, '1 day')", [NEW])
    assert caught.value.sqlstate == "UP003"
    return str(caught.value.diag.message_primary)


def test_an_activation_reads_indexes_and_no_chunks(admin: Connection, worker: Connection, filled: None) -> None:
    figures = {}
    # as autovacuum leaves tables behind it
    for known in ("vacuum", "vacuum analyze"):
        for table in ("documents", "document_chunks", "chunk_vectors"):
            vacuum(admin, known, table)
        figures[known] = max(blocks_of_activation(worker) for _ in range(7))
    print(figures)
    assert value(admin, "select relpages from pg_class where relname = 'document_chunks'") >= 10_000
    assert {known: seen for known, seen in figures.items() if seen > BOUND} == {}


def test_a_refusal_counts_up_to_a_thousand(admin: Connection, worker: Connection, filled: None) -> None:
    admin.execute(TAKE, [1000])
    assert re.fullmatch(r'1000 chunks of \d+ documents have no vector of "m2" yet', refusal(worker))
    admin.execute(TAKE, [1])
    assert refusal(worker) == 'more than 1000 chunks have no vector of "m2" yet'
    admin.execute("truncate upload_pipeline.chunk_vectors")
    assert refusal(worker) == 'more than 1000 chunks have no vector of "m2" yet'


def test_what_is_being_deleted_lacks_nothing_and_hides_nothing(
    admin: Connection, worker: Connection, filled: None
) -> None:
    admin.execute("truncate upload_pipeline.chunk_vectors")
    admin.execute("update upload_pipeline.documents set deleted_at = now()")
    (last,) = admin.execute(
        """
        update upload_pipeline.documents set deleted_at = null
         where document_id = (select document_id from upload_pipeline.documents order by document_id desc limit 1)
        returning document_id
        """
    ).fetchone() or (None,)
    assert refusal(worker) == f'{CHUNKS} chunks of 1 documents have no vector of "m2" yet'
    admin.execute("update upload_pipeline.documents set deleted_at = now() where document_id = %s", [last])
    assert value(worker, "select upload_pipeline.activate_model(%s, '1 day')", NEW) == OLD
