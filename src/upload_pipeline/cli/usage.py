"""`usage`: what was used of hosted providers, and what it cost."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, LimitOption, OnlyUserOption, examples

_DAYS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


class Grouping(StrEnum):
    """What a line of the answer is."""

    DAY = "day"
    MODEL = "model"
    USER = "user"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "usage",
        epilog=examples(
            "upload-pipeline usage", "upload-pipeline usage --by user --from 2026-11-01 --to 2026-12-01 --json"
        ),
    )(usage_command)


def usage_command(
    user: OnlyUserOption = None,
    begin: Annotated[
        datetime | None, typer.Option("--from", formats=_DAYS, metavar="DAY", help="From this day on (UTC).")
    ] = None,
    end: Annotated[
        datetime | None, typer.Option("--to", formats=_DAYS, metavar="DAY", help="Up to this day, without it (UTC).")
    ] = None,
    by: Annotated[Grouping, typer.Option("--by", help="What a line is.")] = Grouping.DAY,
    limit: LimitOption = 1000,
    as_json: JsonOption = False,
) -> None:
    """Show calls, tokens, pages and their cost by day, model or user. With --json: one object a line.

    The cost is that of the day on which it was used, by the prices of the setting PRICES; `*` marks what lacks a price.
    """
    from datetime import UTC

    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import counted, note, print_json, print_table, table
    from upload_pipeline.database.usage import sum_usage
    from upload_pipeline.errors import ErrorCode, PipelineError

    if begin and end and begin >= end:
        raise PipelineError(ErrorCode.INVALID_ARGUMENT, "--from must be before --to, which is not part of the time.")
    with reading_database() as connection:
        sums = sum_usage(
            connection,
            by=by.value,
            user_id=user,
            begin=begin and begin.replace(tzinfo=UTC),
            end=end and end.replace(tzinfo=UTC),
            limit=limit,
        )
    if as_json:
        for one in sums:
            numbers = {"credits": float(one.credits), "cost_usd": None if one.cost_usd is None else float(one.cost_usd)}
            print_json(
                {
                    by.value: one.key or None,
                    "requests": one.requests,
                    "tokens": one.tokens,
                    "pages": one.pages,
                    "cached": one.cached,
                    **numbers,
                    "unpriced": one.unpriced,
                }
            )
        return
    if not sums:
        note("No usage: hosted providers record what they are asked for, local ones only with RECORD_LOCAL_USAGE.")
        return
    rows = [
        (
            "-" if one.cost_usd is None else f"{one.cost_usd:,.4f}{'*' if one.unpriced else ''}",
            f"{one.requests:,}",
            f"{one.tokens:,}",
            f"{one.pages:,}",
            f"{one.cached:,}",
            one.key or "(no user's)",
        )
        for one in sums
    ]
    print_table(table(("USD", "CALLS", "TOKENS", "PAGES", "CACHED", by.value.upper()), rows, spare=("CACHED",)))
    unpriced = sum(one.unpriced for one in sums)
    if unpriced:
        note(f"{counted(unpriced, 'record')} without a price: set UPLOAD_PIPELINE_PRICES before it is used.")
