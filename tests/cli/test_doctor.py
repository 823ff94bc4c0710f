from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from command_runs import Terminal
from postgres_servers import Database

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from tests.simulators.openai_embeddings import KEY as OPENAI_KEY
from tests.simulators.openai_embeddings import OpenAISimulator
from upload_pipeline.cli.checks import _check_embedder, _check_llamaparse
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.settings import Settings, load_settings


def test_a_sound_installation_has_no_problem(terminal: Terminal) -> None:
    report = terminal("doctor", "--show", "--json")
    assert report.status == 0
    checks = {check["check"]: check for check in report.object()["checks"]}
    assert list(checks) == [
        *("settings", "database", "extension", "migrations", "rights", "model", "workers", "sweep"),
        *("storage", "parser", "embedder", "api"),
    ]
    assert all(check["ok"] and check["message"] for check in checks.values())
    assert report.object()["settings"]["UPLOAD_PIPELINE_PARSER"] == "local"


def test_the_model_in_use_is_told_and_that_the_settings_name_another(terminal: Terminal, database: Database) -> None:
    with psycopg.connect(database.admin_url, autocommit=True) as admin:
        for active, told in (
            (None, "none is active yet"),
            (("wordllama-256", "local", 256), "wordllama-256 is the active one, 256 dimensions"),
            (("wordllama-256@128", "local", 128), "The settings name the embedding model wordllama-256, but"),
        ):
            if active is not None:
                admin.execute("delete from upload_pipeline.embedding_models")
                admin.execute("select upload_pipeline.register_model(%s, %s, %s)", active)
            report = terminal("doctor", "--json", database_url=database.worker_url)
            (model,) = [check for check in report.object()["checks"] if check["check"] == "model"]
            assert model["ok"]
            assert told in model["message"]
            assert report.status == 0


def test_a_pool_that_all_its_workers_have_left_is_a_problem(terminal: Terminal, database: Database) -> None:
    def workers() -> dict[str, object]:
        checks = terminal("doctor", "--json", database_url=database.worker_url).object()["checks"]
        (found,) = [check for check in checks if check["check"] == "workers"]
        return found

    one, other = uuid4(), uuid4()
    with psycopg.connect(database.worker_url, autocommit=True) as worker:
        register = "select upload_pipeline.register_worker(%s, 'h', 1, 'v', '{background,default}', 1)"
        leave = "select upload_pipeline.leave_pools(%s, %s)"
        assert workers() == {"check": "workers", "ok": True, "message": "none is running"}
        worker.execute(register, [one])
        worker.execute(register, [other])
        worker.execute(leave, [one, ["default"]])
        told = "2 running; some leave default to the others"
        assert workers() == {"check": "workers", "ok": True, "message": told}
        worker.execute(leave, [other, ["background", "default"]])
        found = workers()
        assert not found["ok"]
        assert "none serves default:" in str(found["message"])
        assert "UPLOAD_PIPELINE_OPENAI_API_KEY" in str(found["message"])
        worker.execute(leave, [one, []])
        assert workers()["ok"]


def test_a_store_that_is_another_databases_is_a_problem(terminal: Terminal, database: Database) -> None:
    with psycopg.connect(database.worker_url, autocommit=True) as worker:
        worker.execute("select upload_pipeline.note_upkeep('sweep', 'the mark of another database. Adopt it.')")
        report = terminal("doctor", "--json", database_url=database.worker_url)
        (found,) = [check for check in report.object()["checks"] if check["check"] == "sweep"]
        assert found == {"check": "sweep", "ok": False, "message": "the mark of another database. Adopt it."}
        assert report.status == 1
        worker.execute("select upload_pipeline.note_upkeep('sweep', null)")
        assert terminal("doctor", "--json", database_url=database.worker_url).status == 0


def test_each_bad_setting_is_a_line_of_its_own(terminal: Terminal) -> None:
    report = terminal("doctor", lease_ttl="-1", parser="magic")
    assert report.status == 1
    problems = [line for line in report.out.splitlines() if line.startswith("problem")]
    assert len(problems) == 2
    assert any("UPLOAD_PIPELINE_LEASE_TTL" in line for line in problems)
    assert report.out.splitlines()[-1] == "2 problems found."


