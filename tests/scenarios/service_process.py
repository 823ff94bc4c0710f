"""The service as a process of its own, as `upload-pipeline serve` starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.api.live_service import ISSUER, SECRET

START_SECONDS = 60
STOP_SECONDS = 40


@dataclass(frozen=True)
class ServiceProcess:
    """A service that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def service_process(database_url: str, home: Path, **overrides: str) -> Iterator[ServiceProcess]:
    """The service until the context ends; it stops on TERM, and its exit status is 0.

    Args:
        overrides: more settings, by name in lower case.
    """
    settings = {
        "home": str(home),
        "database_url": database_url,
        "jwt_secret": SECRET,
        "jwt_issuer": ISSUER,
        "api_port": "0",
        "log_format": "json",
        "limit_requests_per_hour": "1000000",
        "limit_uploads_per_day": "100000",
        "limit_uploads_per_minute": "100000",
        **overrides,
    }
    environment = {**os.environ, **{f"UPLOAD_PIPELINE_{name.upper()}": value for name, value in settings.items()}}
    home.mkdir(parents=True, exist_ok=True)
    log = home / "service.log"
    command = [str(Path(sys.executable).parent / "upload-pipeline"), "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield ServiceProcess(_await_url(process, log), process, log)
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
        assert status == 0, f"the service ended with {status}: {log.read_text()[-2000:]}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _await_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"API at (http://\S+?),", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"the service did not start: {log.read_text()}")
