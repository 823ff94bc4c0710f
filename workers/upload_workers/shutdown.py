"""Ending a process on time: a polite first signal, an impatient second one, and a deadline that nothing outlasts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

log = structlog.get_logger(__name__)

FORCED_EXIT = 70
"""Exit status of a process that had to be ended by its deadline or by a second signal (EX_SOFTWARE of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None], *, deadline: float) -> Generator[None]:
    """While entered: TERM or INT calls `stop` on `loop`; a second one, or `deadline` seconds, ends the process.

    The deadline holds from the first signal on, also after the block was left. Signals are read by a thread, from
    the socket that Python's own signal handler writes to, and the end is `os._exit`: a socket that never answers, a
    lock, a thread that computes for ever or an event loop that never turns cannot hold it up. Leases that were still
    held run out, and other workers take the jobs.

    Must be entered in the main thread. Signals are handled as before once it is left.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = {number: signal.signal(number, _noted) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A daemon, as it waits for signals until the process ends.
    threading.Thread(target=_read_signals, args=(reader, loop, stop, deadline), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()


def _noted(_number: int, _frame: object) -> None:
    """Does nothing: that there is a handler keeps the signal from ending the process before the thread has read it."""


def _read_signals(
    reader: socket.socket, loop: asyncio.AbstractEventLoop, stop: Callable[[], None], deadline: float
) -> None:
    asked = False
    with reader:
        # Each signal is one byte, its number; nothing more comes once the writing end is closed.
        while received := reader.recv(1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if asked:
                log.warning("stopping_at_once", signal=name)
                _exit()
            asked = True
            log.info("stopping", signal=name, deadline_seconds=deadline)
            timer = threading.Timer(deadline, _exit)
            timer.daemon = True
            timer.start()
            if not loop.is_closed():
                loop.call_soon_threadsafe(stop)


def _exit() -> None:
    sys.stderr.flush()
    os._exit(FORCED_EXIT)
