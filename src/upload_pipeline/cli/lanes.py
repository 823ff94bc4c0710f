"""`lanes list|set`: how many jobs of a user may be at work at once."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, LimitOption, OnlyUserOption, examples


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    lanes = typer.Typer(no_args_is_help=True, help="List and set how many jobs of a user may be at work at once.")
    lanes.command("list", epilog=examples("upload-pipeline lanes list --user 3f0c..."))(list_command)
    lanes.command("set", epilog=examples("upload-pipeline lanes set --user 3f0c... --max-in-flight 8"))(set_command)
    app.add_typer(lanes, name="lanes")


def list_command(user: OnlyUserOption = None, limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """List lanes by pool and user. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json, print_table, table
    from upload_pipeline.database.lanes import list_lanes

    with reading_database() as connection:
        found = list_lanes(connection, user_id=user, limit=limit)
    if as_json:
        for lane in found:
            print_json(lane)
    elif found:
        rows = [
            (lane.pool, str(lane.max_in_flight), str(lane.working), "yes" if lane.ready else "no", str(lane.user_id))
            for lane in found
        ]
        print_table(table(("POOL", "CAP", "AT WORK", "READY", "USER"), rows, spare=()))
    else:
        note("No lanes: nobody has had a job yet.")


def set_command(
    user: Annotated[UUID, typer.Option("--user", metavar="UUID", help="Whose jobs.")],
    max_in_flight: Annotated[
        int, typer.Option("--max-in-flight", min=1, max=1_000_000, metavar="N", help="At work at once.")
    ],
    pool: Annotated[str, typer.Option("--pool", metavar="P", help="In which pool.")] = "default",
    as_json: JsonOption = False,
) -> None:
    """Set a user's cap in a pool. Running jobs run on; the cap holds for new claims."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import counted, print_json, print_line
    from upload_pipeline.database.lanes import set_lane_cap

    with reading_database() as connection:
        set_lane_cap(connection, user_id=user, pool=pool, max_in_flight=max_in_flight)
    if as_json:
        print_json({"user_id": user, "pool": pool, "max_in_flight": max_in_flight})
        return
    print_line(f"At most {counted(max_in_flight, 'job')} of {user} at work at once in pool {pool}.")
