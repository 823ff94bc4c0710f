"""LlamaParse: one page by the tier that is the default, 3 credits, or about 0.4 cents."""

from __future__ import annotations

import asyncio
import os
import time
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import llama_cloud
from live_keys import needed

from tests.providers.sample_files import pdf_of_pages
from upload_pipeline.providers.llamaparse import BASE_URL, TIER_VERSIONS, LlamaParse
from upload_pipeline.settings import Settings

PARSE_SECONDS = 180.0


async def test_llamaparse(tmp_path: Path) -> None:
    (key,) = needed("LLAMA_CLOUD_API_KEY")
    base_url = os.environ.get("LLAMA_CLOUD_BASE_URL") or BASE_URL
    tier = Settings.model_fields["llamaparse_tier"].default
    path = tmp_path / "live.pdf"
    # Other bytes each time: the same ones may be answered from what was parsed before.
    path.write_bytes(pdf_of_pages([f"Hail damage is covered. {uuid4()}"]))
    external_id = sha256(path.read_bytes()).hexdigest()
    parser = LlamaParse(api_key=key, tier=tier, version=TIER_VERSIONS[tier], base_url=base_url)
    try:
        file_id = await parser.upload(path, name="live.pdf", media_type="application/pdf", external_id=external_id)
        try:
            assert await parser.find_file(external_id) == file_id
            parse_id = await parser.submit(file_id, document="live test", submission=str(uuid4()))
            give_up = time.monotonic() + PARSE_SECONDS
            while (finished := await parser.look(parse_id)) is None:
                assert time.monotonic() < give_up, f"{parse_id} is not parsed within {PARSE_SECONDS:g} s"
                await asyncio.sleep(2)
        finally:
            async with llama_cloud.AsyncLlamaCloud(api_key=key, base_url=base_url) as client:
                await client.files.delete(file_id)
    finally:
        await parser.close()
    assert (finished.page_count, finished.failed_pages) == (1, ())
    assert finished.markdown.strip()
    assert finished.credits is None or finished.credits > 0
