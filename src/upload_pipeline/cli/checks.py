"""The checks of `doctor`: each looks at one part and says what it found, with the remedy where it is ill."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from upload_pipeline.cli.detector_check import check_detector
from upload_pipeline.cli.failures import expected
from upload_pipeline.cli.opening import INSUFFICIENT_PRIVILEGE
from upload_pipeline.cli.sweep_check import refusal_of_sweep
from upload_pipeline.cli.unknown_settings import unknown_settings
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from psycopg import Connection

    from upload_pipeline.database.urls import DatabaseUrls
    from upload_pipeline.settings import Settings

OLDEST_POSTGRES = 15
CHECK_SECONDS = 60.0
"""What one check may take: enough for a database that recovers and for a model that is loaded from a slow disk."""

_SENTENCE = "A sentence to embed."

# The verbs that a worker cannot do without, and one table of each kind that it reads.
_NEEDED_FUNCTIONS = (
    "claim_jobs",
    "advance_jobs",
    "fail_job",
    "release_jobs",
    "accept_document",
    "buffer_chunks",
    "commit_embeddings",
    "begin_deletion",
    "retry_job",
    "register_model",
)
_NEEDED_TABLES = ("upload_jobs", "documents", "document_chunks", "document_chunk_buffer", "stages", "workers", "events")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: what was looked at, in a word.
        ok: whether it is well.
        message: what was found, and the remedy where it is not well.
    """

    check: str
    ok: bool
    message: str


async def check_all(settings: Settings) -> list[Finding]:
    """Every check, in the order in which one stands on another."""
    findings = [Finding("settings", False, line) for line in unknown_settings()] or [
        Finding("settings", True, f"every setting is allowed; local state in {settings.home}")
    ]
    findings += await asyncio.to_thread(_check_database, settings)
    findings.append(await _guarded("storage", _check_storage, settings))
    if settings.clamd_url:
        findings.append(await _guarded("scanner", _check_scanner, settings))
    findings.append(await _guarded("parser", _check_parser, settings))
    if settings.parser == "llamaparse":
        findings.append(await _guarded("llamaparse", _check_llamaparse, settings))
    findings.append(await _guarded("embedder", _check_embedder, settings))
    if settings.detector != "none":
        findings.append(await _guarded("detector", check_detector, settings))
    findings.append(await _guarded("api", _check_api, settings))
    return findings


async def _guarded(name: str, check: Callable[[Settings], Awaitable[str]], settings: Settings) -> Finding:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return Finding(name, True, await check(settings))
    except TimeoutError:
        return Finding(
            name, False, f"no answer within {CHECK_SECONDS:.0f} s. Look at the load of this machine, then try again."
        )
    except Exception as error:  # noqa: BLE001 - whatever a part answers, it is a finding
        return Finding(name, False, _explained(error))


def _explained(error: Exception) -> str:
    named = expected(error)
    if named is not None:
        return f"{named.code}: {named.message}"
    return f"{type(error).__name__}: {error}. Install the project anew by `scripts/quickstart`, or report this."


def _check_database(settings: Settings) -> list[Finding]:
    from upload_pipeline.database.connection import connect_sync, connection_options, describe_url
    from upload_pipeline.database.migrations import apply_migrations
    from upload_pipeline.database.urls import resolve_database

    try:
        urls = resolve_database(settings)
        if urls.embedded:
            apply_migrations(urls.admin)
        with connect_sync(
            urls.worker, connection_options(settings, "upload-pipeline doctor"), autocommit=True
        ) as connection:
            version = connection.info.server_version
            name = f"{describe_url(urls.worker)}, Postgres {version // 10000}.{version % 10000}"
            if version // 10000 < OLDEST_POSTGRES:
                message = f"{name} is too old. Use Postgres {OLDEST_POSTGRES} or newer."
                return [Finding("database", False, message)]
            findings = [
                Finding("database", True, f"{name}{' (embedded)' if urls.embedded else ''}"),
                _check_extension(connection),
                _check_migrations(urls),
                _check_rights(connection),
            ]
            if all(finding.ok for finding in findings):
                findings += [_check_model(connection, settings), _check_workers(connection), _check_sweep(connection)]
            return findings
    except Exception as error:  # noqa: BLE001 - whatever the database answers, it is a finding
        return [Finding("database", False, _explained(error))]


def _check_extension(connection: Connection[Any]) -> Finding:
    row = connection.execute(
        """
        select e.extversion, n.nspname from pg_catalog.pg_extension e
          join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector'
        """
    ).fetchone()
    if row is None:
        remedy = (
            "Run `upload-pipeline migrate`; where that says that it is not available, install pgvector on the server."
        )
        return Finding("extension", False, f"the database has no extension vector. {remedy}")
    version, schema = row
    if schema != "extensions":
        remedy = "As a superuser: `alter extension vector set schema extensions`."
        return Finding("extension", False, f"vector {version} is in schema {schema}, not in extensions. {remedy}")
    return Finding("extension", True, f"vector {version}")


