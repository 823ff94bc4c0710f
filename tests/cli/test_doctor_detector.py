"""`doctor` on whoever looks at photos."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from command_runs import Terminal

from tests.simulators.openai_vision import KEY, VisionSimulator
from upload_pipeline.cli.detector_check import check_detector
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings

SECRET = "a secret that two services share, 32+"
WEBHOOK = {"detector": "webhook", "detection_secret": SECRET, "api_public_url": "https://api.example.com"}


def settings(**values: Any) -> Settings:
    return Settings(**values, _env_file=None)


async def refusal(**values: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        await check_detector(settings(**values))
    return caught.value


async def test_a_vision_model_is_shown_a_picture() -> None:
    async with VisionSimulator() as vision:
        asked = {"detector": "openai", "openai_api_key": KEY, "openai_base_url": vision.url}
        assert "gpt-4.1-mini" in await check_detector(settings(**asked))
        assert vision.books.asked == [["damage"]]
        error = await refusal(**asked, detection_model="gpt-99")
        assert "UPLOAD_PIPELINE_DETECTION_MODEL" in error.message


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
