"""Who may do what, read from the catalog: a table, view or function that nobody has thought of here fails a test."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from photo_verbs import add_project, reserve_photo
from sessions import Connection
from verbs import (
    add_document,
    advance_to,
    claim_one,
    enqueue,
    fail,
    user_number,
    value,
)

OWNER, STRANGER = user_number(1), user_number(2)

READERS = {
    "stages": {"authenticated", "upload_worker", "service_role"},
    "embedding_models": {"upload_worker", "service_role"},
    "documents": {"authenticated", "upload_worker", "service_role"},
    "upload_jobs": {"authenticated", "upload_worker", "service_role"},
    "job_outcomes": {"authenticated", "upload_worker", "service_role"},
    "lanes": {"upload_worker", "service_role"},
    "events": {"authenticated", "upload_worker", "service_role"},
    "events_default": set(),
    "document_chunk_buffer": {"upload_worker", "service_role"},
    "document_vector_buffer": {"upload_worker", "service_role"},
    "document_cached_chunks": {"upload_worker", "service_role"},
    "embedding_cache": set(),
    "chunk_vectors": {"upload_worker", "service_role"},
    "model_overview": {"upload_worker", "service_role"},
    "document_chunks": {"authenticated", "upload_worker", "service_role"},
    "document_outline": {"authenticated", "upload_worker", "service_role"},
    "document_nodes": {"authenticated", "upload_worker", "service_role"},
    "document_edges": {"authenticated", "upload_worker", "service_role"},
    "policies": {"authenticated", "upload_worker", "service_role"},
    "workers": {"upload_worker", "service_role"},
    "stage_durations": {"upload_worker", "service_role"},
    "admissions": set(),
    "api_keys": set(),
    "sessions": set(),
    "claimed_documents": set(),
    "processing_records": {"upload_worker", "service_role"},
    "parse_submissions": {"upload_worker", "service_role"},
    "provider_budgets": {"upload_worker", "service_role"},
    "provider_reservations": {"upload_worker", "service_role"},
    "rate_limits": set(),
    "job_watches": set(),
    "batches": {"authenticated", "upload_worker", "service_role"},
    "batch_members": {"authenticated", "upload_worker", "service_role"},
    "batch_overview": {"authenticated", "upload_worker", "service_role"},
    "batch_member_overview": {"authenticated", "upload_worker", "service_role"},
    "job_overview": {"authenticated", "upload_worker", "service_role"},
    "queue_depth": {"authenticated", "upload_worker", "service_role"},
    "usage_records": {"authenticated", "upload_worker", "service_role"},
    "usage_by_user": {"authenticated", "upload_worker", "service_role"},
    "usage_by_day": {"authenticated", "upload_worker", "service_role"},
    "usage_by_model": {"authenticated", "upload_worker", "service_role"},
    "upload_history": {"authenticated", "upload_worker", "service_role"},
    "organizations": {"authenticated", "upload_worker", "service_role"},
    "organization_members": {"authenticated", "upload_worker", "service_role"},
    "projects": {"authenticated", "upload_worker", "service_role"},
    "photos": {"authenticated", "upload_worker", "service_role"},
    "photo_detection_requests": {"upload_worker", "service_role"},
    "upkeep_rounds": {"upload_worker", "service_role"},
    "store_marks": set(),
}
"""Who may read each table and view; the partitions of `events` that a month has made are nobody's."""

SHARED = {"stages"}
"""What a signed-in user reads whole: it tells nothing of anybody."""

BACK_END = {"upload_worker", "service_role"}