def _check_migrations(urls: DatabaseUrls) -> Finding:
    from upload_pipeline.database.migrations import pending_migrations

    try:
        pending = pending_migrations(urls.admin)
    except PipelineError as error:
        if error.details.get("sqlstate") == INSUFFICIENT_PRIVILEGE:
            hint = "with UPLOAD_PIPELINE_MIGRATION_DATABASE_URL set, doctor can tell"
            return Finding("migrations", True, f"unknown: this role may not read the ledger ({hint})")
        return Finding("migrations", False, _explained(error))
    if pending:
        names = ", ".join(migration.file_name for migration in pending)
        return Finding("migrations", False, f"{names} not applied. Run `upload-pipeline migrate`.")
    return Finding("migrations", True, "up to date")


def _check_rights(connection: Connection[Any]) -> Finding:
    row = connection.execute(
        "select current_user, rolsuper or rolbypassrls from pg_catalog.pg_roles where rolname = current_user"
    ).fetchone()
    role, unbounded = row if row is not None else ("?", False)
    if unbounded:
        remedy = "Let UPLOAD_PIPELINE_DATABASE_URL name the role upload_worker, which the migrations make."
        return Finding("rights", False, f"role {role} is above row-level security. {remedy}")
    schema = connection.execute(
        """
        select coalesce((select pg_catalog.has_schema_privilege(n.oid, 'usage') from pg_catalog.pg_namespace n
                          where n.nspname = 'upload_pipeline'), false)
        """
    ).fetchone()
    if schema is None or not schema[0]:
        remedy = "Run `upload-pipeline migrate`, and connect as upload_worker."
        return Finding("rights", False, f"role {role} cannot use the schema upload_pipeline. {remedy}")
    missing = connection.execute(
        """
        select array(
          select p.proname::text from pg_catalog.pg_proc p
           where p.pronamespace = 'upload_pipeline'::regnamespace and p.proname = any(%(functions)s)
             and not pg_catalog.has_function_privilege(p.oid, 'execute')
          union all
          select c.relname::text from pg_catalog.pg_class c
           where c.relnamespace = 'upload_pipeline'::regnamespace and c.relname = any(%(tables)s)
             and not pg_catalog.has_table_privilege(c.oid, 'select'))
        """,
        {"functions": list(_NEEDED_FUNCTIONS), "tables": list(_NEEDED_TABLES)},
    ).fetchone()
    if missing is None or missing[0]:
        shown = ", ".join(missing[0]) if missing else "everything"
        remedy = "Let UPLOAD_PIPELINE_DATABASE_URL name the role upload_worker."
        return Finding("rights", False, f"role {role} may not use {shown}. {remedy}")
    return Finding("rights", True, f"role {role} may do what a worker does, and no more than row-level security allows")


def _check_model(connection: Connection[Any], settings: Settings) -> Finding:
    """Well in any case: after a change of the model the settings may name the one before, and nothing is wrong."""
    from upload_pipeline.providers.embedding import EmbeddingModel
    from upload_pipeline.providers.registered_models import other_than_set

    row = connection.execute(
        "select model, provider, dimensions from upload_pipeline.embedding_models where status = 'active'"
    ).fetchone()
    if row is None:
        return Finding("model", True, "none is active yet: the first worker or search names the one of the settings")
    active = EmbeddingModel(*row)
    differs = other_than_set(active, settings)
    return Finding("model", True, differs or f"{active.name} is the active one, {active.dimensions} dimensions")


def _check_workers(connection: Connection[Any]) -> Finding:
    """Well where none runs: that is seen at once, while one that takes nothing looks alive."""
    workers = connection.execute(
        """
        select pools, left_pools from upload_pipeline.workers
         where last_beat_at > upload_pipeline.now() - interval '2 minutes'
        """
    ).fetchall()
    left = {pool for _, left_pools in workers for pool in left_pools}
    served = {pool for pools, left_pools in workers for pool in pools if pool not in left_pools}
    if left - served:
        pools = ", ".join(sorted(left - served))
        return Finding(
            "workers",
            False,
            f"none serves {pools}: each that could has left it to others, since it lacks the key or the package of an "
            "embedding model. Set UPLOAD_PIPELINE_OPENAI_API_KEY for the workers and start them again; they log "
            "model_not_here.",
        )
    message = f"{len(workers)} running" if workers else "none is running"
    if left:
        message += f"; some leave {', '.join(sorted(left))} to the others"
    return Finding("workers", True, message)


