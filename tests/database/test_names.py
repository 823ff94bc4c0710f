"""Names that stand both in SQL and in Python are the same ones."""

from __future__ import annotations

from typing import Any

from upload_pipeline.events import EventCode, EventSeverity
from upload_pipeline.stages import DOCUMENT_PIPELINE, DOCUMENT_STAGES, JobState


def test_stages_are_the_rows_of_the_table(admin: Any) -> None:
    rows = admin.execute(
        "select stage, position, progress, final from upload_pipeline.stages where pipeline = %s order by position",
        (DOCUMENT_PIPELINE,),
    ).fetchall()
    assert [row[:3] for row in rows] == [(row.stage.value, row.position, row.progress) for row in DOCUMENT_STAGES]
    assert [row[0] for row in rows if row[3]] == [DOCUMENT_STAGES[-1].stage.value]


def test_states_and_event_codes_are_the_labels_of_their_types(admin: Any) -> None:
    for type_name, names in (("job_state", JobState), ("event_code", EventCode), ("event_severity", EventSeverity)):
        row = admin.execute(f"select enum_range(null::upload_pipeline.{type_name})::text[]").fetchone()
        assert row[0] == [name.value for name in names], type_name