CALLERS = {
    **{
        key: set[str]()
        for key in (
            "check_owner",
            "lock_photo_job",
            "note_photo_status",
            "start_photo_deletion",
            "set_detections",
            "detection_results",
            "new_job_id",
            "note_model_change",
            "check_vectors",
            "lacks_vectors",
            "hold_models",
            "pending_chunks",
            "place_vectors",
            "wake_lanes",
            "check_step",
            "prepare_restart",
            "drop_event_partitions",
            "forget_session_document",
            "keep_named_models",
            "job_cost",
            "keep_costs",
            "lock_budget",
            "move_session_documents",
            "move_user_vectors",
            "note_parse",
            "notify_watchers",
            "settle_batch_members",
            "wake_job",
            "lock_awaited",
            "lock_latest_job",
            "check_no_stranger",
            "look_for_upload",
            "resume_upload_job",
            "today",
            "touch_vectors",
        )
    },
    **{
        key: {"authenticated", *BACK_END}
        for key in ("now", "search_chunks", "estimate_jobs", "member_organizations", "photo_progress")
    },
    **dict.fromkeys(
        (
            "accept_document",
            "settle_models",
            "note_model_failure",
            "retire_model",
            "pending_refill",
            "pause_model",
            "enqueue_refills",
            "commit_refill",
            "add_model",
            "activate_model",
            "accept_policy",
            "add_organization",
            "add_project",
            "admit_bytes",
            "announce_photo",
            "advance_job",
            "advance_jobs",
            "announce_submission",
            "announce_upload",
            "applied_migrations",
            "begin_deletion",
            "begin_photo_deletion",
            "begin_photo_expiry",
            "begin_submission",
            "buffer_chunks",
            "buffer_vectors",
            "claim_upkeep",
            "is_store_mark",
            "mark_store",
            "note_upkeep",
            "bytes_at_work",
            "cached_vector",
            "cancel_batch",
            "cancel_job",
            "check_lease",
            "chunk_search_vector",
            "claim_jobs",
            "claim_session",
            "clean_session",
            "commit_chunks",
            "commit_embeddings",
            "commit_markdown",
            "commit_parse",
            "commit_photo_copy",
            "commit_photo_facts",
            "commit_submission",
            "commit_validation",
            "confirm_upload",
            "count_open_jobs",
            "create_api_key",
            "create_batch",
            "enqueue_job",
            "end_session",
            "end_submission_call",
            "enqueue_jobs",
            "ensure_event_partitions",
            "fail_job",
            "fill_vectors",
            "fail_submission",
            "take_abandoned_parses",
            "account_submission",
            "find_api_key",
            "find_session",
            "find_duplicate",
            "finish_deletion",
            "finish_photo_deletion",
            "finish_submission",
            "forget_full_buckets",
            "forget_lost_watches",
            "forget_lost_workers",
            "forget_unused_vectors",
            "forget_user_vectors",
            "freeze_budget",
            "is_photo_refusal",
            "keep_vectors",
            "list_api_keys",
            "max_retries",
            "note_api_key_use",
            "note_batches",
            "note_completed_batches",
            "open_session",
            "pause_provider",
            "photo_priority",
            "photo_status",
            "pending_vectors",
            "pour_buckets",
            "promote_due",
            "reap_expired",
            "record_event",
            "record_fenced_write",
            "record_usage",
            "refresh_stage_durations",
            "register_model",
            "register_worker",
            "leave_pools",
            "release_admission",
            "release_jobs",
            "remove_member",
            "renew_admissions",
            "renew_leases",
            "retry_batch",
            "reserve_calls",
            "reserve_document",
            "reserve_photo",
            "commit_detections",
            "await_detections",
            "answer_detections",
            "retry_delay",
            "retry_job",
            "revoke_api_key",
            "sessions_to_clean",
            "set_lane_cap",
            "set_member",
            "set_project",
            "settle_calls",
            "size_class",
            "snooze_job",
            "store_submission",
            "take_tokens",
            "unfinished_deletions",
            "unfinished_photo_deletions",
            "unregister_worker",
            "unwatch_jobs",
            "wake_parse",
            "watch_jobs",
        ),
        BACK_END,
    ),
}
"""Who may call each function."""

ROLES = ("anon", "authenticated", "upload_worker", "service_role")

