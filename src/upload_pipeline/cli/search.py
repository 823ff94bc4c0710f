"""`search`: asks for what the pipeline made findable."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, UserOption, examples

if TYPE_CHECKING:
    from upload_pipeline.search.query import Hit, SearchResult
    from upload_pipeline.settings import Settings

EXCERPT_CHARS = 480
"""How much of a hit's text a person is shown; JSON has all of it."""


class Mode(StrEnum):
    """How hits are ranked: by words and meaning together, by meaning, by words."""

    HYBRID = "hybrid"
    VECTOR = "vector"
    TEXT = "text"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "search",
        epilog=examples(
            'upload-pipeline search "when is water damage covered"',
            "upload-pipeline search deductible --mode text --limit 3",
            'upload-pipeline search "roof inspection" --json',
        ),
    )(search_command)


def search_command(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="What to look for, in your own words.", show_default=False)
    ],
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, metavar="N", help="Most hits.")] = 10,
    mode: Annotated[
        Mode, typer.Option("--mode", help="Rank by words and meaning, by meaning, or by words.")
    ] = Mode.HYBRID,
    user: UserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search what has been ingested; best hits first."""
    from upload_pipeline.cli.event_loop import run
    from upload_pipeline.cli.opening import read_settings
    from upload_pipeline.cli.output import print_json
    from upload_pipeline.ids import LOCAL_USER_ID

    result = run(_search(read_settings(), query, limit=limit, mode=mode, user_id=user or LOCAL_USER_ID))
    if as_json:
        print_json({"hits": [_as_json(hit) for hit in result.hits], "took_ms": round(result.took_ms, 1)})
        return
    _print(result)


async def _search(settings: Settings, query: str, *, limit: int, mode: Mode, user_id: UUID) -> SearchResult:
    import asyncio

    from upload_pipeline.cli.opening import open_database
    from upload_pipeline.database.connection import connection_options
    from upload_pipeline.database.pools import open_pool
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.search.query import search
    from upload_pipeline.search.query_models import QueryModels

    urls = await asyncio.to_thread(open_database, settings)
    db = await open_pool(urls.worker, connection_options(settings, "upload-pipeline search"), size=1)
    try:
        models = QueryModels(db, ProviderCalls(), settings)
        try:
            return await search(db, models, user_id=user_id, query=query, limit=limit, mode=mode.value)
        finally:
            await models.close()
    finally:
        await db.close()


def _as_json(hit: Hit) -> dict[str, object]:
    return {
        "chunk_id": hit.chunk_id,
        "document_id": hit.document_id,
        "filename": hit.filename,
        "text": hit.text,
        "score": hit.score,
        "heading_path": list(hit.heading_path),
        "page": hit.page,
        "start": hit.start,
        "end": hit.end,
        "metadata": hit.metadata,
    }


def _print(result: SearchResult) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from upload_pipeline.cli.output import counted, note, out

    console = out()
    if not result.hits:
        note("Nothing found. `upload-pipeline documents` lists what is searchable.")
        return
    for number, hit in enumerate(result.hits, start=1):
        title = Text.assemble((f"{number}. ", "bold"), (hit.filename, "bold cyan"))
        if hit.page is not None:
            title.append(f"  p. {hit.page}" + (f"-{hit.page_to}" if hit.page_to not in (None, hit.page) else ""))
        title.append(f"  {hit.score:.4f}", style="dim")
        console.print(title)
        if hit.heading_path:
            console.print(Padding(Text(" > ".join(hit.heading_path), style="yellow"), (0, 0, 0, 3), expand=False))
        console.print(Padding(Text(excerpt(hit.text)), (0, 0, 0, 3), expand=False))
        console.print()
    note(f"{counted(len(result.hits), 'hit')} in {result.took_ms:.0f} ms")


def excerpt(text: str, limit: int = EXCERPT_CHARS) -> str:
    """The beginning of a text on one line, cut at a word."""
    flat = " ".join(text.split())
    if len(flat) <= limit:
        return flat
    cut = flat[:limit].rsplit(" ", 1)[0]
    return f"{cut} …"
