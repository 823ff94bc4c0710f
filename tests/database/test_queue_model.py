"""The queue against a model of it: whatever is asked in whatever order, both end the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sessions import Connection
from verbs import (
    add_document,
    advance_many,
    cancel,
    claim,
    enqueue,
    fail,
    promote,
    reap,
    release,
    renew,
    retry,
    set_clock,
    snooze,
    user_number,
    value,
)

PATH = ("todo", "half", "finished")
CAP = 2
TTL = 60
LIVE = ("queued", "working", "retryable")
USERS = [user_number(i) for i in (1, 2, 3)]


@dataclass
class Job:
    """What the model knows of a job."""

    job_id: UUID
    document: UUID
    user: UUID
    priority: int
    age: int
    stage: str = "todo"
    state: str = "queued"
    retries: int = 0
    token: int = 0
    wanted_cancel: bool = False
    run_at: float = 0
    lease_ends: float = 0
    events: int = 1

    def become(self, state: str) -> None:
        """One transition, so one event."""
        self.state = state
        self.events += 1


@dataclass(frozen=True)
class Held:
    """A lease as its worker remembers it, perhaps long after it was lost."""

    job_id: UUID
    lease_token: int


@dataclass
class World:
    """The model of one queue.

    Attributes:
        failures: what the failure of each lease that failed was answered with.
    """

    clock: float = 0
    jobs: dict[UUID, Job] = field(default_factory=dict)
    failures: dict[Held, Any] = field(default_factory=dict)

    def holds(self, lease: Held) -> Job | None:
        """The job, where this lease is still good."""
        job = self.jobs[lease.job_id]
        return job if job.state == "working" and job.token == lease.lease_token else None

    def give_up(self, job: Job) -> None:
        """One attempt more has failed."""
        if job.wanted_cancel:
            job.become("cancelled")
        elif job.retries < 3:
            job.run_at = self.clock + 3 * 2**job.retries
            job.retries += 1
            job.become("retryable")
        else:
            job.become("deadletter")

    def next_claims(self, limit: int, after: UUID | None) -> list[Job]:
        """What a claim should take, in order."""
        ready: dict[UUID, list[Job]] = {}
        for job in self.jobs.values():
            if job.state == "queued":
                ready.setdefault(job.user, []).append(job)
        room = {
            user: CAP - sum(1 for job in self.jobs.values() if job.user == user and job.state == "working")
            for user in ready
        }
        turn = sorted(
            (user for user in ready if room[user] > 0), key=lambda user: (after is not None and user <= after, user)
        )
        turn = turn[:limit]
        taken: list[Job] = []
        for place, user in enumerate(turn, start=1):
            share = limit // len(turn) + (1 if place <= limit % len(turn) else 0)
            heads = sorted(ready[user], key=lambda job: (-job.priority, job.age))
            taken += heads[: min(share, room[user])]
        return taken


def make_machine(admin: Connection, db: Connection) -> type[RuleBasedStateMachine]:
    class Queue(RuleBasedStateMachine):
        leases = Bundle("leases")

        @initialize()
        def begin(self) -> None:
            admin.execute("delete from upload_pipeline.documents")
            admin.execute("delete from upload_pipeline.lanes")
            self.world = World()
            set_clock(db)

        @rule(user=st.sampled_from(USERS), priority=st.integers(-1, 1), count=st.integers(1, 3))
        def enqueue_new(self, user: UUID, priority: int, count: int) -> None:
            for _ in range(count):
                document = add_document(admin, user)
                job = enqueue(db, document, user, priority, "tiny")
                self.world.jobs[job] = Job(job, document, user, priority, len(self.world.jobs))

        @rule(draw=st.randoms(use_true_random=False))
        def enqueue_known(self, draw: Any) -> None:
            if not self.world.jobs:
                return
            known = draw.choice(list(self.world.jobs.values()))
            siblings = [job for job in self.world.jobs.values() if job.document == known.document]
            live = [job for job in siblings if job.state in LIVE]
            job = enqueue(db, known.document, known.user, 0, "tiny")
            if live:
                assert job == live[0].job_id
            else:
                assert job not in self.world.jobs
                self.world.jobs[job] = Job(job, known.document, known.user, 0, len(self.world.jobs))

        @rule(target=leases, limit=st.integers(1, 4), after=st.sampled_from([None, *USERS]))
        def claim_some(self, limit: int, after: UUID | None) -> Any:
            expected = self.world.next_claims(limit, after)
            got = claim(db, limit=limit, after=after, ttl=f"{TTL} seconds")
            assert [lease.job_id for lease in got] == [job.job_id for job in expected]
            for job in expected:
                job.token += 1
                job.lease_ends = self.world.clock + TTL
                job.become("working")
            return [Held(lease.job_id, lease.lease_token) for lease in got]

        @rule(group=leases)
        def renew_group(self, group: list[Held]) -> None:
            good = [job for lease in group if (job := self.world.holds(lease))]
            assert renew(db, group) == {job.job_id: job.wanted_cancel for job in good}
            for job in good:
                job.lease_ends = self.world.clock + TTL

        @rule(group=leases, keep=st.booleans())
        def advance_group(self, group: list[Held], keep: bool) -> None:
            good = [(lease, job) for lease in group if (job := self.world.holds(lease))]
            stale = [lease for lease in group if not self.world.holds(lease)]
            moves = [(x.job_id, x.lease_token, job.stage, PATH[PATH.index(job.stage) + 1], keep) for x, job in good]
            moves += [(x.job_id, x.lease_token - 1, "todo", "half", keep) for x in stale]
            answers = advance_many(db, moves)
            assert set(answers) == {job.job_id for _, job in good}
            for _, job in good:
                job.stage = PATH[PATH.index(job.stage) + 1]
                job.retries = 0
                job.lease_ends = self.world.clock + TTL
                job.become(
                    "done"
                    if job.stage == "finished"
                    else "cancelled"
                    if job.wanted_cancel
                    else "working"
                    if keep
                    else "queued"
                )
                assert answers[job.job_id].state == job.state

        @rule(group=leases, retryable=st.booleans())
        def fail_first(self, group: list[Held], retryable: bool) -> None:
            for lease in group[:1]:
                job = self.world.holds(lease)
                if job is None and lease in self.world.failures:
                    assert fail(db, lease, retryable) == self.world.failures[lease]
                    continue
                if job is None:
                    with pytest.raises(psycopg.Error) as error:
                        fail(db, lease, retryable)
                    assert error.value.sqlstate == "UP001"
                    continue
                answer = self.world.failures[lease] = fail(db, lease, retryable)
                if retryable:
                    self.world.give_up(job)
                else:
                    job.become("cancelled" if job.wanted_cancel else "deadletter")
                assert (answer.state, answer.retry_count) == (job.state, job.retries)

        @rule(group=leases, delay=st.integers(0, 20))
        def snooze_first(self, group: list[Held], delay: int) -> None:
            for lease in group[:1]:
                job = self.world.holds(lease)
                if job is None:
                    with pytest.raises(psycopg.Error) as error:
                        snooze(db, lease)
                    assert error.value.sqlstate == "UP001"
                    continue
                snooze(db, lease, f"{delay} seconds")
                job.run_at = self.world.clock + delay
                job.become("cancelled" if job.wanted_cancel else "retryable")

        @rule(group=consumes(leases))
        def release_group(self, group: list[Held]) -> None:
            good = [job for lease in group if (job := self.world.holds(lease))]
            answers = release(db, group)
            for job in good:
                job.become("cancelled" if job.wanted_cancel else "queued")
            assert answers == {job.job_id: job.state for job in good}

        @rule(draw=st.randoms(use_true_random=False))
        def cancel_one(self, draw: Any) -> None:
            if not self.world.jobs:
                return
            job = draw.choice(list(self.world.jobs.values()))
            if job.state in LIVE and not job.wanted_cancel:
                job.wanted_cancel = True
                job.become("working" if job.state == "working" else "cancelled")
            assert cancel(db, job.job_id).state == job.state

        @rule(draw=st.randoms(use_true_random=False), force=st.booleans())
        def retry_one(self, draw: Any, force: bool) -> None:
            if not self.world.jobs:
                return
            job = draw.choice(list(self.world.jobs.values()))
            stage = draw.choice([None, *PATH])
            rival = any(
                o.document == job.document and o is not job and o.state in LIVE for o in self.world.jobs.values()
            )
            startable = force or job.state in ("deadletter", "cancelled") or (job.state == "done" and stage)
            target = stage or job.stage
            if not startable or target == "finished" or PATH.index(target) > PATH.index(job.stage) or rival:
                with pytest.raises(psycopg.Error) as error:
                    retry(db, job.job_id, stage, force)
                assert error.value.sqlstate in ("UP003", "UP004")
                return
            retry(db, job.job_id, stage, force)
            job.stage, job.retries, job.wanted_cancel = target, 0, False
            job.token += 1
            job.become("queued")

        @rule(seconds=st.sampled_from([1, 3, 6, 12, 30, 61]))
        def time_passes(self, seconds: int) -> None:
            self.world.clock += seconds
            set_clock(db, self.world.clock)

        @rule()
        def promote_all(self) -> None:
            due = [
                job for job in self.world.jobs.values() if job.state == "retryable" and job.run_at <= self.world.clock
            ]
            assert promote(db) == len(due)
            for job in due:
                job.become("queued")

        @rule()
        def reap_all(self) -> None:
            db.execute("set upload_pipeline.backoff_base = '0 seconds'")  # its jitter is drawn, and not for a model
            dead = [
                job for job in self.world.jobs.values() if job.state == "working" and job.lease_ends < self.world.clock
            ]
            assert reap(db) == len(dead)
            db.execute("reset upload_pipeline.backoff_base")
            for job in dead:
                self.world.give_up(job)
                job.run_at = self.world.clock

        @invariant()
        def both_are_the_same(self) -> None:
            world = getattr(self, "world", None)
            if world is None:
                return
            rows = db.execute(
                """
                select j.job_id, j.stage, j.state, j.retry_count, j.lease_token, j.cancel_requested,
                       (select count(*) from upload_pipeline.events e where e.job_id = j.job_id) as events
                  from upload_pipeline.upload_jobs j
                """
            ).fetchall()
            assert {row.job_id: tuple(row)[1:] for row in rows} == {
                job.job_id: (job.stage, job.state, job.retries, job.token, job.wanted_cancel, job.events)
                for job in world.jobs.values()
            }
            stranded = value(
                db,
                """
                select count(*) from upload_pipeline.upload_jobs j
                  join upload_pipeline.lanes l using (pool, user_id) where j.state = 'queued' and not l.ready
                """,
            )
            assert stranded == 0

    return Queue


def test_the_queue_does_as_its_model_does(admin: Connection, worker: Connection) -> None:
    admin.execute(
        """
        insert into upload_pipeline.stages (pipeline, stage, position, progress, final)
        values ('tiny', 'todo', 0, 0, false), ('tiny', 'half', 1, 50, false), ('tiny', 'finished', 2, 100, true)
        """
    )
    run_state_machine_as_test(
        make_machine(admin, worker),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
