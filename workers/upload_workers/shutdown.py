"""Ending a process on time: a polite first signal, an impatient second one, and a deadline that nothing outlasts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

FORCED_EXIT = 70
"""Exit status of a process that had to be ended by its deadline or by a second signal (EX_SOFTWARE of sysexits.h)."""


def on_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None], *, deadline: float) -> None:
    """Calls `stop` at the first TERM or INT; ends the process at the second, or `deadline` seconds after the first.

    The end comes from a thread and by `os._exit`: a socket that never answers, a lock or a busy event loop cannot
    hold it up. Leases that were still held run out, and other workers take the jobs.
    """
    asked = False

    def signalled(name: str) -> None:
        nonlocal asked
        if asked:
            log.warning("stopping_at_once", signal=name)
            _exit()
        asked = True
        log.info("stopping", signal=name, deadline_seconds=deadline)
        timer = threading.Timer(deadline, _exit)
        timer.daemon = True
        timer.start()
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, signal.Signals(number).name)


def _exit() -> None:
    sys.stderr.flush()
    os._exit(FORCED_EXIT)
