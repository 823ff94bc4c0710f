"""Names that stand both in SQL and in Python are the same ones."""

from __future__ import annotations

from typing import Any

import pytest

from upload_pipeline.events import EventCode, EventSeverity
from upload_pipeline.stages import (
    DOCUMENT_PIPELINE,
    DOCUMENT_STAGES,
    PHOTO_PIPELINE,
    PHOTO_STAGES,
    JobState,
    PhotoStatus,
    StageRow,
)


@pytest.mark.parametrize(("pipeline", "stages"), [(DOCUMENT_PIPELINE, DOCUMENT_STAGES), (PHOTO_PIPELINE, PHOTO_STAGES)])
def test_stages_are_the_rows_of_the_table(admin: Any, pipeline: str, stages: tuple[StageRow, ...]) -> None:
    rows = admin.execute(
        "select stage, position, progress, final from upload_pipeline.stages where pipeline = %s order by position",
        (pipeline,),
    ).fetchall()
    assert [row[:3] for row in rows] == [(row.stage.value, row.position, row.progress) for row in stages]
    assert [row[0] for row in rows if row[3]] == [stages[-1].stage.value]


def test_every_status_of_a_photo_is_one_that_the_database_gives(admin: Any) -> None:
    rows = admin.execute(
        """
        select distinct upload_pipeline.photo_status(s.stage, e.state, u.uploaded) as status
          from upload_pipeline.stages s, unnest(enum_range(null::upload_pipeline.job_state)) e (state),
               (values (true), (false)) u (uploaded)
         where s.pipeline = 'photo'
        """
    ).fetchall()
    assert {row.status for row in rows} == set(PhotoStatus)


def test_states_and_event_codes_are_the_labels_of_their_types(admin: Any) -> None:
    for type_name, names in (("job_state", JobState), ("event_code", EventCode), ("event_severity", EventSeverity)):
        row = admin.execute(f"select enum_range(null::upload_pipeline.{type_name})::text[]").fetchone()
        assert row[0] == [name.value for name in names], type_name