def _check_sweep(connection: Connection[Any]) -> Finding:
    refusal = refusal_of_sweep(connection)
    return Finding("sweep", refusal is None, refusal or "the store is this database's, as far as anybody has looked")


async def _check_storage(settings: Settings) -> str:
    from upload_pipeline.storage.configured import configured_store
    from upload_pipeline.storage.keys import incoming_key
    from upload_pipeline.url_secrets import without_password

    store = configured_store(settings)
    key = incoming_key(uuid4())
    try:
        await store.put_bytes(key, b"doctor")
        await store.delete([key])
        urls = await store.check_urls()
    finally:
        await store.close()
    return f"{without_password(settings.effective_storage_url)} can be written; {urls}"


async def _check_scanner(settings: Settings) -> str:
    from upload_pipeline.storage.virus_scan import open_scanner

    scanner = open_scanner(settings.clamd_url, seconds=settings.clamd_timeout)
    if scanner is None:
        raise RuntimeError("there is no scanner to check")
    version = await scanner.version()
    largest = max(settings.max_file_bytes, settings.max_policy_bytes)
    await scanner.check(largest)
    return f"{version} takes files of up to {largest} bytes"


async def _check_parser(settings: Settings) -> str:
    from upload_pipeline.media_types import MARKDOWN
    from upload_pipeline.providers.local_parser import LocalParser

    parser = LocalParser(settings.parse_timeout, settings.parse_memory_bytes)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "doctor.md"
            path.write_text("# Doctor\n\nA file to parse.\n", encoding="utf-8")
            parsed = await parser.parse(path, MARKDOWN)
    finally:
        parser.close()
    if "A file to parse." not in parsed.markdown:
        raise RuntimeError(f"the parser made {parsed.markdown!r} of a small Markdown file")
    return parser.version


async def _check_llamaparse(settings: Settings) -> str:
    from upload_pipeline.cli.paid_trials import NoRoomError, budget_database, parse_turn
    from upload_pipeline.providers.llamaparse import open_llamaparse

    parser = open_llamaparse(settings)
    if parser is None:
        raise RuntimeError("there is no LlamaParse to check")
    remark = ""
    try:
        if parser.told and not settings.api_public_url.startswith("https://"):
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                "LlamaParse sends messages to addresses that begin with https:// only. Set "
                "UPLOAD_PIPELINE_API_PUBLIC_URL to one, or leave UPLOAD_PIPELINE_LLAMAPARSE_WEBHOOK_SECRET empty.",
            )
        async with budget_database(settings) as db:
            parser.turn = parse_turn(parser, db, settings)
            await parser.find_file("doctor")
    except NoRoomError as error:
        remark = f"; {error}"
    finally:
        await parser.close()
    told = "a webhook tells of ended parses" if parser.told else "no webhook (that needs API_PUBLIC_URL and a secret)"
    limit = settings.llamaparse_requests_per_minute or "any number of"
    version = f"{parser.tier}/{parser.tier_version}"
    return f"{version} at {settings.llamaparse_base_url}, {limit} requests a minute; {told}{remark}"


async def _check_embedder(settings: Settings) -> str:
    from upload_pipeline.cli.paid_trials import NoRoomError, try_embedder
    from upload_pipeline.providers.embedding import open_embedder
    from upload_pipeline.providers.openai_embedder import OpenAIEmbedder

    embedder = open_embedder(settings.embedder, settings)
    about = f"{embedder.model}, {embedder.dimensions} dimensions"
    try:
        if isinstance(embedder, OpenAIEmbedder):
            # what it brings is checked by whoever brings it
            await try_embedder(embedder, _SENTENCE, settings)
            return about
        vectors = await embedder.embed([_SENTENCE])
    except NoRoomError as error:
        return f"{about}; {error}"
    finally:
        await embedder.close()
    if vectors.shape != (1, embedder.dimensions):
        raise RuntimeError(f"the embedder gave an array of shape {vectors.shape}")
    return about


async def _check_api(settings: Settings) -> str:
    from upload_pipeline.api.development_tokens import is_exposed
    from upload_pipeline.api.tokens import open_token_verifier

    if is_exposed(settings):
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"the API is to listen on {settings.api_host}, which other machines may reach, and accepts the tokens for "
            "development. Set UPLOAD_PIPELINE_JWT_ISSUER to whoever signs users in, or UPLOAD_PIPELINE_API_HOST to "
            "127.0.0.1.",
        )
    if not settings.development_tokens and not settings.jwt_issuer:
        return "only API keys are accepted; UPLOAD_PIPELINE_JWT_ISSUER names who signs users' tokens"
    async with open_token_verifier(settings) as verifier:
        return f"tokens of {verifier.issuer} are accepted"
