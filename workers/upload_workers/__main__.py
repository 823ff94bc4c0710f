"""A worker process with nothing around it, for containers: `python -m upload_workers`.

It is told everything by its settings. Exit status: 0 after a polite end, 2 where the settings do not allow a start,
1 where the database, the store or a provider does not, 70 where it had to be ended by force.
"""

from __future__ import annotations

import sys

import uvloop

from upload_pipeline.database.urls import resolve_database
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.logs import configure_logs
from upload_pipeline.settings import load_settings
from upload_workers.process import work_until_stopped


def main() -> int:
    """Runs the worker until it is told to stop; returns the exit status."""
    try:
        settings = load_settings()
        configure_logs(settings)
        uvloop.run(work_until_stopped(settings, resolve_database(settings).worker))
    except PipelineError as error:
        print(f"upload_workers: {error}", file=sys.stderr)  # noqa: T201 - before there are logs
        return 2 if error.code is ErrorCode.SETTING_INVALID else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
