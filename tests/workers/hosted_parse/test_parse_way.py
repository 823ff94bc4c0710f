"""What LlamaParse makes of a document: uploaded, submitted and looked at once, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hosted_line import (
    TEXT,
    USER,
    OpenLine,
)

from tests.simulators.llama_cloud import KEY, LlamaCloudSimulator
from upload_pipeline.database import provider_budget
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.calls import ProviderCalls
from upload_pipeline.providers.llamaparse import LlamaParse, open_llamaparse
from upload_pipeline.providers.llamaparse_results import PROVIDER
from upload_pipeline.rate_headers import key_id_of
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.keys import parser_output_key
from upload_workers.hosted_parse import HostedParser, open_hosted_parser
from upload_workers.parse_turns import BUDGET


async def test_a_document_is_uploaded_submitted_and_looked_at_once_and_stored_with_what_it_cost(
    open_line: OpenLine,
) -> None:
    line = await open_line()
    await line.step()
    row = await line.row()
    assert line.job.stage == "parsing"
    assert (row["parse_provider"], row["parse_tier"], row["parse_version"]) == (
        "llamaparse",
        "cost_effective",
        "2026-09-28",
    )
    assert row["parse_id"].startswith("pjb-")
    assert row["parse_submitted_at"] is not None

    # too early for a look: no request
    delay = await line.step()
    assert delay is not None
    assert 4 < delay.total_seconds() <= 5
    await line.claim()
    await line.pass_time(10)
    await line.step()
    await line.step()
    assert line.requests == {"find": 1, "upload": 1, "submit": 1, "poll": 1}
    row = await line.row()
    assert (row["parser"], row["page_count"], row["warnings"]) == ("llamaparse@cost_effective/2026-09-28", 4, [])
    text = await line.context.store.get_text(row["markdown_key"], 10**6)
    assert "# Page 4" in text
    assert len(row["page_starts"]) == 4
    assert await line.context.store.head(parser_output_key(USER, line.document)) is None

    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["provider"], used["model"], used["operation"]) == ("llamaparse", "cost_effective/2026-09-28", "parse")
    assert (used["pages"], used["credits"], used["cost_micros"], used["job_id"]) == (4, 12, 15_000, line.job.job_id)
    (sent,) = line.simulator._files.values()
    assert (sent.name, sent.external_file_id) == ("claim.pdf", str(line.document))
    assert list(line.context.scratch.iterdir()) == []


async def test_a_job_that_ends_before_its_bill_is_written_costs_what_its_pages_cost(open_line: OpenLine) -> None:
    line = await open_line()
    line.simulator.billed = False
    await line.parsed()
    (used,) = await line.admin.fetch("select * from upload_pipeline.usage_records")
    assert (used["pages"], used["credits"], used["cost_micros"]) == (4, 12, 15_000)


@pytest.mark.parametrize("media_type", [TEXT, "text/markdown"])
async def test_text_is_parsed_here_and_costs_nothing(open_line: OpenLine, media_type: str) -> None:
    line = await open_line(b"# One\n\nand a sentence of it\n", media_type)
    while line.job.stage != "parse_validated":
        await line.step()
    assert line.requests == {}
    assert (await line.row())["parse_id"] is None
    assert (await line.row())["parser"].startswith("local@")


async def test_waits_between_looks_grow_to_a_minute_and_end_at_the_limit(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_parse_timeout=400.0)
    line.simulator.running = 3600
    await line.submitted()
    seen = []
    for seconds in (0, 90, 155, 100, 38):
        await line.pass_time(seconds)
        delay = await line.step()
        assert delay is not None
        seen.append(round(delay.total_seconds()))
        await line.claim()
    # at 10, 100, 255, 355 and 393 s
    assert seen == [5, 50, 60, 45, 7]
    assert await line.retries() == 0


async def test_requests_wait_for_the_budget_of_all_workers(open_line: OpenLine) -> None:
    line = await open_line(llamaparse_requests_per_minute=2)
    delay = await line.step()
    assert delay is not None
    assert 40 < delay.total_seconds() <= 66
    assert line.requests == {"find": 1, "upload": 1}
    granted = await provider_budget.reserve(
        line.context.db,
        provider=PROVIDER,
        key_id=key_id_of(KEY),
        model=BUDGET,
        requests=1,
        tokens=0,
        request_limit=2,
    )
    assert isinstance(granted, provider_budget.Wait)
    # no place in line is left behind, and the call was not announced
    (submission,) = await line.submissions()
    assert submission["called_at"] is None


def test_the_client_is_opened_as_the_settings_say(tmp_path: Path) -> None:
    def opened(**settings: Any) -> HostedParser | None:
        return open_hosted_parser(None, ProviderCalls(), load_settings(home=tmp_path, **settings))  # type: ignore[arg-type]

    assert opened() is None
    with pytest.raises(PipelineError, match="LLAMAPARSE_API_KEY") as caught:
        opened(parser="llamaparse")
    assert caught.value.code is ErrorCode.SETTING_INVALID
    follower, parser = opened(llamaparse_api_key=KEY), opened(parser="llamaparse", llamaparse_api_key=KEY)
    assert follower is not None
    assert parser is not None
    assert (follower.takes_new, parser.takes_new) == (False, True)
    assert isinstance(parser.client, LlamaParse)
    assert (parser.client.tier, parser.client.tier_version) == ("cost_effective", "2026-09-28")


@pytest.mark.parametrize(
    ("value", "why"),
    [("latest", "name a date"), ("2026-9-28", "no date"), ("2026-13-01", "no date"), ("20260928", "no date")],
)
def test_a_version_is_a_date(value: str, why: str) -> None:
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_LLAMAPARSE_VERSION") as caught:
        load_settings(llamaparse_version=value)
    assert why in caught.value.message


@pytest.mark.parametrize("end", ["", "/"])
async def test_the_address_may_end_in_a_slash_and_has_no_path(end: str, simulator: LlamaCloudSimulator) -> None:
    client = open_llamaparse(load_settings(llamaparse_api_key=KEY, llamaparse_base_url=simulator.url + end))
    assert client is not None
    assert await client.find_file("nobody's") is None
    await client.close()
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_LLAMAPARSE_BASE_URL"):
        load_settings(llamaparse_base_url=f"{simulator.url}/api{end}")
