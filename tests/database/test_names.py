"""Names that stand both in SQL and in Python are the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upload_pipeline.events import EventCode, EventSeverity
from upload_pipeline.stages import DOCUMENT_PIPELINE, DOCUMENT_STAGES, JobState

if TYPE_CHECKING:
    import asyncpg


async def test_stages_are_the_rows_of_the_table(admin: asyncpg.Connection) -> None:
    rows = await admin.fetch(
        "select stage, position, progress, final from upload_pipeline.stages where pipeline = $1 order by position",
        DOCUMENT_PIPELINE,
    )
    assert [(row["stage"], row["position"], row["progress"]) for row in rows] == [
        (row.stage.value, row.position, row.progress) for row in DOCUMENT_STAGES
    ]
    assert [row["stage"] for row in rows if row["final"]] == [DOCUMENT_STAGES[-1].stage.value]


async def test_states_and_event_codes_are_the_labels_of_their_types(admin: asyncpg.Connection) -> None:
    for type_name, names in (("job_state", JobState), ("event_code", EventCode), ("event_severity", EventSeverity)):
        labels = await admin.fetchval(
            f"select enum_range(null::upload_pipeline.{type_name})::text[]",
        )
        assert labels == [name.value for name in names], type_name
