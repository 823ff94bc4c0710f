"""Sessions against a model: whatever is uploaded, claimed, ended and cleaned, every document is whose it should be.

What is gone has left its record, and nobody's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from session_verbs import (
    claim_session,
    clean_sessions,
    digest,
    end_session,
    find_session,
    finish_deletions,
    open_session,
    upload,
)
from sessions import Connection
from verbs import advance_to, claim, fail, set_clock, user_number, value

from upload_pipeline import ids

USERS = [user_number(number) for number in (1, 2)]
HOUR = 3600
LIFE, GRACE = 30 * 24 * HOUR, 24 * HOUR


@dataclass
class Document:
    """What the model knows of a document."""

    document_id: UUID
    job_id: UUID
    owner: UUID
    content: str
    state: str = "queued"
    hidden: bool = False


@dataclass
class Session:
    """What the model knows of a session; times in seconds."""

    token: str
    user: UUID
    seen: float
    expires: float
    claimed_by: UUID | None = None
    over: float | None = None
    moved: set[UUID] = field(default_factory=set)
    given_up: dict[UUID, UUID] = field(default_factory=dict)

    def alive(self, now: float) -> bool:
        return self.claimed_by is None and self.over is None and self.expires > now


@dataclass
class World:
    """The model of all sessions and documents."""

    clock: float = 0
    sessions: list[Session] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    records: dict[UUID, str] = field(default_factory=dict)
    leases: dict[UUID, Any] = field(default_factory=dict)

    def of(self, owner: UUID, content: str) -> Document | None:
        return next((one for one in self.documents if (one.owner, one.content) == (owner, content)), None)

    def move(self, session: Session) -> None:
        """What claim_session does with the documents that the session has now."""
        assert session.claimed_by is not None
        for one in [one for one in self.documents if one.owner == session.user and not one.hidden]:
            existing = self.of(session.claimed_by, one.content)
            if existing is None:
                one.owner = session.claimed_by
                session.moved.add(one.document_id)
            elif not existing.hidden:
                session.given_up[one.document_id] = existing.document_id
                self.hide(one)

    def hide(self, one: Document) -> None:
        one.hidden = True
        if one.state in ("queued", "working"):
            one.state = "cancelled"
        self.leases.pop(one.job_id, None)


def make_machine(admin: Connection, db: Connection) -> type[RuleBasedStateMachine]:
    class Sessions(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            for table in ("documents", "sessions", "lanes", "events", "processing_records"):
                admin.execute(f"delete from upload_pipeline.{table}")
            self.world = World()
            set_clock(db)
            self.tokens = 0
            # a beginning that leaves every rule something to do
            for number, contents in enumerate(("ab", "bc", "")):
                self.open()
                for content in contents:
                    self.send(pick=len(USERS) + number, content=content, late=False)
            self.send(pick=0, content="b", late=False)

        def one(self, pick: int) -> Session:
            return self.world.sessions[pick % len(self.world.sessions)]

        @rule()
        def open(self) -> None:
            self.tokens += 1
            made = open_session(db, str(self.tokens))
            # whose turn it is follows the order of users, and an example must go the same way each time
            user = user_number(100 + self.tokens)
            admin.execute(
                "update upload_pipeline.sessions set user_id = %s where session_id = %s", [user, made.session_id]
            )
            now = self.world.clock
            self.world.sessions.append(Session(str(self.tokens), user, now, now + LIFE))

        @precondition(lambda self: self.world.sessions)
        @rule(pick=st.integers(0, 1000))
        def use(self, pick: int) -> None:
            session = self.one(pick)
            now = self.world.clock
            found = find_session(db, session.token)
            if not session.alive(now):
                assert found is None
                return
            slides = session.seen < now - HOUR
            assert (found.user_id, found.slid) == (session.user, slides)
            if slides:
                session.seen, session.expires = now, now + LIFE

        @rule(pick=st.integers(0, 1000), content=st.sampled_from("abc"), late=st.booleans())
        def send(self, pick: int, content: str, late: bool) -> None:
            """By a session, by one that has been claimed since the request began, or by a user."""
            owners = USERS + [
                session.user
                for session in self.world.sessions
                if session.alive(self.world.clock) or (late and session.claimed_by is not None)
            ]
            owner = owners[pick % len(owners)]
            known = self.world.of(owner, content)
            if known is not None and known.hidden:
                with pytest.raises(psycopg.Error, match="being deleted"):
                    upload(db, owner, content)
                return
            document = ids.document_id(owner, digest(content))
            if known is None and any(one.document_id == document for one in self.world.documents):
                # it was the session's, and is a user's since
                with pytest.raises(psycopg.Error) as refused:
                    upload(db, owner, content)
                assert refused.value.sqlstate == "UP003"
                return
            made = upload(db, owner, content)
            assert made.duplicate == (known is not None)
            if known is None:
                self.world.documents.append(Document(made.document_id, made.job_id, owner, content))

        @precondition(lambda self: any(one.state == "queued" for one in self.world.documents))
        @rule(limit=st.integers(1, 3))
        def take_up(self, limit: int) -> None:
            by_job = {one.job_id: one for one in self.world.documents}
            for lease in claim(db, limit=limit, ttl="10 years"):
                assert lease.user_id == by_job[lease.job_id].owner
                by_job[lease.job_id].state = "working"
                self.world.leases[lease.job_id] = lease

        @precondition(lambda self: self.world.leases)
        @rule(pick=st.integers(0, 1000), well=st.booleans())
        def end_work(self, pick: int, well: bool) -> None:
            working = [one for one in self.world.documents if one.job_id in self.world.leases]
            one = working[pick % len(working)]
            lease = self.world.leases.pop(one.job_id)
            if well:
                advance_to(db, lease, "embedded")
            else:
                fail(db, lease, retryable=False)
            one.state = "done" if well else "deadletter"

        @precondition(lambda self: self.world.sessions)
        @rule(pick=st.integers(0, 1000))
        def end(self, pick: int) -> None:
            session = self.one(pick)
            assert end_session(db, session.token) == session.alive(self.world.clock)
            if session.alive(self.world.clock):
                session.over = self.world.clock

        @precondition(lambda self: self.world.sessions)
        @rule(pick=st.integers(0, 1000), user=st.sampled_from(USERS))
        def take_over(self, pick: int, user: UUID) -> None:
            session = self.one(pick)
            if not session.alive(self.world.clock) and session.claimed_by != user:
                with pytest.raises(psycopg.Error) as refused:
                    claim_session(db, session.token, user)
                assert refused.value.sqlstate == ("UP002" if session.claimed_by is None else "UP003")
                return
            if session.claimed_by is None:
                session.claimed_by, session.over = user, self.world.clock
            self.world.move(session)
            told = claim_session(db, session.token, user)
            assert set(told.documents) == session.moved
            assert dict(zip(told.duplicates, told.existing_documents, strict=True)) == session.given_up
            left = [one for one in self.world.documents if one.owner == session.user and not one.hidden]
            assert told.remaining == len(left)

        @rule(pick=st.integers(0, 1000))
        def delete(self, pick: int) -> None:
            shown = [one for one in self.world.documents if not one.hidden]
            if shown:
                one = shown[pick % len(shown)]
                db.execute("select * from upload_pipeline.begin_deletion(%s)", [one.document_id])
                self.world.hide(one)

        @precondition(lambda self: any(one.hidden for one in self.world.documents))
        @rule()
        def remove_hidden(self) -> None:
            assert finish_deletions(db) == sum(one.hidden for one in self.world.documents)
            self.world.documents = [one for one in self.world.documents if not one.hidden]

        @rule(seconds=st.sampled_from([HOUR, HOUR + 1, 2 * HOUR, GRACE + 1, LIFE]))
        def time_passes(self, seconds: int) -> None:
            self.world.clock += seconds
            set_clock(db, self.world.clock)

        @rule()
        def clean(self) -> None:
            removed = begun = 0
            for session in list(self.world.sessions):
                over = session.expires if session.over is None else min(session.over, session.expires)
                if session.claimed_by is not None:
                    self.world.move(session)
                if over >= self.world.clock - GRACE:
                    continue
                if session.claimed_by is None:
                    for one in self.world.documents:
                        if one.owner == session.user and not one.hidden:
                            self.world.hide(one)
                            status = "completed" if one.state == "done" else "failed"
                            self.world.records[one.document_id] = status
                            begun += 1
                if not any(one.owner == session.user for one in self.world.documents):
                    self.world.sessions.remove(session)
                    removed += 1
            assert clean_sessions(db) == (removed, begun)

        @invariant()
        def both_are_the_same(self) -> None:
            world = getattr(self, "world", None)
            if world is None:
                return
            rows = admin.execute(
                """
                select d.document_id, d.user_id, j.user_id as worked_for, j.state,
                       d.deleted_at is not null as hidden
                  from upload_pipeline.documents d join upload_pipeline.upload_jobs j using (document_id)
                """
            ).fetchall()
            assert {tuple(row) for row in rows} == {
                (one.document_id, one.owner, one.owner, one.state, one.hidden) for one in world.documents
            }
            kept = admin.execute("select document_id, status from upload_pipeline.processing_records").fetchall()
            assert {row.document_id: row.status for row in kept} == world.records
            assert value(admin, "select count(*) from upload_pipeline.sessions") == len(world.sessions)
            stranded = value(
                admin,
                """
                select count(*) from upload_pipeline.upload_jobs j
                  left join upload_pipeline.lanes l using (pool, user_id)
                 where j.state = 'queued' and l.ready is not true
                """,
            )
            assert stranded == 0
            # nobody is named but users and sessions that there are
            known = [*USERS, *(session.user for session in world.sessions)]
            for table in ("events", "lanes", "job_outcomes"):
                named = value(admin, f"select count(*) from upload_pipeline.{table} where not user_id = any(%s)", known)
                assert named == 0, table

    return Sessions


def test_sessions_do_as_their_model_does(admin: Connection, worker: Connection) -> None:
    run_state_machine_as_test(
        make_machine(admin, worker),
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
