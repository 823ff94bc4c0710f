"""Batches against a model of them: whatever becomes of jobs and documents, the counts add up and are the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from batch_members import counts, failures, file_member, finish_job, make_batch, note, refused_member
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sessions import Connection
from verbs import cancel, claim, fail, promote, release, retry, set_clock, value

USER = UUID(int=(7 << 64) + 1)
CONTENTS = st.lists(st.integers(-1, 5), min_size=1, max_size=4)
"""A number for each file's bytes; a negative one for a file that was refused."""
LIVE = ("queued", "working", "retryable")


@dataclass
class Document:
    """What the model knows of a document with its job; `state` is the job's, kept when both are gone."""

    document_id: UUID
    job_id: UUID
    state: str = "queued"
    phase: str = "there"  # then "hidden", then "gone"


@dataclass
class Batch:
    """A batch: each member is a document, the first of its batch to be that, or the code of its refusal."""

    batch_id: UUID
    members: list[Document | str]
    owned: list[Document]
    noted: int = 0
    open_to_note: bool = True

    def outcome(self, member: Document | str) -> str:
        if isinstance(member, str):
            return "failed"
        if member.state in LIVE:
            return "open"
        return "processed" if member.state == "done" else "failed"

    def counts(self) -> tuple[int, int, int, str]:
        outcomes = [self.outcome(member) for member in self.members]
        processed, failed, still = (outcomes.count(kind) for kind in ("processed", "failed", "open"))
        ended = "completed" if not failed else "partial_failure" if processed else "failed"
        return processed, failed, still, "in_progress" if still else ended


@dataclass
class World:
    """The model of one user's batches."""

    documents: dict[int, Document] = field(default_factory=dict)
    gone: list[Document] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    leases: dict[UUID, Any] = field(default_factory=dict)
    clock: float = 0
    events: int = 0


