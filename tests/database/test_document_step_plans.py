"""What the steps read, whatever the statistics say."""

from __future__ import annotations

import re
from typing import Any

import pytest
from document_steps import (
    MODEL,
    claim_accepted,
    lead,
)
from sessions import Connection


@pytest.fixture
def lease(worker: Connection) -> Any:
    return claim_accepted(worker)


def test_pending_vectors_are_looked_up_by_key_whatever_the_statistics_say(
    admin: Connection, worker: Connection, lease: Any
) -> None:
    """Among 40,000 buffered vectors of others, never analysed, with the plan that a session keeps from its sixth call.

    Left to itself the planner then compares each chunk with each vector of the model: seconds a call.
    """
    for table in ("document_chunks", "document_chunk_buffer", "document_vector_buffer"):
        admin.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
    lead(worker, lease, [f"text {i}" for i in range(600)], until="embedding")
    admin.execute("set session_replication_role = replica")
    admin.execute(
        """
        insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
        select gen_random_uuid(), %s, lpad(to_hex(i / 400), 32, '0')::uuid, '[1,0,0]' from generate_series(1, 40000) i
        """,
        [MODEL],
    )
    admin.execute(
        """
        insert into upload_pipeline.document_cached_chunks (document_id, embed_model, chunk_ids)
        select lpad(to_hex(i / 40), 32, '0')::uuid, %s, array_fill(gen_random_uuid(), array[256])
          from generate_series(1, 4000) i
        """,
        [MODEL],
    )
    row = admin.execute(
        "select prosrc, proconfig from pg_catalog.pg_proc where oid = 'upload_pipeline.pending_vectors'::regproc"
    ).fetchone()
    assert row is not None
    body = row.prosrc
    for place, name in enumerate(("p_document_id", "p_model", "p_limit"), start=1):
        body = body.replace(name, f"${place}")

    def plan() -> str:
        admin.execute("deallocate all")
        admin.execute(f"prepare body (uuid, text, integer) as {body}")
        lines = admin.execute(f"explain execute body ('{lease.document_id}', '{MODEL}', 256)").fetchall()
        return "\n".join(line[0] for line in lines)

    admin.execute("set plan_cache_mode = force_generic_plan")
    assert "Materialize" in plan(), "the trap that this test sets does not spring"
    for setting in row.proconfig:
        if setting.startswith("enable_"):
            admin.execute(f"set {setting}")
    assert "document_vector_buffer_pkey" in plan()
    hashed = set(re.findall(r"hashed SubPlan \d+", plan()))
    assert len(hashed) == 1, "the list of chunks, or each would read it; and not the cache, which is everybody's"
    assert "document_cached_chunks_document" in plan()
    assert "Materialize" not in plan()


def test_every_verb_that_joins_the_buffers_leaves_the_planner_only_keys(admin: Connection) -> None:
    rows = admin.execute(
        """
        select proname, proconfig from pg_catalog.pg_proc
         where pronamespace = 'upload_pipeline'::regnamespace
           and prosrc ~ '(join|exists [(]select from) upload_pipeline.document_(chunk|vector)_buffer'
        """
    ).fetchall()
    assert {row.proname for row in rows} >= {"pending_vectors", "place_vectors", "commit_embeddings"}
    needed = {f"enable_{way}=off" for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "material")}
    assert {row.proname for row in rows if not needed <= set(row.proconfig)} == set()
