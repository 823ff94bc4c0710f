"""Which verbs wake a pool, and how often."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from sessions import Connection
from verbs import add_document, add_job, advance, claim, enqueue, release


def notifications(db: Connection) -> list[str]:
    return [note.payload for note in db.notifies(timeout=0.15)]


def test_a_lane_that_turns_ready_wakes_its_pool_once(admin: Connection, worker: Connection, other: Connection) -> None:
    other.execute("listen upload_pipeline_jobs")
    user = uuid4()
    for _ in range(20):
        add_job(admin, worker, user)
    assert notifications(other) == ["default"]
    held = claim(worker, limit=2)
    release(worker, held)
    assert notifications(other) == []  # the lane stayed ready all the time


def test_a_lane_that_was_parked_wakes_its_pool_again(worker: Connection, other: Connection, lease: Any) -> None:
    other.execute("listen upload_pipeline_jobs")
    release(worker, [lease])
    assert notifications(other) == ["default"]


def test_a_batch_of_many_users_wakes_the_pool_once(admin: Connection, worker: Connection, other: Connection) -> None:
    other.execute("listen upload_pipeline_jobs")
    users = [uuid4() for _ in range(50)]
    documents = [add_document(admin, user) for user in users]
    worker.execute("select upload_pipeline.enqueue_jobs(%s::uuid[], %s::uuid[])", [documents, users])
    assert notifications(other) == ["default"]


def test_a_job_handed_on_wakes_the_pool_that_it_goes_to(
    admin: Connection, worker: Connection, other: Connection, lease: Any
) -> None:
    admin.execute("update upload_pipeline.stages set pool = 'parse' where stage = 'parsing'")
    other.execute("listen upload_pipeline_jobs")
    advance(worker, lease, "queued", "job_validated")
    advance(worker, lease, "job_validated", "parsing")
    assert notifications(other) == ["parse"]


def test_a_wake_up_of_a_transaction_that_is_rolled_back_is_not_sent(
    admin: Connection, worker: Connection, other: Connection
) -> None:
    other.execute("listen upload_pipeline_jobs")
    user = uuid4()
    document = add_document(admin, user)
    worker.execute("begin")
    enqueue(worker, document, user)
    worker.execute("rollback")
    assert notifications(other) == []