UNINDEXED_FOREIGN_KEYS = {
    # stages are a handful of rows that are never deleted, and `stage` in an index would cost every stage change HOT
    ("upload_jobs", ("pipeline", "stage")),
}


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, partition or view of the schema."""

    name: str
    kind: str


def relations(admin: Connection) -> list[Relation]:
    rows = admin.execute(
        """
        select relname, relkind::text from pg_catalog.pg_class
         where relnamespace = 'upload_pipeline'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f') order by 1
        """
    ).fetchall()
    return [Relation(row.relname, row.relkind) for row in rows]


def readers_of(name: str) -> set[str]:
    if re.fullmatch(r"events_\d{4}_\d{2}", name):
        return set()
    assert name in READERS, f"say in READERS who may read {name}"
    return READERS[name]


@pytest.fixture
def filled(admin: Connection, worker: Connection) -> Connection:
    """Every table has rows of OWNER and, where a row has a user, of STRANGER."""
    admin.execute("select upload_pipeline.register_model('m3', 'test', 3), upload_pipeline.add_model('m2', 'test', 2)")
    worker.execute("select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{default}', 1)", [uuid4()])
    worker.execute("select upload_pipeline.claim_upkeep('sweep', interval '1 hour'), upload_pipeline.mark_store(null)")
    admin.execute("insert into upload_pipeline.events_default (at, code) values ('1999-01-01', 'worker_started')")
    admin.execute("insert into upload_pipeline.stage_durations values ('document', 'parsing', 0, 1.5, 3)")
    admin.execute(
        """
        insert into upload_pipeline.processing_records
          (document_id, filename, file_bytes, media_type, uploaded_at, status)
        values (gen_random_uuid(), 'a.txt', 1, 'text/plain', now(), 'completed')
        """
    )
    worker.execute("select * from upload_pipeline.reserve_calls(%s, 'p', repeat('a', 8), 'm', 1, 1)", [uuid4()])
    for user in (OWNER, STRANGER):
        document = add_document(admin, user)
        enqueue(worker, document, user)
        lease = claim_one(worker)
        worker.execute(
            "select * from upload_pipeline.begin_submission(%s, %s, 'p', 't', 'v', '1 s')",
            [lease.job_id, lease.lease_token],
        )
        advance_to(worker, lease, "parsed")
        fail(worker, lease, retryable=False)
        for ordinal, live in enumerate((True, False)):
            admin.execute(
                """
                insert into upload_pipeline.document_chunks
                  (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset,
                   heading_path, section_ids, embed_model, embedding, live)
                values (%s, %s, %s, %s, 'word', repeat('a', 64), 'c', 0, 4, '{}', '{}', 'm3', '[1,0,0]', %s)
                """,
                [uuid4(), document, user, ordinal, live],
            )
        admin.execute(
            "insert into upload_pipeline.policies values (%s, %s, 'insurer', 'product', '2026-01-31')", [document, user]
        )
        used = {"usage_id": str(uuid4()), "user_id": str(user), "provider": "p", "model": "m", "operation": "embed"}
        worker.execute("select upload_pipeline.record_usage(%s)", [json.dumps([used])])
        admin.execute(
            """
            insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding)
            select chunk_id, 'm2', document_id, '[1,0]' from upload_pipeline.document_chunks where document_id = %s
            """,
            [document],
        )
        chunk = uuid4()
        admin.execute(
            """
            insert into upload_pipeline.document_chunk_buffer
              (document_id, ordinal, chunk_id, user_id, text, chunk_sha256, chunker, start_offset, end_offset,
               heading_path, section_ids)
            values (%s, 0, %s, %s, 'word', repeat('a', 64), 'c', 0, 4, '{}', '{}')
            """,
            [document, chunk, user],
        )
        admin.execute(
            "insert into upload_pipeline.document_vector_buffer values (%s, 'm3', %s, '[1,0,0]')", [chunk, document]
        )
        admin.execute(
            """
            insert into upload_pipeline.document_cached_chunks (document_id, embed_model, chunk_ids)
            values (%s, 'm3', %s)
            """,
            [document, [chunk]],
        )
        admin.execute(
            "insert into upload_pipeline.document_outline values (%s, %s, %s, 'document', '', 0, 0, null)",
            [uuid4(), document, user],
        )
    for user in (OWNER, STRANGER):
        enqueue(worker, add_document(admin, user), user)
        members = '[{"ordinal": 0, "filename": "a.txt", "error_code": "EMPTY_FILE", "error_message": "It is empty."}]'
        worker.execute("select upload_pipeline.create_batch(%s, %s, %s)", [uuid4(), user, members])
        photo = reserve_photo(worker, user, add_project(worker, user)).photo_id
        admin.execute(
            """
            insert into upload_pipeline.photo_detection_requests
              (photo_id, delivery_id, attempt, retry_count, lease_token, sent_at, expires_at)
            values (%s, gen_random_uuid(), 1, 0, 1, now(), now())
            """,
            [photo],
        )
        admin.execute(
            "insert into upload_pipeline.embedding_cache values (%s, 'm3', 3, sha256('a'), '2026-01-31', '[1,0,0]')",
            [user],
        )
    return admin


def speak_as(admin: Connection, role: str, user: UUID | None = None) -> None:
    """Until the end of the open transaction."""
    admin.execute(f"set local role {role}")
    admin.execute("select set_config('request.jwt.claims', %s, true)", [f'{{"sub": "{user}"}}' if user else ""])


def seen(admin: Connection, role: str, user: UUID | None, name: str) -> set[Any] | None:
    """The users whose rows are seen; None where reading is refused."""
    column = value(
        admin,
        """
        select count(*) from information_schema.columns
         where table_schema = 'upload_pipeline' and table_name = %s and column_name = 'user_id'
        """,
        name,
    )
    try:
        with admin.transaction(force_rollback=True):
            speak_as(admin, role, user)
            rows = admin.execute(
                f"select {'user_id' if column else 'null'} as user_id from upload_pipeline.{name}"
            ).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return {row.user_id for row in rows}


def test_every_table_has_row_level_security_and_every_view_the_rights_of_its_reader(admin: Connection) -> None:
    bare = admin.execute(
        """
        select relname from pg_catalog.pg_class
         where relnamespace = 'upload_pipeline'::regnamespace
           and case when relkind in ('r', 'p') then not relrowsecurity
                    when relkind = 'v' then not coalesce('security_invoker=true' = any (reloptions), false)
                    else relkind in ('m', 'f') end
        """
    ).fetchall()
    assert bare == []


@pytest.mark.parametrize("role", ROLES)
def test_each_role_reads_what_it_may_and_no_more(filled: Connection, role: str) -> None:
    for relation in relations(filled):
        users = seen(filled, role, OWNER if role == "authenticated" else None, relation.name)
        if role not in readers_of(relation.name):
            assert users is None, relation.name
        elif role == "authenticated" and relation.name not in SHARED:
            # views without a user's column show what the tables below them let through
            assert users in ({OWNER}, {None}), relation.name
        else:
            assert users, relation.name
            assert users == {None} or {OWNER, STRANGER} <= users, relation.name


def test_a_signed_in_user_sees_nobody_elses_rows(filled: Connection) -> None:
    newcomer = user_number(3)
    for relation in relations(filled):
        if "authenticated" in readers_of(relation.name) - SHARED and relation.name not in SHARED:
            assert seen(filled, "authenticated", newcomer, relation.name) == set(), relation.name
            assert seen(filled, "authenticated", None, relation.name) == set(), relation.name


def test_a_view_counts_the_readers_own_jobs_only(filled: Connection, worker: Connection) -> None:
    for _ in range(2):
        enqueue(worker, add_document(filled, STRANGER), STRANGER)
    with filled.transaction(force_rollback=True):
        speak_as(filled, "authenticated", OWNER)
        assert value(filled, "select sum(jobs)::integer from upload_pipeline.queue_depth") == 2
    assert value(worker, "select sum(jobs)::integer from upload_pipeline.queue_depth") == 6


def test_chunks_that_are_not_live_and_documents_under_deletion_are_hidden_from_their_owner(filled: Connection) -> None:
    def count(table: str) -> int:
        with filled.transaction(force_rollback=True):
            speak_as(filled, "authenticated", OWNER)
            return int(value(filled, f"select count(*) from upload_pipeline.{table}"))

    assert count("document_chunks") == 1
    assert (count("documents"), count("photos"), count("job_overview")) == (2, 1, 3)
    filled.execute("update upload_pipeline.documents set deleted_at = now()")
    assert (count("documents"), count("photos"), count("job_overview")) == (0, 1, 1)
    filled.execute("update upload_pipeline.photos set deleted_at = now()")
    assert (count("documents"), count("photos"), count("job_overview")) == (0, 0, 0)


@pytest.mark.parametrize("role", ROLES)
def test_nobody_who_logs_in_writes_a_table(admin: Connection, role: str) -> None:
    for relation in relations(admin):
        for privilege in ("insert", "update", "delete", "truncate", "references", "trigger"):
            granted = value(
                admin, "select has_table_privilege(%s, %s, %s)", role, f"upload_pipeline.{relation.name}", privilege
            )
            assert not granted, (relation.name, privilege)
        columns = value(
            admin,
            "select has_any_column_privilege(%s, %s, 'insert, update, references')",
            role,
            f"upload_pipeline.{relation.name}",
        )
        assert not columns, relation.name


@pytest.mark.parametrize("role", ROLES)
def test_no_sequence_is_anybodys(admin: Connection, role: str) -> None:
    rows = admin.execute(
        "select oid::regclass::text as name from pg_catalog.pg_class "
        "where relnamespace = 'upload_pipeline'::regnamespace and relkind = 'S'"
    ).fetchall()
    assert len(rows) >= 2
    for row in rows:
        assert not value(admin, "select has_sequence_privilege(%s, %s, 'usage, select, update')", role, row.name)


def test_nobody_creates_in_the_schema_and_anon_does_not_enter_it(admin: Connection) -> None:
    entered = {
        role: value(admin, "select has_schema_privilege(%s, 'upload_pipeline', 'usage')", role) for role in ROLES
    }
    assert entered == {"anon": False, "authenticated": True, "upload_worker": True, "service_role": True}
    for role in ROLES:
        assert not value(admin, "select has_schema_privilege(%s, 'upload_pipeline', 'create')", role)


def test_the_workers_role_has_no_rights_beyond_its_grants(admin: Connection) -> None:
    row = admin.execute(
        """
        select rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication, rolinherit
          from pg_catalog.pg_roles where rolname = 'upload_worker'
        """
    ).fetchone()
    assert tuple(row) == (False,) * 6  # type: ignore[arg-type]


def test_each_function_is_called_by_whom_it_may_be(admin: Connection) -> None:
    rows = admin.execute(
        """
        select oid, proname from pg_catalog.pg_proc where pronamespace = 'upload_pipeline'::regnamespace
        """
    ).fetchall()
    assert {row.proname for row in rows} == set(CALLERS), "say in CALLERS who may call it"
    for row in rows:
        callers = {
            role for role in ROLES if value(admin, "select has_function_privilege(%s, %s, 'execute')", role, row.oid)
        }
        assert callers == CALLERS[row.proname], row.proname


def test_every_function_names_its_own_search_path_and_none_is_the_publics(admin: Connection) -> None:
    rows = admin.execute(
        """
        select proname from pg_catalog.pg_proc
         where pronamespace = 'upload_pipeline'::regnamespace
           and (not coalesce('search_path=""' = any (proconfig), false)
                or exists (select from aclexplode(coalesce(proacl, acldefault('f', proowner))) where grantee = 0))
        """
    ).fetchall()
    assert rows == []


def test_calling_a_verb_as_a_user_is_refused(admin: Connection) -> None:
    for role in ("anon", "authenticated"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), admin.transaction():  # noqa: PT012
            speak_as(admin, role, OWNER)
            admin.execute("select * from upload_pipeline.claim_jobs(%s, 'default', 1)", [uuid4()])


def test_a_workers_hands_are_off_the_tables(filled: Connection, worker: Connection) -> None:
    for statement in (
        "update upload_pipeline.upload_jobs set state = 'queued'",
        "delete from upload_pipeline.events",
        "insert into upload_pipeline.lanes values ('default', gen_random_uuid())",
        "select from upload_pipeline.upload_jobs for update",
        "select upload_pipeline.wake_lanes('default', '{}')",
        "select upload_pipeline.drop_event_partitions(now())",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            worker.execute(statement)


def test_every_foreign_key_is_the_beginning_of_an_index(admin: Connection) -> None:
    rows = admin.execute(
        """
        select c.relname::text as name, k.conkey,
               array(select a.attname::text from unnest(k.conkey) with ordinality u (attnum, place)
                       join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.attnum
                      order by u.place) as columns
          from pg_catalog.pg_constraint k join pg_catalog.pg_class c on c.oid = k.conrelid
         where k.connamespace = 'upload_pipeline'::regnamespace and k.contype = 'f'
           -- a partial index serves where all that it leaves out are rows whose key is null; the first column leads,
           -- and is itself a whole key or nearly one
           and not exists (
             select from pg_catalog.pg_index i
              where i.indrelid = k.conrelid and i.indkey[0] = k.conkey[1]
                and (i.indpred is null or pg_get_expr(i.indpred, i.indrelid) = format('(%I IS NOT NULL)',
                     (select attname from pg_catalog.pg_attribute
                       where attrelid = k.conrelid and attnum = k.conkey[1]))))
        """
    ).fetchall()
    assert {(row.name, tuple(row.columns)) for row in rows} == UNINDEXED_FOREIGN_KEYS


# search: the caller is who the token says, and nothing widens what is searched


def search(
    admin: Connection,
    user: UUID | None,
    documents: list[UUID] | None = None,
    filter_: str | None = None,
    mode: str = "hybrid",
) -> set[UUID]:
    with admin.transaction(force_rollback=True):
        speak_as(admin, "authenticated", user)
        rows = admin.execute(
            """
            select document_id from upload_pipeline.search_chunks(
              'word', '[1,0,0]', 'm3', 100, %s, %s::uuid[], %s::jsonb)
            """,
            [mode, documents, filter_],
        ).fetchall()
    return {row.document_id for row in rows}


def test_a_search_finds_only_the_callers_documents_whatever_is_asked(filled: Connection) -> None:
    rows = filled.execute("select document_id, user_id from upload_pipeline.documents").fetchall()
    mine = {
        row.document_id
        for row in filled.execute(
            "select distinct document_id from upload_pipeline.document_chunks where user_id = %s", [OWNER]
        ).fetchall()
    }
    assert len(mine) == 1
    everything = [row.document_id for row in rows]
    for mode in ("hybrid", "vector", "text"):
        assert search(filled, OWNER, mode=mode) == mine
        assert search(filled, OWNER, everything, mode=mode) == mine
        assert search(filled, OWNER, [row.document_id for row in rows if row.user_id == STRANGER], mode=mode) == set()
        assert search(filled, OWNER, filter_="{}", mode=mode) == mine
        assert search(filled, user_number(3), everything, mode=mode) == set()


def test_a_search_by_nobody_is_refused(filled: Connection) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="signed-in"):
        search(filled, None)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), filled.transaction():  # noqa: PT012
        speak_as(filled, "anon", OWNER)
        filled.execute("select * from upload_pipeline.search_chunks('word', '[1,0,0]', 'm3')")
