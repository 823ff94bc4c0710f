"""`storage setup|check|policies`: the bucket or directory where files are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from upload_pipeline.cli.arguments import JsonOption, examples

if TYPE_CHECKING:
    from upload_pipeline.storage.store_findings import StorePart

_STYLES = {
    "ok": "green",
    "changed": "cyan",
    "missing": "bold red",
    "denied": "bold red",
    "not offered": "dim",
    "not looked at": "yellow",
}

ForOption = Annotated[
    Literal["api", "workers", "setup"] | None,
    typer.Option("--for", help="Only the policy of the service, of the workers, or of whoever runs `storage setup`."),
]


def register(app: typer.Typer) -> None:
    """Adds the group of commands."""
    group = typer.Typer(no_args_is_help=True, help="Make or inspect the store that keeps the files.")
    group.command("setup", epilog=examples("upload-pipeline storage setup", "upload-pipeline storage setup --json"))(
        setup_command
    )
    group.command("check", epilog=examples("upload-pipeline storage check"))(check_command)
    group.command(
        "policies",
        epilog=examples("upload-pipeline storage policies", "upload-pipeline storage policies --for api > api.json"),
    )(policies_command)
    app.add_typer(group, name="storage")


def setup_command(as_json: JsonOption = False) -> None:
    """Make the store: private, encrypted, versioned, with rules that clean up. Changes nothing that is well already.

    Ends with the least policies for the service and the workers. Exit 1 where something is left to do.
    """
    _look(mend=True, as_json=as_json)


def check_command(as_json: JsonOption = False) -> None:
    """Say what of the store is not as `storage setup` would make it, and configure nothing. Exit 1 where something is.

    Whether the store can be used is tried with an object that is written and removed again.
    """
    _look(mend=False, as_json=as_json)


def policies_command(process: ForOption = None) -> None:
    """Print the least policies for the service and for the workers, as JSON."""
    import json

    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import note, out
    from upload_pipeline.storage.store_setup import store_policies

    policies = store_policies(read_settings())
    if policies is None:
        note("This store has no policies: who may use it is set where it is managed.")
        return
    out().print(json.dumps(policies if process is None else policies[process], indent=2), soft_wrap=True)


def _look(*, mend: bool, as_json: bool) -> None:
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.failures import FAILED
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import print_json
    from upload_pipeline.storage.store_findings import all_well
    from upload_pipeline.storage.store_setup import look_at_store, store_policies
    from upload_pipeline.url_secrets import without_password

    settings = read_settings()
    parts = run(look_at_store(settings, mend=mend))
    policies = store_policies(settings)
    if as_json:
        print_json(
            {
                "ok": all_well(parts),
                "changed": sum(part.state == "changed" for part in parts),
                "not_looked_at": sum(part.state == "not looked at" for part in parts),
                "store": without_password(settings.effective_storage_url),
                "parts": parts,
                "policies": policies,
            }
        )
    else:
        _print(parts, policies, mend=mend)
    if not all_well(parts):
        raise typer.Exit(FAILED)


def _print(parts: list[StorePart], policies: dict[str, object] | None, *, mend: bool) -> None:
    import json

    from rich.text import Text

    from upload_pipeline.cli.output import counted, out, print_line

    for part in parts:
        state = Text(f"{part.state:<14}", style=_STYLES[part.state])
        print_line(Text.assemble(state, (f"{part.part:<14}", "bold"), part.message))
    for process, policy in (policies or {}).items():
        if process != "setup":
            out().print(f"\nPolicy for {process}:\n{json.dumps(policy, indent=2)}", soft_wrap=True)
    left = sum(not part.well for part in parts)
    changed = sum(part.state == "changed" for part in parts)
    unseen = sum(part.state == "not looked at" for part in parts)
    if left:
        print_line(f"\n{counted(left, 'part')} not as it should be.", style="red")
    elif unseen:
        print_line(f"\n{counted(unseen, 'part')} not looked at; all else is well.", style="yellow")
    elif mend:
        print_line(f"\n{counted(changed, 'part')} changed." if changed else "\nNothing to change.", style="green")
    else:
        print_line("\nAll is well.", style="green")