def test_what_is_ill_is_named_with_its_remedy_and_the_rest_is_looked_at(terminal: Terminal, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder would be")
    report = terminal(
        "doctor", "--show", database_url="postgresql://u:hunter2@127.0.0.1:1/d", storage_url=f"file://{blocked}/store"
    )
    assert report.status == 1
    assert "hunter2" not in report.out + report.err
    lines = {line.split()[1]: line for line in report.out.splitlines() if line.startswith(("ok ", "problem "))}
    assert lines["database"].startswith("problem")
    assert "DATABASE_UNAVAILABLE" in lines["database"]
    assert lines["storage"].startswith("problem")
    assert lines["parser"].startswith("ok")
    assert lines["embedder"].startswith("ok")


def test_a_role_above_row_level_security_is_a_problem(terminal: Terminal, database: Database) -> None:
    report = terminal("doctor", "--json", database_url=database.admin_url)
    assert report.status == 1
    ill = [check for check in report.object()["checks"] if not check["ok"]]
    assert [check["check"] for check in ill] == ["rights"]
    assert "upload_worker" in ill[0]["message"]
    sound = terminal("doctor", "--json", database_url=database.worker_url)
    assert sound.status == 0


def test_a_database_without_the_schema_says_migrate(terminal: Terminal, empty_database: Database) -> None:
    report = terminal("doctor", "--json", database_url=empty_database.admin_url)
    assert report.status == 1
    ill = {check["check"]: check["message"] for check in report.object()["checks"] if not check["ok"]}
    assert "upload-pipeline migrate" in ill["migrations"]
    assert "upload-pipeline migrate" in ill["extension"]


def test_a_virus_scanner_is_tried_with_the_largest_file(terminal: Terminal, clamd_url: str) -> None:
    def scanner(**settings: str) -> dict[str, object]:
        report = terminal("doctor", "--json", **settings)
        found: dict[str, object] = next(check for check in report.object()["checks"] if check["check"] == "scanner")
        assert report.status == (0 if found["ok"] else 1)
        return found

    sizes = {"max_file_bytes": "1000000", "max_policy_bytes": "3000000"}
    sound = scanner(clamd_url=clamd_url, **sizes)
    assert sound["ok"]
    assert "3000000 bytes" in str(sound["message"])
    small = scanner(clamd_url=clamd_url, **(sizes | {"max_policy_bytes": "5000000"}))
    assert not small["ok"]
    assert "StreamMaxLength" in str(small["message"])


async def test_a_hosted_parser_is_asked_whether_it_takes_the_key(tmp_path: Path, database: Database) -> None:
    async with LlamaCloudSimulator() as simulator:

        def settings(**more: str) -> Settings:
            hosted = {"parser": "llamaparse", "llamaparse_base_url": simulator.url, "llamaparse_api_key": KEY}
            return load_settings(home=tmp_path, **{**hosted, "database_url": database.worker_url, **more})

        told = await _check_llamaparse(settings())
        assert told.startswith(f"cost_effective/2026-09-28 at {simulator.url}, 20 requests a minute; no webhook")
        hook = {"llamaparse_webhook_secret": "s" * 32, "api_public_url": "https://files.example.com"}
        assert (await _check_llamaparse(settings(**hook))).endswith("a webhook tells of ended parses")
        with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_API_PUBLIC_URL") as plain:
            await _check_llamaparse(settings(**{**hook, "api_public_url": "http://files.example.com"}))
        assert plain.value.code is ErrorCode.SETTING_INVALID
        with pytest.raises(PipelineError) as denied:
            await _check_llamaparse(settings(llamaparse_api_key="llx-wrong"))
        assert denied.value.code is ErrorCode.PARSE_DENIED
        assert simulator.books.paid == {}

        # each was one of the minute's requests, and the third has no room for it
        full = await _check_llamaparse(settings(llamaparse_requests_per_minute="2"))
        assert "not asked: the budget of requests is used up" in full
        assert simulator.books.requests["find"] == 3
        with psycopg.connect(database.admin_url, autocommit=True) as admin:
            count = admin.execute(
                "select count(*) from upload_pipeline.provider_reservations where settled_at is not null"
            ).fetchone()
            assert count == (3,)
            pause = "select upload_pipeline.pause_provider('llamaparse', %s, 'requests', 600, 'PARSE_QUOTA', 'empty')"
            admin.execute(pause, [key_id_of(KEY)])
        with pytest.raises(PipelineError, match=r"paused for \d+ s more") as paused:
            await _check_llamaparse(settings())
        assert paused.value.code is ErrorCode.PARSE_UNAVAILABLE
        assert simulator.books.requests["find"] == 3


async def test_a_paid_embedder_is_asked_within_the_budget_and_what_it_took_is_in_the_usage(
    tmp_path: Path, database: Database
) -> None:
    async with OpenAISimulator() as simulator:
        settings = load_settings(
            home=tmp_path,
            database_url=database.worker_url,
            embedder="openai",
            openai_api_key=OPENAI_KEY,
            openai_base_url=simulator.url,
            openai_requests_per_minute="1",
        )
        assert await _check_embedder(settings) == "text-embedding-3-small, 1536 dimensions"
        full = await _check_embedder(settings)
        assert full.startswith("text-embedding-3-small, 1536 dimensions; not asked: the budget of requests is used up")
        asked, tokens = simulator.books.requests, simulator.books.tokens
    assert asked == 1
    with psycopg.connect(database.admin_url) as admin:
        used = admin.execute(
            "select provider, model, operation, requests, tokens, user_id from upload_pipeline.usage_records"
        ).fetchall()
        assert used == [("openai", "text-embedding-3-small", "trial", 1, tokens, None)]
        counted = admin.execute("select calls, tokens from upload_pipeline.provider_budgets").fetchall()
        assert counted == [(1, tokens)]
