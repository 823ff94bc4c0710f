"""`doctor` on whoever looks at photos."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psycopg
import pytest
from command_runs import Terminal
from postgres_servers import Database

from tests.simulators.openai_vision import KEY, Fault, VisionSimulator
from upload_pipeline.cli.detector_check import check_detector
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.settings import Settings

SECRET = "a secret that two services share, 32+"
WEBHOOK = {"detector": "webhook", "detection_secret": SECRET, "api_public_url": "https://api.example.com"}


def settings(**values: Any) -> Settings:
    return Settings(**values, _env_file=None)


async def refusal(**values: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await check_detector(settings(**values))
    return caught.value


def paid(vision: VisionSimulator, database: Database, home: Path) -> dict[str, Any]:
    return {
        "home": home,
        "database_url": database.worker_url,
        "detector": "openai",
        "openai_api_key": KEY,
        "openai_base_url": vision.url,
    }


async def test_a_vision_model_is_shown_a_picture(tmp_path: Path, database: Database) -> None:
    async with VisionSimulator() as vision:
        asked = paid(vision, database, tmp_path)
        assert "gpt-4.1-mini" in await check_detector(settings(**asked))
        assert vision.books.asked == [["damage"]]
        error = await refusal(**asked, detection_model="gpt-99")
        assert "UPLOAD_PIPELINE_DETECTION_MODEL" in error.message


async def test_a_vision_model_is_asked_within_the_budget_and_what_it_took_is_in_the_usage(
    tmp_path: Path, database: Database
) -> None:
    async with VisionSimulator() as vision:
        asked = {**paid(vision, database, tmp_path), "detection_requests_per_minute": "1"}
        assert "not asked" not in await check_detector(settings(**asked))
        full = await check_detector(settings(**asked))
        assert full.startswith("gpt-4.1-mini at ")
        assert "not asked: the budget of requests is used up" in full
        with psycopg.connect(database.admin_url, autocommit=True) as admin:
            used = admin.execute(
                "select provider, model, operation, requests, tokens, user_id from upload_pipeline.usage_records"
            ).fetchall()
            tokens = used[0][4]
            assert used == [("openai", "gpt-4.1-mini", "trial", 1, tokens, None)]
            assert tokens > 0
            counted = admin.execute("select calls, tokens from upload_pipeline.provider_budgets").fetchall()
            assert counted == [(1, tokens)]
            pause = "select upload_pipeline.pause_provider('openai', %s, 'gpt-4.1-mini', 600, 'DETECT_QUOTA', 'empty')"
            admin.execute(pause, [key_id_of(KEY)])
        paused = await refusal(**asked)
        assert paused.code is ErrorCode.DETECT_UNAVAILABLE
        assert "is paused for" in paused.message
        assert len(vision.books.asked) == 1


async def test_a_picture_whose_answer_is_of_no_use_is_in_the_usage(tmp_path: Path, database: Database) -> None:
    async with VisionSimulator(faults={Fault.NOT_JSON: 1.0}) as vision:
        error = await refusal(**paid(vision, database, tmp_path))
        assert error.code is ErrorCode.DETECT_UNAVAILABLE
    with psycopg.connect(database.admin_url) as admin:
        used = admin.execute("select operation, requests, tokens > 0 from upload_pipeline.usage_records").fetchall()
        assert used == [("trial", 1, True)]
        under_way = admin.execute(
            "select count(*) from upload_pipeline.provider_reservations where settled_at is null"
        ).fetchone()
        assert under_way == (0,)


async def test_a_models_server_is_connected_to_and_sent_nothing() -> None:
    heard: list[bytes] = []
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.close()
        ended.set()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/detect"
    async with server:
        assert "https://api.example.com" in await check_detector(settings(**WEBHOOK, detection_url=url))
        await asyncio.wait_for(ended.wait(), 5)
    assert heard == [b""]
    error = await refusal(**WEBHOOK, detection_url=url)
    assert error.code is ErrorCode.DETECT_UNAVAILABLE
    assert "UPLOAD_PIPELINE_DETECTION_URL" in error.message


def test_it_is_a_line_of_its_own(terminal: Terminal) -> None:
    report = terminal("doctor", "--json", **WEBHOOK)
    found: dict[str, Any] = next(check for check in report.object()["checks"] if check["check"] == "detector")
    assert (report.status, found["ok"]) == (1, False)
    assert "UPLOAD_PIPELINE_DETECTION_URL is empty" in found["message"]
    assert SECRET not in report.out + report.err
