"""A worker process with the document pipeline's own steps that does one of them, says so, and then never goes on.

    python killable_worker.py [STAGE]

The step is the one that leaves the stage, `queued` unless another is named. Told the rest by its settings, it writes
the job's id once the step's work is done and nothing of it is written yet.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_pipeline.stages import DOCUMENT_PIPELINE, Stage
from upload_workers.pipelines import STEPS
from upload_workers.process import work_until_stopped
from upload_workers.steps import Outcome, Step, StepContext


def stopping(step: Step) -> Step:
    """The step, whose outcome nobody gets."""

    async def run_and_stop(job: ClaimedJob, context: StepContext) -> Outcome:
        await step(job, context)
        print(job.job_id, flush=True)
        return await asyncio.Event().wait()  # type: ignore[return-value]

    return run_and_stop


def main() -> None:
    settings = load_settings()
    configure_logs(settings)
    left = DOCUMENT_PIPELINE, Stage(sys.argv[1] if len(sys.argv) > 1 else Stage.QUEUED)
    steps = {**STEPS, left: stopping(STEPS[left])}
    uvloop.run(work_until_stopped(settings, settings.database_url.get_secret_value(), steps=steps))


if __name__ == "__main__":
    main()
