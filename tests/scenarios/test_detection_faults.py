"""Photos from their upload URL through a detector that is away and then has a bad day, to what it found in them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from photo_files import exif_of, jpeg, picture

from tests.scenarios.photo_desk import CURL, fetched, photo_desk
from tests.simulators.openai_vision import KEY, Fault, VisionSimulator, findings_of

TYPES = ["damage", "material"]
PHOTOS = 12
UNPAID = (Fault.RATE_LIMITED, Fault.SERVER_ERROR, Fault.HANG, Fault.REJECTED)
PAID = (Fault.DROPPED, Fault.TRUNCATED, Fault.NOT_JSON)


@pytest.mark.skipif(not CURL, reason="curl is not here")
async def test_photos_are_taken_while_the_detector_is_away_and_end_with_what_it_found(
    database: Any, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    async with (
        VisionSimulator(latency=0.05, faults={Fault.SERVER_ERROR: 1.0}) as vision,
        photo_desk(
            database,
            admin,
            tmp_path,
            detector="openai",
            openai_api_key=KEY,
            openai_base_url=vision.url,
            detection_timeout=1,
        ) as desk,
    ):
        photos = [jpeg(picture(300 + 20 * n, 200), exif=exif_of({274: 1 + n % 8})) for n in range(PHOTOS)]
        sent = await asyncio.gather(
            *(desk.sent(f"{n}.jpg", photo, detection_types=TYPES) for n, photo in enumerate(photos))
        )
        async with asyncio.timeout(60):
            while vision.books.faults[Fault.SERVER_ERROR] < PHOTOS:
                await asyncio.sleep(0.05)
        assert {(await desk.photo(told))["status"] for told in sent} == {"processing"}
        assert not vision.books.paid

        vision.behave()
        for fault in (*UNPAID, *PAID):
            vision.misbehave(fault, retry_after=1)
        ends = await asyncio.gather(*(desk.ended(told) for told in sent))

        # the one that the provider refused, and nothing else, needs a look
        codes = [photo["error"]["code"] for photo in ends if photo["status"] == "failed"]
        assert codes == ["DETECT_REJECTED"]
        found = [photo for photo in ends if photo["status"] == "completed"]
        assert len(found) == PHOTOS - 1
        for photo in found:
            assert photo["detector"] == "openai"
            seen = findings_of(await fetched(photo["thumbnail_url"]), TYPES)
            assert [told(one) for one in photo["detections"]] == [told(one) for one in seen]
            statuses = [change["status"] for change in photo["status_history"]]
            assert statuses == ["pending_upload", "uploaded", "processing", "completed"]
        for fault in (*UNPAID, *PAID):
            assert vision.books.faults[fault] >= 1, fault
        # each photo was paid for once, and once more for each answer that came to nothing
        assert len(vision.books.paid) == PHOTOS - 1
        assert sum(vision.books.paid.values()) == PHOTOS - 1 + len(PAID)
        assert vision.books.over_limit == 0
        recorded = await admin.fetchval(
            "select sum(requests) from upload_pipeline.usage_records where operation = 'detect'"
        )
        assert recorded == sum(vision.books.paid.values()) - vision.books.faults[Fault.DROPPED]


def told(one: dict[str, Any]) -> dict[str, Any]:
    """A thing that was found, without its box: of that, the detector's own tests tell."""
    return {name: value for name, value in one.items() if name != "box"}
