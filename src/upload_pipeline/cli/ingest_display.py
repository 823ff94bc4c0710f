"""What `ingest` shows while it works: bars on a terminal, plain lines in a pipe, JSON for machines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from upload_pipeline.cli.output import STATE_STYLES, counted, err, note, out, print_json, print_line, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from upload_pipeline.cli.ingestion import Display, FileRun

ROWS = 12
"""Most files with a bar of their own; on a low terminal fewer."""
BAR_WIDTH = 20
STOPPING = "Stopping: steps that run may finish. Ctrl-C again stops at once."


@contextmanager
def open_display(*, as_json: bool) -> Iterator[Display]:
    """The display that fits where the output goes."""
    if as_json:
        yield JsonLines()
    elif err().is_terminal:
        from rich.live import Live

        # Standard output stays itself: piped, it gets its lines while the bars stay on the terminal.
        live = Live(console=err(), transient=True, refresh_per_second=5, redirect_stdout=False)
        with live:
            yield Bars(live)
    else:
        yield Lines()


class JsonLines:
    """One object a line at the end of each file."""

    def show(self, files: Sequence[FileRun]) -> None:
        """Nothing: machines wait for the end."""

    def ended(self, file: FileRun) -> None:
        """Writes the file's line."""
        print_json(file.as_json())

    def stopping(self) -> None:
        """Says so to whoever watches."""
        note(STOPPING)


class Lines:
    """One line a file at its end: on standard output, or on standard error where it failed."""

    def show(self, files: Sequence[FileRun]) -> None:
        """Nothing: a pipe is no place for bars."""

    def ended(self, file: FileRun) -> None:
        """Writes the file's line."""
        print_line(end_line(file), err() if file.code is not None else out())

    def stopping(self) -> None:
        """Says so."""
        note(STOPPING)


class Bars:
    """A bar for each file at work and one for all, below the lines of those that have ended."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._begun = time.monotonic()

    def show(self, files: Sequence[FileRun]) -> None:
        """Draws the bars anew."""
        if self._live.is_started:
            room = max(1, self._live.console.size.height - 4)
            self._live.update(
                _bars(files, min(ROWS, room), time.monotonic() - self._begun, width=self._live.console.width - 4)
            )

    def ended(self, file: FileRun) -> None:
        """Writes the file's line above the bars."""
        if file.code is None and not sys.stdout.isatty():
            print_line(end_line(file))
        else:
            print_line(end_line(file), self._live.console)

    def stopping(self) -> None:
        """Takes the bars away, and says what happens."""
        self._live.stop()
        note(STOPPING)


def end_line(file: FileRun) -> Text:
    """What became of a file, in one line."""
    from rich.text import Text

    text = Text()
    if file.code is not None:
        text.append("failed  ", style="bold red")
        text.append(str(file.path), style="bold")
        text.append(f"  {file.code}: {' '.join((file.message or '').split())}", style="red")
        return text
    text.append(f"{file.state:<8}", style=STATE_STYLES.get(file.state or "", ""))
    text.append(str(file.path), style="bold")
    if file.chunks is not None:
        text.append(f"  {counted(file.chunks, 'chunk')}")
    text.append(f"  {seconds_text(file.seconds)}{'  known before' if file.duplicate else ''}", style="dim")
    return text


def _bars(files: Sequence[FileRun], rows: int, seconds: float, *, width: int) -> RenderableType:
    """The bars; a little narrower than the terminal, so that the `^C` that it echoes begins no line of its own."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.width = max(width, 1)
    grid.add_column(width=BAR_WIDTH)
    grid.add_column(no_wrap=True, width=19)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    unended = sorted((file for file in files if not file.ended), key=_activity)
    for file in unended[:rows]:
        bar = ProgressBar(total=100, completed=file.progress, width=BAR_WIDTH)
        grid.add_row(bar, _stage_text(file), Text(file.path.name))
    if len(unended) > rows:
        grid.add_row("", Text(f"and {len(unended) - rows:,} more", style="dim"), "")
    ended = len(files) - len(unended)
    failed = sum(file.code is not None for file in files)
    # A file on its way counts for the part that is behind it.
    whole = ended * 100 + sum(file.progress for file in unended)
    counts = Text(f"{ended:,} of {counted(len(files), 'file')}", style="bold")
    tail = Text(seconds_text(seconds), style="dim")
    if failed:
        tail = Text.assemble((f"{failed:,} failed  ", "red"), tail)
    grid.add_row(ProgressBar(total=100 * len(files), completed=whole, width=BAR_WIDTH), counts, tail)
    return grid


def _activity(file: FileRun) -> int:
    """Files at work first, then those nearest to it."""
    order = ("working", "intake", "retryable", "queued")
    return order.index(file.state) if file.state in order else len(order)


def _stage_text(file: FileRun) -> Text:
    from rich.text import Text

    if file.state == "working":
        return Text(file.stage or "", style=STATE_STYLES["working"])
    if file.state == "retryable":
        return Text(f"retry {file.retry_count}" if file.retry_count else "waiting", style=STATE_STYLES["retryable"])
    return Text({None: "waiting", "intake": "intake"}.get(file.state, file.state or ""), style="dim")
