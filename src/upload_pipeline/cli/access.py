"""`token` and `keys create|list|revoke`: credentials for the HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, LimitOption, OnlyUserOption, UserOption, examples

if TYPE_CHECKING:
    from upload_pipeline.database.api_keys import KeyListing

RoleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--role", metavar="ROLE", help="A role of the application, as ADMIN; repeat it for more.", show_default=False
    ),
]

_SECONDS_IN_A_DAY = 86400.0


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        "token",
        epilog=examples(
            "upload-pipeline token",
            'curl -H "Authorization: Bearer $(upload-pipeline token)" http://127.0.0.1:8000/api/v2/documents',
        ),
    )(token_command)
    keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
    keys.command(
        "create",
        epilog=examples("upload-pipeline keys create --user 3f0c... --name importer --expires-in-days 90"),
    )(create_command)
    keys.command("list", epilog=examples("upload-pipeline keys list --json"))(list_command)
    keys.command("revoke", epilog=examples("upload-pipeline keys revoke 6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"))(
        revoke_command
    )
    app.add_typer(keys, name="keys")


def token_command(
    user: UserOption = None,
    role: RoleOption = None,
    days: Annotated[
        float, typer.Option("--expires-in-days", min=0.001, max=3650, metavar="DAYS", help="Its lifetime.")
    ] = 30.0,
) -> None:
    """Print a token for development, which the API beside the embedded database accepts."""
    from upload_pipeline.api.development_tokens import development_token
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import print_line
    from upload_pipeline.ids import LOCAL_USER_ID

    token = development_token(
        read_settings(), user or LOCAL_USER_ID, roles=role or (), lifetime=days * _SECONDS_IN_A_DAY
    )
    print_line(token)


def create_command(
    user: Annotated[UUID, typer.Option("--user", metavar="UUID", help="Whose key; it sees that user's files.")],
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="What it is for.")],
    role: RoleOption = None,
    days: Annotated[
        float | None,
        typer.Option(
            "--expires-in-days",
            min=0.001,
            max=36500,
            metavar="DAYS",
            help="Default: it never expires.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it: this once. Only a hash of it is stored."""
    from datetime import UTC, datetime, timedelta

    from upload_pipeline.api.api_keys import make_key
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json, print_line
    from upload_pipeline.database.api_keys import create_api_key

    made = make_key()
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with reading_database() as connection:
        key_id = create_api_key(
            connection,
            prefix=made.prefix,
            key_sha256=made.key_sha256,
            user_id=user,
            name=name,
            roles=sorted(set(role or ())),
            expires_at=expires_at,
        )
    if as_json:
        print_json({"key_id": key_id, "key": made.key, "user_id": user, "expires_at": expires_at})
        return
    print_line(made.key)
    note(
        f"Keep it now: it is not shown again. Send it as the header X-API-Key. "
        f"`upload-pipeline keys revoke {key_id}` ends it."
    )


def list_command(user: OnlyUserOption = None, limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """List keys, newest first. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json
    from upload_pipeline.database.api_keys import list_api_keys

    with reading_database() as connection:
        found = list_api_keys(connection, user_id=user, limit=limit)
    if as_json:
        for key in found:
            print_json(key)
    elif found:
        _print_keys(found)
    else:
        note("No keys.")


def revoke_command(
    key: Annotated[
        UUID, typer.Argument(metavar="KEY_ID", help="Id of the key, as `keys list` shows it.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """End a key: from now on it is refused."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.api_keys import revoke_api_key

    with reading_database() as connection:
        revoked = revoke_api_key(connection, key)
    if as_json:
        print_json({"key_id": key, "revoked": revoked})
        return
    print_line(f"Key {key} is revoked." if revoked else f"Key {key} was revoked before.")


def _print_keys(keys: list[KeyListing]) -> None:
    from datetime import UTC, datetime

    from rich.table import Table

    from upload_pipeline.cli.output import ago, print_table

    now = datetime.now(UTC)
    made = Table(box=None, pad_edge=False)
    for column in ("key id", "name", "user", "roles", "state", "last used"):
        made.add_column(column, overflow="fold")
    for key in keys:
        expired = key.expires_at is not None and key.expires_at <= now
        state = "revoked" if key.revoked_at else "expired" if expired else "good"
        used = ago(key.last_used_at, now) if key.last_used_at else "never"
        made.add_row(str(key.key_id), key.name, str(key.user_id), ",".join(key.roles), state, used)
    print_table(made)
