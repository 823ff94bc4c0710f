"""What one kind of upload takes, and files that are staged together and accepted or withdrawn together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from sample_documents import make_document

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.accept import accept_file, accept_path
from upload_pipeline.intake.arrival import check_arrival
from upload_pipeline.intake.placing import bring_back, confirm_placed, place, withdraw
from upload_pipeline.intake.staging import Terms, discard, open_staged, stage_path, stage_stream
from upload_pipeline.media_types import DOCX, MEDIA_TYPES, PDF


async def arriving(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture(params=["stream", "path"])
def take(request, intake, user, tmp_path):
    async def stream(data, terms):
        return await accept_file(
            intake,
            chunks=arriving(data),
            filename="a.txt",
            user_id=user,
            metadata={},
            correlation_id="",
            terms=terms,
        )

    async def path(data, terms):
        (tmp_path / "a.txt").write_bytes(data)
        return await accept_path(
            intake, path=tmp_path / "a.txt", user_id=user, metadata={}, correlation_id="", terms=terms
        )

    return stream if request.param == "stream" else path


async def test_a_type_outside_the_terms_is_refused_naming_what_is_taken(take, traces):
    with pytest.raises(PipelineError) as caught:
        await take(b"some words", Terms(1000, frozenset({PDF, DOCX})))
    assert caught.value.code is ErrorCode.UNSUPPORTED_TYPE
    assert "'a.txt' is text" in caught.value.message
    assert "PDF, DOCX" in caught.value.message
    assert caught.value.details["taken"] == [PDF, DOCX]
    assert await traces.nothing()


async def test_the_limit_of_the_terms_holds_and_not_the_one_of_the_intake(take, traces, intake):
    with pytest.raises(PipelineError) as caught:
        await take(b"x" * 11, Terms(10))
    assert caught.value.code is ErrorCode.FILE_TOO_LARGE
    assert "'a.txt'" in caught.value.message
    assert await traces.nothing()
    assert await take(b"x" * (intake.max_bytes + 1), Terms(intake.max_bytes + 1, frozenset(MEDIA_TYPES)))


async def test_staged_files_are_placed_and_withdrawn_one_by_one(intake, user, traces, tmp_path):
    path = tmp_path / "b.md"
    path.write_bytes(make_document("md", 1))
    terms = Terms(intake.max_bytes)
    async with AsyncExitStack() as stack:
        arrival = check_arrival("a.pdf", user, {}, "", 0)
        data = make_document("pdf", 1)
        first = await stack.enter_async_context(
            stage_stream(intake, chunks=arriving(data), arrival=arrival, terms=terms)
        )
        arrival = check_arrival("b.md", user, {}, "", 0)
        second = await stack.enter_async_context(stage_path(intake, path=path, arrival=arrival, terms=terms))
        assert await traces.keys() == {first.incoming}
        for staged in (first, second):
            await open_staged(intake, staged)
        assert await traces.keys() == {first.incoming, second.incoming}
        for staged in (first, second):
            await place(intake, staged)
        assert await traces.keys() == {first.raw_key, second.raw_key}
        assert first.local.read_bytes() == data
        for staged in (first, second):
            await withdraw(intake, staged)
            await withdraw(intake, staged)
        assert await traces.nothing()
        await confirm_placed(intake, first)
        assert await traces.keys() == {first.raw_key}
    assert not list(intake.scratch.iterdir())
    assert path.exists()


async def test_a_staged_file_is_discarded_or_goes_with_the_failure_that_leaves_it(intake, user, traces):
    arrival = check_arrival("a.txt", user, {}, "", 0)
    async with stage_stream(intake, chunks=arriving(b"words"), arrival=arrival, terms=Terms(10)) as staged:
        await discard(intake, staged)
        await discard(intake, staged)
        assert await traces.nothing()
    with pytest.raises(ZeroDivisionError):
        async with stage_stream(intake, chunks=arriving(b"words"), arrival=arrival, terms=Terms(10)) as staged:
            raise ZeroDivisionError
    assert await traces.nothing()
    async with stage_stream(intake, chunks=arriving(b"words"), arrival=arrival, terms=Terms(10)) as staged:
        await bring_back(intake, staged)
    assert await traces.keys() == {staged.raw_key}
