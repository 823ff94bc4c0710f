from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.arrival import check_arrival
from upload_pipeline.intake.metadata import MAX_METADATA_BYTES, check_metadata


def test_what_may_be_stored_comes_back_as_it_is():
    metadata = {"author": "Inès", "pages": 3, "share": 0.5, "final": True, "tags": ["a", 1, False], "none": []}
    assert check_metadata(metadata) == metadata


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"due": None}, "'due'"),
        ({"nested": {"a": 1}}, "'nested'"),
        ({"matrix": [[1]]}, "'matrix'"),
        ({"share": float("nan")}, "'share'"),
        ({"share": [float("inf")]}, "'share'"),
        ({"note": "a\0b"}, "'note'"),
        ({"note": ["a\0b"]}, "'note'"),
        ({"note": "\ud800"}, "'note'"),
        ({"no\0te": "a"}, "no\\x00te"),
        ({"": "a"}, "''"),
        ({"k" * 101: "a"}, "101 characters"),
        ({"number": 10**400}, "'number'"),
        ({"small": 1, "large": "x" * MAX_METADATA_BYTES}, "'large'"),
        ({7: "a"}, "7"),
        (["a"], "list"),
    ],
)
def test_metadata_that_cannot_be_stored_is_refused_by_name(metadata, named):
    with pytest.raises(PipelineError) as caught:
        check_metadata(metadata)
    assert caught.value.code is ErrorCode.INVALID_METADATA
    assert named in caught.value.message


def test_the_limit_of_metadata_counts_bytes_of_the_whole():
    room = MAX_METADATA_BYTES - len('{"k": ""}')
    assert check_metadata({"k": "x" * room})
    with pytest.raises(PipelineError):
        check_metadata({"k": "x" * (room - 1) + "é"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"user_id": UUID(int=0)}, "user_id"),
        ({"correlation_id": "x" * 201}, "correlation_id"),
        ({"correlation_id": "a\0"}, "correlation_id"),
        ({"priority": 40_000}, "priority"),
    ],
)
def test_what_the_database_would_refuse_is_refused_before_a_byte_is_read(change, named):
    arguments = {"filename": "a.txt", "user_id": uuid4(), "metadata": {}, "correlation_id": "", "priority": 0}
    with pytest.raises(PipelineError) as caught:
        check_arrival(**{**arguments, **change})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert named in caught.value.message
