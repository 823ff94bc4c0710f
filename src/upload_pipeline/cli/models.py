"""`models status|add|pause|resume|activate|retire`: another embedding model takes the place of the one in use."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from upload_pipeline.cli.arguments import JsonOption, examples
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from upload_pipeline.database.model_control import ModelStatus
    from upload_pipeline.providers.embedding import EmbeddingModel
    from upload_pipeline.settings import Settings

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model's name, as `models status` shows it.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    models = typer.Typer(no_args_is_help=True, help="Change the embedding model while searches go on.")
    models.command("status", epilog=examples("upload-pipeline models status"))(status_command)
    models.command(
        "add",
        epilog=examples(
            "upload-pipeline models add text-embedding-3-large --dimensions 1024",
            "upload-pipeline models add bge-m3 --provider openai --dimensions 1024",
            "upload-pipeline models add wordllama-256@128",
        ),
    )(add_command)
    models.command("pause", epilog=examples("upload-pipeline models pause wordllama-256@128"))(pause_command)
    models.command("resume", epilog=examples("upload-pipeline models resume wordllama-256@128"))(resume_command)
    models.command("activate", epilog=examples("upload-pipeline models activate wordllama-256@128"))(activate_command)
    models.command("retire", epilog=examples("upload-pipeline models retire wordllama-256 --now"))(retire_command)
    app.add_typer(models, name="models")


def status_command(as_json: JsonOption = False) -> None:
    """Show the models, and how far the one is that is being filled. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import as_object, note, print_json, print_table, table
    from upload_pipeline.database.model_control import list_models

    with reading_database() as connection:
        found = list_models(connection)
    if as_json:
        for model in found:
            seconds = model.time_left.total_seconds() if model.time_left is not None else None
            print_json({**as_object(model), "time_left": seconds})
        return
    if not found:
        note("No models: the first worker that starts names the one of its settings.")
        return
    rows = [
        (
            model.model,
            "paused" if model.paused else model.status,
            model.provider,
            str(model.dimensions),
            "" if model.filled_chunks is None else f"{model.filled_chunks} of {model.chunks}",
            _remark(model),
        )
        for model in found
    ]
    print_table(table(("MODEL", "STATUS", "PROVIDER", "DIMENSIONS", "CHUNKS", ""), rows, spare=("PROVIDER",)))
    for model in found:
        if model.failure is not None:
            note(f"The filling of {model.model} waits for its provider: {model.failure}")


