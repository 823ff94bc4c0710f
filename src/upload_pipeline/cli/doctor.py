"""`doctor`: looks at every part that a job needs, and says what to do where one is not well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, examples

if TYPE_CHECKING:
    from upload_pipeline.cli.checks import Finding
    from upload_pipeline.settings import Settings


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "doctor",
        epilog=examples("upload-pipeline doctor", "upload-pipeline doctor --show", "upload-pipeline doctor --json"),
    )(doctor_command)


def doctor_command(
    show: Annotated[bool, typer.Option("--show", help="First print the effective settings, without secrets.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the settings, the database, the store, the parser and the embedder. Exit 1 where there is a problem."""
    from upload_pipeline.cli.checks import Finding, check_all
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.failures import FAILED
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.errors import PipelineError

    settings: Settings | None = None
    try:
        settings = read_settings()
    except PipelineError as error:
        # One line for each setting; without settings nothing else can be looked at.
        findings = [Finding("settings", False, line) for line in error.message.splitlines()]
    else:
        findings = run(check_all(settings))
    if as_json:
        _print_json(settings, findings, show=show)
    else:
        if show and settings is not None:
            _print_settings(settings)
        _print(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def _print_json(settings: Settings | None, findings: list[Finding], *, show: bool) -> None:
    from upload_pipeline.cli.output import print_json
    from upload_pipeline.cli.shown_settings import effective_settings

    report: dict[str, object] = {"ok": all(finding.ok for finding in findings), "checks": findings}
    if show and settings is not None:
        report["settings"] = {name: value for name, value, _ in effective_settings(settings)}
    print_json(report)


def _print_settings(settings: Settings) -> None:
    from rich.table import Table
    from rich.text import Text

    from upload_pipeline.cli.output import out, print_table
    from upload_pipeline.cli.shown_settings import effective_settings

    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value, given in effective_settings(settings):
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        made.add_row(Text(name, style="bold" if given else ""), Text(shown, style="" if given else "dim"))
    print_table(made)
    out().print()


def _print(findings: list[Finding]) -> None:
    from rich.text import Text

    from upload_pipeline.cli.output import counted, print_line

    for finding in findings:
        mark = Text("ok      ", style="green") if finding.ok else Text("problem ", style="bold red")
        print_line(Text.assemble(mark, (f"{finding.check:<10}", "bold"), f" {finding.message}"))
    problems = sum(not finding.ok for finding in findings)
    print_line(
        f"{counted(problems, 'problem')} found." if problems else "All is well.", style="red" if problems else "green"
    )
