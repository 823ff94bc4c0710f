"""Commands in processes of their own, and what came of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from upload_pipeline.cli.app import app

_MAIN = "from upload_pipeline.cli.app import main; main()"
_INSIDE = frozenset(
    {"jobs", "job", "retry", "cancel", "batch", "documents", "delete", "search", "migrate", "maintenance", "database"}
    | {"keys", "lanes", "models", "organizations", "projects", "storage", "token", "usage"}
)


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def lines(self) -> list[Any]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    def object(self) -> Any:
        """Standard output as the one JSON object that it is."""
        (line,) = self.lines()
        return line


@dataclass(frozen=True, slots=True)
class Terminal:
    """Types commands; `environment` is all that they see of settings."""

    environment: dict[str, str]
    directory: Path

    def __call__(self, *arguments: object, **settings: str) -> Ended:
        """Runs a command to its end; settings by name in lower case, as `log_level="debug"`.

        Commands that neither set up logs nor take over signals run in this process: starting one costs a second.
        """
        if arguments[0] in _INSIDE and "psql" not in arguments:
            return self._inside(arguments, settings)
        done = subprocess.run(
            self._command(arguments),
            env=self._with(settings),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def _inside(self, arguments: tuple[object, ...], settings: dict[str, str]) -> Ended:
        unset = dict.fromkeys(os.environ.keys() - self.environment.keys())
        with chdir(self.directory):
            result = CliRunner().invoke(
                app, [str(argument) for argument in arguments], env=unset | self._with(settings)
            )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    @contextmanager
    def running(self, *arguments: object, **settings: str) -> Iterator[subprocess.Popen[str]]:
        """A command in a process group of its own, as a shell starts it; killed where the test leaves it running."""
        with subprocess.Popen(
            self._command(arguments),
            env=self._with(settings),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _command(self, arguments: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-c", _MAIN, *map(str, arguments)]

    def _with(self, settings: dict[str, str]) -> dict[str, str]:
        return self.environment | {f"UPLOAD_PIPELINE_{name.upper()}": value for name, value in settings.items()}


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment with the home as its only setting."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UPLOAD_PIPELINE_", "PG"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "GITHUB_ACTIONS"):
        kept.pop(name, None)
    return kept | {"UPLOAD_PIPELINE_HOME": str(home)}