def add_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As its provider names it, or NAME@DIMENSIONS.", show_default=False)
    ],
    provider: Annotated[
        str | None,
        typer.Option(
            "--provider", metavar="P", help="local or openai. Default: whose the name is.", show_default=False
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option("--dimensions", min=1, max=16_000, metavar="N", help="Length of the vectors.", show_default=False),
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Do not begin yet: `models resume` does.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Begin to fill a model from the stored chunks; searches go on with the active one.

    One text is embedded first, so that a wrong key or name shows at once; `usage` has it, as no user's. Of a model that
    is being filled: documents whose job failed are tried again.
    """
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.opening import read_settings, reading_database
    from upload_pipeline.cli.output import note, print_json, print_line
    from upload_pipeline.database.model_control import add_model

    settings = read_settings()
    with reading_database(settings) as connection:
        facts = run(_tried(model, provider, dimensions, settings))
        status = add_model(
            connection, model=facts.name, provider=facts.provider, dimensions=facts.dimensions, paused=paused
        )
    if as_json:
        print_json({"model": facts.name, "status": status, "dimensions": facts.dimensions, "paused": paused})
        return
    if status == "active":
        print_line(f"{facts.name} is the active model, the first of this database.")
        return
    print_line(f"{facts.name} is {'added, and paused' if paused else 'being filled'}.")
    note("Workers that serve the pool `background` fill it; `upload-pipeline models status` tells how far it is.")


def pause_command(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Stop filling a model; what is under way comes to its end, and what there is stays."""
    _set_paused(model, True, as_json)


def resume_command(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Go on filling a model that was paused."""
    _set_paused(model, False, as_json)


def activate_command(
    model: ModelArgument,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            min=0,
            metavar="SECONDS",
            help="How long the vectors of the model before are kept. Default: the setting MODEL_GRACE.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let searches use a filled model from now on, or go back to the one before.

    Refused, naming how much is lacking, while there is a chunk without a vector of it.
    """
    from upload_pipeline.cli.opening import read_settings, reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.model_control import activate_model

    settings = read_settings()
    kept = timedelta(seconds=settings.model_grace if grace is None else grace)
    with reading_database(settings) as connection:
        before = activate_model(connection, model, grace=kept)
    if as_json:
        print_json({"model": model, "before": before, "grace_seconds": kept.total_seconds()})
    elif before == model:
        print_line(f"{model} is the active model already.")
    else:
        print_line(f"{model} is the active model. The vectors of {before} are kept for {_duration(kept)}.")


def retire_command(
    model: ModelArgument,
    now: Annotated[bool, typer.Option("--now", help="Also where its grace time is not over.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give up a model that is being filled, or end the grace time of one; workers remove its vectors."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import counted, print_json, print_line
    from upload_pipeline.database.model_control import retire_model

    with reading_database() as connection:
        cancelled = retire_model(connection, model, now=now)
    if as_json:
        print_json({"model": model, "jobs_cancelled": cancelled})
        return
    told = (
        f" {counted(cancelled, 'job')} of its filling {'is' if cancelled == 1 else 'are'} cancelled."
        if cancelled
        else ""
    )
    print_line(f"{model} is retired; workers remove its vectors.{told}")


def _set_paused(model: str, paused: bool, as_json: bool) -> None:
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.model_control import pause_model

    with reading_database() as connection:
        pause_model(connection, model, paused=paused)
    if as_json:
        print_json({"model": model, "paused": paused})
        return
    print_line(f"The filling of {model} {'is paused' if paused else 'goes on'}.")


async def _tried(name: str, provider: str | None, dimensions: int | None, settings: Settings) -> EmbeddingModel:
    """The model's facts, if it embeds a text."""
    from uuid import uuid4

    from upload_pipeline.cli.paid_trials import NoRoomError, budget_database, try_embedder
    from upload_pipeline.database.usage import Usage, record_usage
    from upload_pipeline.prices import LOCAL
    from upload_pipeline.providers.embedding import TRIAL_TEXT
    from upload_pipeline.providers.openai_embedder import OpenAIEmbedder
    from upload_pipeline.providers.registered_models import open_named

    embedder = open_named(name, settings, provider=provider, dimensions=dimensions)
    try:
        if isinstance(embedder, OpenAIEmbedder):
            await try_embedder(embedder, TRIAL_TEXT, settings)
        else:
            await embedder.embed([TRIAL_TEXT])
            if settings.record_local_usage:
                used = Usage(uuid4(), LOCAL, embedder.facts.name, "trial", requests=1)
                async with budget_database(settings) as db:
                    await record_usage(db, [used], settings.prices)
        return embedder.facts
    except NoRoomError as error:
        raise PipelineError(
            ErrorCode.EMBED_FAILED,
            f"The model was {error}. Try again then.",
            {"retry_after": round(error.seconds, 1)},
        ) from error
    finally:
        await embedder.close()


def _remark(model: ModelStatus) -> str:
    from upload_pipeline.cli.output import counted

    if model.status == "building":
        parts = [f"{100 * (model.filled_chunks or 0) // model.chunks} %"] if model.chunks else []
        if model.lacking_chunks == 0:
            parts.append("filled: it can be activated")
        elif model.time_left is not None:
            parts.append(f"about {_duration(model.time_left)} left")
        if model.failed_documents:
            parts.append(f"{counted(model.failed_documents, 'document')} failed")
        if model.failed_at is not None:
            parts.append(f"its provider failed at {model.failed_at:%H:%M}")
        return ", ".join(parts)
    if model.status == "retiring" and model.retire_at is not None:
        return f"kept until {model.retire_at:%Y-%m-%d %H:%M}"
    if model.status == "retired" and model.vectors:
        return f"{counted(model.vectors, 'vector')} to be removed"
    return ""


def _duration(time: timedelta) -> str:
    seconds = int(time.total_seconds())
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{seconds} s"
