"""What the verbs of the cache read, counted in blocks, in a large table, with statistics and without.

A block is 8 kB; reading one index entry of a large table costs three or four, a vector beside it one or two more.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from document_steps import accept, lead
from paid_texts import MODEL, fill, start_job
from sessions import Connection
from verbs import advance, claim_one, release, retry, set_clock, user_number, value

ROWS = 200_000
"""Of a heavy user and of a thousand others, in equal parts; with 1,000,000 a text costs one block more."""

TEXTS = 256

FILL_BOUND = 50 * TEXTS
"""Blocks of filling so many vectors, half of them found: their texts, keys, vectors, buffer rows and three indexes."""

KEEP_BOUND = 50 * TEXTS

FORGET_BOUND = 20_000
"""Blocks of forgetting a thousand vectors."""

COMMITTED = 100
"""Chunks of a document."""

COMMIT_BOUND = 150 * COMMITTED
"""Blocks of a commit: a chunk's row and five indexes, its node, its two edges, what they refer to, two buffers."""

HEAVY = user_number(1)

ADD = """
insert into upload_pipeline.embedding_cache (user_id, model, dimensions, text_sha256, last_used_on, embedding)
select case when mod(i, 2) = 0 then %(heavy)s
            else (lpad(to_hex(mod(i, 1000) + 16), 16, '0') || '0000000000000001')::uuid end,
       'm3', 3, sha256(('text ' || i / 2)::bytea), date '2020-01-01' + mod(i, 2000), '[1,2,3]'
  from generate_series(1, %(rows)s) i
"""

BESIDE_CHUNKS = """
insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
select chunk_id, 'next', document_id, '[1,0,0]' from upload_pipeline.document_chunks
"""

BESIDE_OTHERS = """
insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
select gen_random_uuid(), 'next', gen_random_uuid(), '[1,0,0]' from generate_series(1, %s)
"""
"""In no order, so that reading them one by one reads a block each."""


def blocks(db: Connection, call: str, *arguments: Any) -> int:
    """Blocks that a call touches, those of every statement within it included."""
    plan = value(db, f"explain (analyze, buffers, format json) select * from upload_pipeline.{call}", *arguments)[0]
    node = plan["Plan"]
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def measured(admin: Connection, worker: Connection, user: UUID) -> dict[str, int]:
    """The most that each verb reads in seven calls: a plan may become a generic one at the sixth."""
    worst: dict[str, int] = {}
    for number in range(7):
        texts = [f"text {number * TEXTS + i}" if i % 2 else f"new {uuid4()}" for i in range(TEXTS)]
        lease, chunks = start_job(admin, worker, user, texts)
        held = lease.job_id, lease.lease_token
        counted = {
            "fill": blocks(worker, "fill_vectors(%s, %s, %s, 'b', %s)", *held, MODEL, TEXTS),
            "keep": blocks(
                worker,
                "keep_vectors(%s, %s::uuid[], %s::bytea[], %s, %s::uuid[], %s::bigint[], %s::uuid[], %s::integer[])",
                MODEL,
                [user] * TEXTS,
                [uuid4().bytes * 2 for _ in texts],
                ["[1,2,3]"] * TEXTS,
                [lease.job_id] * TEXTS,
                [lease.lease_token] * TEXTS,
                chunks,
                list(range(1, TEXTS + 1)),
            ),
            "look up": blocks(worker, "cached_vector(%s, %s, sha256('text 77'))", user, MODEL),
            "forget": blocks(worker, "forget_unused_vectors('1 day', 1000)"),
            "forget nothing": blocks(worker, "forget_unused_vectors('100 years', 1000)"),
        }
        release(worker, [lease])
        admin.execute("delete from upload_pipeline.documents where document_id = %s", [lease.document_id])
        worst = {name: max(worst.get(name, 0), count) for name, count in counted.items()}
    return worst


def test_a_commit_takes_named_vectors_by_their_keys_whatever_the_statistics_say(
    admin: Connection, worker: Connection
) -> None:
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'openai', 3)", [MODEL])
    for table in ("embedding_cache", "document_vector_buffer", "document_chunk_buffer", "document_chunks"):
        admin.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
        admin.execute(f"analyze upload_pipeline.{table}")
    worker.execute("set statement_timeout = '30s'")
    admin.execute(ADD, {"heavy": HEAVY, "rows": ROWS})
    worst = 0
    for number in range(7):
        texts = tuple(f"text {number * COMMITTED + i}" for i in range(1, COMMITTED + 1))
        accept(worker, HEAVY, f"{number}".encode())
        lease = claim_one(worker)
        lead(worker, lease, texts, until="embedding")
        assert [text for _, text in fill(worker, lease, limit=COMMITTED)] == [None] * COMMITTED
        advance(worker, lease, "embedding", "embeddings_buffered")
        held = lease.job_id, lease.lease_token
        worst = max(worst, blocks(worker, "commit_embeddings(%s, %s, %s)", *held, MODEL))
    print(worst)
    assert worst <= COMMIT_BOUND


def test_a_commit_looks_for_lacking_vectors_by_keys_however_many_have_come_since_it_was_planned(
    admin: Connection, worker: Connection
) -> None:
    """A session that planned when no vector stood beside a chunk; then a model was filled and activated."""
    set_clock(worker)
    worker.execute("select upload_pipeline.register_model(%s, 'openai', 3)", [MODEL])
    for table in ("chunk_vectors", "document_chunk_buffer", "document_chunks"):
        admin.execute(f"alter table upload_pipeline.{table} set (autovacuum_enabled = off)")
        admin.execute(f"analyze upload_pipeline.{table}")
    texts = tuple(f"text {i}" for i in range(COMMITTED))
    for number in range(7):
        accept(worker, HEAVY, f"{number}".encode())
        lease = claim_one(worker)
        lead(worker, lease, texts)
    worker.execute("select upload_pipeline.add_model('next', 'openai', 3)")
    admin.execute(BESIDE_CHUNKS)
    admin.execute("set session_replication_role = replica")
    admin.execute(BESIDE_OTHERS, [ROWS])
    worker.execute("select upload_pipeline.activate_model('next', '7 days')")
    retry(worker, lease.job_id, "embedding")
    lease = claim_one(worker)
    lead(worker, lease, texts, until="embeddings_buffered", model="next")
    read = blocks(worker, "commit_embeddings(%s, %s, 'next')", lease.job_id, lease.lease_token)
    print(read)
    assert read <= COMMIT_BOUND


def test_what_a_verb_reads_does_not_grow_with_the_cache(admin: Connection, worker: Connection) -> None:
    worker.execute("select upload_pipeline.register_model(%s, 'openai', 3)", [MODEL])
    admin.execute("alter table upload_pipeline.embedding_cache set (autovacuum_enabled = off)")
    admin.execute("analyze upload_pipeline.embedding_cache")  # the statistics of an empty table
    worker.execute("set statement_timeout = '30s'")
    admin.execute(ADD, {"heavy": HEAVY, "rows": ROWS})
    bounds = {"fill": FILL_BOUND, "keep": KEEP_BOUND, "look up": 100, "forget": FORGET_BOUND, "forget nothing": 200}
    for known in ("without statistics", "with statistics"):
        for user in (HEAVY, user_number(16 + 5)):
            figures = measured(admin, worker, user)
            print(known, user, figures)
            assert {name: count for name, count in figures.items() if count > bounds[name]} == {}
        admin.execute("vacuum analyze upload_pipeline.embedding_cache")