def make_machine(admin: Connection, db: Connection) -> type[RuleBasedStateMachine]:
    class Batches(RuleBasedStateMachine):
        @initialize(contents=CONTENTS)
        def begin(self, contents: list[int]) -> None:
            for table in ("documents", "batches", "lanes", "events"):
                admin.execute(f"delete from upload_pipeline.{table}")
            db.execute("select upload_pipeline.set_lane_cap(%s, 'default', 3)", [USER])
            self.world = World()
            for connection in (admin, db):
                set_clock(connection)
            self.make(contents)

        @rule(contents=CONTENTS)
        def send(self, contents: list[int]) -> None:
            self.make(contents)

        def make(self, contents: list[int]) -> None:
            batch = uuid4()
            asked = [
                refused_member(n) if content < 0 else file_member(USER, n, bytes([content]))
                for n, content in enumerate(contents)
            ]
            made = make_batch(db, USER, asked, batch)
            members: list[Document | str] = []
            owned = []
            for content, row in zip(contents, made, strict=True):
                known = self.world.documents.get(content)
                if content < 0:
                    members.append("EMPTY_FILE")
                elif known is None:
                    assert (row.duplicate, row.error_code) == (False, None)
                    self.world.documents[content] = Document(row.document_id, row.job_id)
                    members.append(self.world.documents[content])
                    owned.append(self.world.documents[content])
                elif known.phase == "hidden":
                    assert row.error_code == "INVALID_STATE"
                    members.append("INVALID_STATE")
                else:
                    assert (row.duplicate, row.job_id) == (True, known.job_id)
                    members.append(known)
            self.world.batches.append(Batch(batch, members, owned))

        def one_of(self, draw: Any, *states: str, phases: tuple[str, ...] = ("there",)) -> Document | None:
            found = [one for one in self.world.documents.values() if one.state in states and one.phase in phases]
            return draw.choice(found) if found else None

        @rule(limit=st.integers(1, 3))
        def take_up(self, limit: int) -> None:
            by_job = {one.job_id: one for one in self.world.documents.values()}
            for lease in claim(db, limit=limit, ttl="1 day"):
                by_job[lease.job_id].state = "working"
                self.world.leases[lease.job_id] = lease

        @rule(
            draw=st.randoms(use_true_random=False), how=st.sampled_from(["done", "deadletter", "retryable", "queued"])
        )
        def end_work(self, draw: Any, how: str) -> None:
            one = self.one_of(draw, "working")
            if one is None:
                return
            lease = self.world.leases.pop(one.job_id)
            wanted = value(db, "select cancel_requested from upload_pipeline.upload_jobs where job_id = %s", one.job_id)
            if how == "done":
                finish_job(admin, lease)
            elif how == "queued":
                release(db, [lease])
            else:
                fail(db, lease, retryable=how == "retryable")
            one.state = "cancelled" if wanted and how != "done" else how

        @rule(draw=st.randoms(use_true_random=False))
        def stop_one(self, draw: Any) -> None:
            one = self.one_of(draw, *LIVE)
            if one is not None:
                cancel(db, one.job_id)
                one.state = one.state if one.state == "working" else "cancelled"

        @rule(draw=st.randoms(use_true_random=False))
        def restart_one(self, draw: Any) -> None:
            one = self.one_of(draw, "deadletter", "cancelled")
            if one is not None:
                retry(db, one.job_id)
                one.state = "queued"

        @rule()
        def time_passes(self) -> None:
            self.world.clock += 100
            for connection in (admin, db):
                set_clock(connection, self.world.clock)
            promote(db)
            for one in self.world.documents.values():
                one.state = "queued" if one.state == "retryable" else one.state

        @rule(draw=st.randoms(use_true_random=False))
        def hide(self, draw: Any) -> None:
            one = self.one_of(draw, *LIVE, "done", "deadletter", "cancelled")
            if one is not None:
                db.execute("select * from upload_pipeline.begin_deletion(%s)", [one.document_id])
                one.phase = "hidden"
                one.state = "cancelled" if one.state in LIVE else one.state
                self.world.leases.pop(one.job_id, None)

        @rule()
        def remove_hidden(self) -> None:
            for content, one in list(self.world.documents.items()):
                if one.phase == "hidden":
                    assert value(db, "select upload_pipeline.finish_deletion(%s)", one.document_id)
                    one.phase = "gone"
                    del self.world.documents[content]

        @rule(draw=st.randoms(use_true_random=False))
        def retry_all(self, draw: Any) -> None:
            if not self.world.batches:
                return
            batch = draw.choice(self.world.batches)
            rows = db.execute("select * from upload_pipeline.retry_batch(%s)", [batch.batch_id]).fetchall()
            failed = [n for n, member in enumerate(batch.members) if batch.outcome(member) == "failed"]
            assert [row.ordinal for row in rows] == failed
            for row in rows:
                member = batch.members[row.ordinal]
                assert row.retried == (isinstance(member, Document) and member.phase == "there")
            for row in rows:
                member = batch.members[row.ordinal]
                if row.retried and isinstance(member, Document):
                    member.state = "queued"
            batch.open_to_note = batch.open_to_note or any(row.retried for row in rows)

        @rule(draw=st.randoms(use_true_random=False))
        def stop_all(self, draw: Any) -> None:
            if not self.world.batches:
                return
            batch = draw.choice(self.world.batches)
            db.execute("select * from upload_pipeline.cancel_batch(%s)", [batch.batch_id])
            for one in batch.owned:
                one.state = "cancelled" if one.state in ("queued", "retryable") else one.state

        @rule()
        def look(self) -> None:
            expected = {b.batch_id for b in self.world.batches if b.open_to_note and b.counts()[2] == 0}
            noted = note(db)
            assert {row.batch_id for row in noted} == expected
            for batch in self.world.batches:
                batch.open_to_note = batch.open_to_note and batch.batch_id not in expected
            self.world.events += len(noted)

        @invariant()
        def both_are_the_same(self) -> None:
            world = getattr(self, "world", None)
            if world is None:
                return
            for batch in world.batches:
                assert counts(db, batch.batch_id) == batch.counts()
                failed = [n for n, member in enumerate(batch.members) if batch.outcome(member) == "failed"]
                assert sorted(failures(db, batch.batch_id)) == failed
            written = value(db, "select count(*) from upload_pipeline.events where code = 'batch_completed'")
            assert written == world.events

    return Batches


def test_batches_do_as_their_model_does(admin: Connection, worker: Connection) -> None:
    run_state_machine_as_test(
        make_machine(admin, worker),
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
