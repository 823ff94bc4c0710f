"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

_JSON_ASKED = "upload_pipeline.json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.meta[_JSON_ASKED] = value
    return value


def json_asked(context: typer.Context) -> bool:
    """Whether the command that runs below this context was asked for JSON, so that its errors come as JSON too."""
    return bool(context.meta.get(_JSON_ASKED))


JsonOption = Annotated[
    bool, typer.Option("--json", callback=_remember_json, is_eager=True, help="Write JSON, for machines.")
]
UserOption = Annotated[
    UUID | None, typer.Option("--user", metavar="UUID", help="Whose files. Default: the local user of this terminal.")
]
OnlyUserOption = Annotated[UUID | None, typer.Option("--user", metavar="UUID", help="Only those of this user.")]
LimitOption = Annotated[
    int, typer.Option("--limit", min=1, max=100_000, metavar="N", help="At most so many, newest first.")
]
JobArgument = Annotated[
    UUID, typer.Argument(metavar="JOB_ID", help="Id of the job, as `jobs` lists it.", show_default=False)
]


def examples(*lines: str) -> str:
    """The end of a command's help: what to type, one example a line."""
    return "\n".join(("Examples:", *(f"  {line}" for line in lines)))
