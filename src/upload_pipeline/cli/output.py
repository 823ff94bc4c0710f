"""How the terminal looks: tables, relative times, JSON lines; results on standard output, all else on standard error.

Rich decides on colours (`NO_COLOR`, pipes); what is piped is plain text that no width cuts off.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_PIPED_WIDTH = 10_000
_NARROW = 90
_GAP = 2
_NUMBERS = frozenset(("SIZE", "PAGES", "CHUNKS", "USD", "CALLS", "TOKENS", "CACHED"))

STATE_STYLES: Mapping[str, str] = {
    "queued": "cyan",
    "working": "blue",
    "retryable": "yellow",
    "done": "green",
    "deadletter": "red",
    "refused": "red",
    "cancelled": "magenta",
}


def out() -> Console:
    """The console of results: standard output."""
    return _console(stderr=False)


def err() -> Console:
    """The console of everything else: standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def print_json(value: object) -> None:
    """Writes one object as one line of JSON. Dataclasses become objects; UUIDs and times become strings."""
    sys.stdout.write(json.dumps(value, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def as_object(record: Any) -> dict[str, Any]:
    """A dataclass as a dict, one level deep."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_object(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, spare: Collection[str]) -> Table:
    """A table without a frame, whose last column gives way where the terminal is narrow.

    Args:
        columns: headings; only the last column is ever cut.
        rows: a cell for each heading.
        spare: headings of what a narrow terminal goes without.
    """
    from rich.table import Table

    width = out().width
    shown = [name for name in columns if name not in spare or width >= _NARROW]
    cells = list(rows)
    left = width
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for place, name in enumerate(columns):
        if name not in shown:
            continue
        last = name == columns[-1]
        whole = max(len(str(row[place])) for row in [columns, *cells])
        made.add_column(
            name,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if name in _NUMBERS else "left",
            # Rich would cut all columns alike.
            min_width=None if last else whole,
            max_width=max(left, len(name)) if last else None,
        )
        left -= whole + _GAP
    for row in cells:
        made.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in shown))
    return made


def print_table(made: RenderableType) -> None:
    """Writes a table to standard output; piped, without the spaces that pad its lines."""
    console = out()
    if console.is_terminal:
        console.print(made)
        return
    with console.capture() as capture:
        console.print(made)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def state_text(state: str) -> Text:
    """A state in its colour."""
    from rich.text import Text

    return Text(state, style=STATE_STYLES.get(state, ""))


def ago(moment: datetime, now: datetime | None = None) -> str:
    """How long a moment is past, or ahead, in its largest unit: `3 min ago`, `in 5 s`."""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    size = abs(seconds)
    for limit, unit, length in ((60, "s", 1), (3600, "min", 60), (86400, "h", 3600), (float("inf"), "d", 86400)):
        if size < limit:
            text = f"{int(size // length)} {unit}"
            return f"{text} ago" if seconds >= 0 else f"in {text}"
    raise AssertionError("unreachable: the last limit is infinite")


def size_text(count: int) -> str:
    """A number of bytes in its largest unit: `312 B`, `4.1 MB` (1 MB = 1024 x 1024 bytes)."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


def seconds_text(seconds: float) -> str:
    """A duration: `0.4 s`, `12 s`, `3 min 5 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 file`, `3 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_line(line: str | Text, console: Console | None = None, *, style: str = "") -> None:
    """Writes one line, to standard output where no console is named. Wrapped on a terminal, never in a pipe."""
    console = console or out()
    console.print(line, style=style, soft_wrap=not console.is_terminal)


def note(text: str) -> None:
    """Writes a hint for a person to standard error."""
    print_line(text, err(), style="dim")


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Writes names and values in two columns; None is left out."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in fields:
        if value is not None:
            made.add_row(name, value if isinstance(value, Text) else str(value))
    print_table(made)
