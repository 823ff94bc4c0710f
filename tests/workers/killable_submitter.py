"""A worker process with the pipeline's own steps that says when a document is submitted, and then never goes on.

    python killable_submitter.py

Told the rest by its settings. It writes the job's id once the provider has made the parse and nothing of it is written.
"""

from __future__ import annotations

import asyncio

import uvloop

from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_pipeline.stages import DOCUMENT_PIPELINE, Stage
from upload_workers.pipelines import STEPS
from upload_workers.process import work_until_stopped
from upload_workers.stages.submit import submit
from upload_workers.steps import Outcome, StepContext


async def submit_and_stop(job: ClaimedJob, context: StepContext) -> Outcome:
    """The step, whose outcome nobody gets."""
    await submit(job, context)
    print(job.job_id, flush=True)
    return await asyncio.Event().wait()  # type: ignore[return-value]


def main() -> None:
    settings = load_settings()
    configure_logs(settings)
    steps = {**STEPS, (DOCUMENT_PIPELINE, Stage.JOB_VALIDATED): submit_and_stop}
    uvloop.run(work_until_stopped(settings, settings.database_url.get_secret_value(), steps=steps))


if __name__ == "__main__":
    main()
