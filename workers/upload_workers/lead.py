"""Leading one job: run the step of its stage, write the outcome, go on while the lease is kept.

Every path out of here goes through one guarded write, and every exception ends here: a step can fail its own job and
nothing else.

    outcome of the step     written by                  the job then
    Advance                 advance_jobs (grouped)      next stage, or done
    Commit                  the step's own verb         next stage, or done
    Snooze                  snooze_job                  retryable, no retry counted; perhaps for other workers
    PipelineError           fail_job                    retryable or deadletter, as its code says
    any other exception     fail_job with INTERNAL      retryable
    lease lost, trust out   nothing but an event        another worker's
    cancel asked for        release_jobs                cancelled
    step deadline           fail_job, STAGE_TIMEOUT     retryable
    worker stops            release_jobs                queued, no retry counted
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import asyncpg
import structlog

from upload_pipeline.database import queue
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.logs import log_fields
from upload_pipeline.stages import PHOTO_PIPELINE
from upload_workers.leases import StopReason
from upload_workers.passing import is_passing
from upload_workers.steps import Advance, Commit, Snooze
from upload_workers.storable import storable_json, storable_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from upload_pipeline.database.queue import ClaimedJob, Executor, Transition
    from upload_workers.grouping import GroupedAdvances
    from upload_workers.leases import HeldLease, LeaseKeeper
    from upload_workers.metrics import WorkerMetrics
    from upload_workers.steps import Lacking, Outcome, Step, StepContext

log = structlog.get_logger(__name__)

T = TypeVar("T")

WRITE_RETRY_DELAY = 0.5
"""Seconds between two tries of a write whose answer was lost; tries end with the trust in the lease."""

UNKNOWN_STAGE_DELAY = timedelta(seconds=30)


@dataclass(frozen=True)
class JobLeader:
    """What leading a job needs.

    Attributes:
        next_stages: the stage behind each (pipeline, stage).
        metrics: where steps and refused writes are counted.
        stopping: True once no further step is to be begun.
    """

    db: Executor
    context: StepContext
    steps: Mapping[tuple[str, str], Step]
    next_stages: Mapping[tuple[str, str], str]
    keeper: LeaseKeeper
    advances: GroupedAdvances
    ttl: timedelta
    stopping: Callable[[], bool]
    metrics: WorkerMetrics

    async def lead(self, job: ClaimedJob, held: HeldLease) -> Lacking | None:
        """Runs steps until the job ends, is handed on, fails or is lost. Never raises but for cancellation.

        Returns:
            What the job needs and this worker lacks, if that is why it was put off.
        """
        # Each job has a task, and so a context, of its own: nothing to take back.
        log_fields.set(_fields(job))
        try:
            return await self._run_steps(job, held)
        except asyncio.CancelledError as error:
            if _is_asked_to_stop(held):
                await self._stopped(held)
            else:
                # The step let out the cancellation of something that it waited for; nobody cancelled the job.
                await self._crashed(held, error)
        except PipelineError as error:
            await self._fail(held, error)
        except asyncpg.PostgresError as error:
            await self._fail_in_database(held, error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a library that calls exit() ends its job and not the worker
            await self._crashed(held, error)
        finally:
            self.keeper.forget(held)
        return None

    async def _run_steps(self, job: ClaimedJob, held: HeldLease) -> Lacking | None:
        if self.stopping():
            # It was claimed while the worker began to stop.
            await self._release(held)
            return None
        while True:
            step = self.steps.get((job.pipeline, job.stage))
            if step is None:
                # A newer release added a stage that this worker does not know: others do.
                log.warning("no_step_for_stage", pipeline=job.pipeline)
                await self._write(held, lambda: queue.snooze_job(self.db, held.lease, delay=UNKNOWN_STAGE_DELAY))
                return None
            began = time.monotonic()
            try:
                outcome = await step(job, self.context)
            except BaseException as error:
                self._step_ended(job, began, _outcome_of(error, held))
                raise
            if held.stopped is not None:
                # The step kept the cancellation to itself; its outcome comes too late all the same.
                self._step_ended(job, began, held.stopped.name.lower())
                await self._stopped(held)
                return None
            sent = time.monotonic()
            self._step_ended(job, began, type(outcome).__name__.lower())
            transition = await self._write_outcome(job, held, outcome)
            log.info("step_done", seconds=round(sent - began, 3), outcome=type(outcome).__name__)
            if isinstance(transition, Snooze):
                return transition.lacking
            if transition is None or transition.state != "working":
                return None
            self.keeper.next_step(held, sent=sent)
            job = replace(job, stage=transition.stage)
            log_fields.set(_fields(job))

    async def _write_outcome(self, job: ClaimedJob, held: HeldLease, outcome: Outcome) -> Transition | Snooze | None:
        keep = not self.stopping()
        match outcome:
            case Advance(results):
                asked = queue.Advance(job.lease, job.stage, self.next_stages[job.pipeline, job.stage], keep, results)
                transition = await self._write(held, lambda: self.advances.advance(asked))
                if transition is None:
                    await self._fenced(held, "advance")
                return transition
            case Commit(verb):
                written = await self._write(held, lambda: verb(self.db, job.lease, keep=keep, ttl=self.ttl))
                if isinstance(written, Snooze):
                    return await self._write_outcome(job, held, written)
                return written
            case Snooze(delay):
                await self._write(held, lambda: queue.snooze_job(self.db, job.lease, delay=delay))
                return outcome
            case _:
                raise TypeError(f"the step of stage {job.stage!r} returned {outcome!r}, which is no outcome")

    async def _write(self, held: HeldLease, write: Callable[[], Awaitable[T]]) -> T:
        """Tries a write again while the connection fails and the lease is trusted: each verb is safe to repeat."""
        while True:
            try:
                return await write()
            except Exception as error:
                if not is_passing(error) or time.monotonic() >= held.trusted_until:
                    raise
                log.warning("write_retried", error=str(error) or type(error).__name__)
            await asyncio.sleep(WRITE_RETRY_DELAY)

    async def _fail(self, held: HeldLease, error: PipelineError) -> None:
        try:
            failure = await self._write(
                held,
                lambda: queue.fail_job(
                    self.db,
                    held.lease,
                    code=error.code.value,
                    message=storable_text(error.message),
                    retryable=error.retryable,
                    details=storable_json(error.details),
                ),
            )
        except Exception as write_error:  # noqa: BLE001 - the lease runs out and the job is reaped
            if is_lease_lost(write_error):
                await self._fenced(held, "failure")
                return
            log.warning("failure_not_recorded", code=error.code.value, error=str(write_error))
        else:
            log.warning("step_failed", code=error.code.value, error=error.message, state=failure.state)

    async def _crashed(self, held: HeldLease, error: BaseException) -> None:
        log.error("step_crashed", exc_info=error)
        # Storage and providers name their own failures, so one that passes and has no name is the database's.
        code = ErrorCode.DATABASE_UNAVAILABLE if is_passing(error) else ErrorCode.INTERNAL
        await self._fail(held, PipelineError(code, f"{type(error).__name__}: {error}"))

    async def _fail_in_database(self, held: HeldLease, error: asyncpg.PostgresError) -> None:
        if is_lease_lost(error):
            await self._fenced(held, "commit")
            return
        log.error("step_failed_in_database", sqlstate=error.sqlstate, error=str(error))
        code = ErrorCode.DATABASE_UNAVAILABLE if is_passing(error) else ErrorCode.INTERNAL
        await self._fail(held, PipelineError(code, f"SQLSTATE {error.sqlstate}: {error}"))

    async def _fenced(self, held: HeldLease, found_by: str) -> None:
        """A write was refused: counted here, and noted in the audit trail as far as that works at the first try."""
        log.warning("lease_lost", found_by=found_by)
        self.metrics.write_fenced()
        try:
            await queue.record_fenced_write(self.db, held.lease, worker_id=self.keeper.worker_id)
        except Exception as error:  # noqa: BLE001 - nothing depends on it
            log.warning("fenced_write_not_recorded", error=str(error) or type(error).__name__)

    def _step_ended(self, job: ClaimedJob, began: float, outcome: str) -> None:
        self.metrics.step_ended(job.pipeline, job.stage, outcome, time.monotonic() - began)

    async def _stopped(self, held: HeldLease) -> None:
        """The task was cancelled: by the lease keeper, which says why, or because the worker stops."""
        if held.stopped is StopReason.TIMED_OUT:
            seconds = self.keeper.step_timeout
            message = (
                f"The step took longer than {seconds:g} s. Raise UPLOAD_PIPELINE_STAGE_TIMEOUT if that is too short."
            )
            await self._fail(held, PipelineError(ErrorCode.STAGE_TIMEOUT, message))
        elif held.stopped is not StopReason.LOST:
            await self._release(held)

    async def _release(self, held: HeldLease) -> None:
        try:
            await self._write(held, lambda: queue.release_jobs(self.db, [held.lease]))
        except Exception as error:  # noqa: BLE001 - the lease runs out and the job is reaped
            log.warning("release_failed", error=str(error) or type(error).__name__)


def _is_asked_to_stop(held: HeldLease) -> bool:
    task = asyncio.current_task()
    return held.stopped is not None or (task is not None and task.cancelling() > 0)


def is_lease_lost(error: BaseException) -> bool:
    """Whether the database refused a write since its lease is lost."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate == queue.LEASE_LOST


def _outcome_of(error: BaseException, held: HeldLease) -> str:
    """How a step ended that raised, as metrics name it."""
    if isinstance(error, asyncio.CancelledError) and _is_asked_to_stop(held):
        return "released" if held.stopped is None else held.stopped.name.lower()
    if isinstance(error, PipelineError):
        return error.code.value
    if is_lease_lost(error):
        return StopReason.LOST.name.lower()
    return (ErrorCode.DATABASE_UNAVAILABLE if is_passing(error) else ErrorCode.INTERNAL).value


def _fields(job: ClaimedJob) -> dict[str, object]:
    return {
        "job_id": job.job_id,
        "photo_id" if job.pipeline == PHOTO_PIPELINE else "document_id": job.subject_id,
        "user_id": job.user_id,
        "correlation_id": job.correlation_id,
        "stage": job.stage,
    }
