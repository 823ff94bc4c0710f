from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.api.multipart import MultipartForm
from upload_pipeline.errors import ErrorCode, PipelineError

BOUNDARY = "a-boundary"
HEADER = f"multipart/form-data; boundary={BOUNDARY}"
Parts = list[tuple[str, str | None, bytes]]


def form_of(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    """A body of parts, each given as the rest of its Content-Disposition and its bytes."""
    made = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (BOUNDARY.encode(), head.encode(), data)
        for head, data in parts
    )
    return made + b"--" + BOUNDARY.encode() + end


async def cut(body: bytes, size: int) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]


async def parsed(body: bytes, *, size: int = 1 << 16, header: str = HEADER, max_bytes: int = 1 << 24) -> Parts:
    form = MultipartForm(header, cut(body, size), max_bytes=max_bytes)
    return [(part.name, part.filename, await part.read(1 << 24)) async for part in form.parts()]


async def refusal(body: bytes, **given: Any) -> PipelineError:
    with pytest.raises(PipelineError) as raised:
        await parsed(body, **given)
    return raised.value


def fields(error: PipelineError) -> Sequence[str]:
    return [field["field"] for field in error.details["fields"]]


# Bytes that look like boundaries are what such parsers break at.
pieces = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"-",
        b"\r\n",
        b"--",
        b"a",
        b"a-boundary",
        b"\r\n--",
        b"\r\n--a-boundar",
        b"x" * 40,
        b"\x00",
        b"\r\r",
    ]
)
contents = st.lists(pieces, max_size=12).map(b"".join).filter(lambda data: b"\r\n--a-boundary" not in b"\r\n" + data)


@given(st.lists(contents, max_size=4), st.integers(1, 90))
async def test_parts_come_as_they_were_sent_however_the_body_is_cut(sent: list[bytes], size: int) -> None:
    body = form_of(*((f'name="part{number}"; filename="f{number}"', data) for number, data in enumerate(sent)))
    expected = [(f"part{number}", f"f{number}", data) for number, data in enumerate(sent)]
    assert await parsed(body, size=size) == expected


@given(st.binary(max_size=400), st.integers(1, 50))
async def test_what_is_no_form_is_refused_and_never_a_fault(body: bytes, size: int) -> None:
    error = await refusal(body, size=size)
    assert (error.code, fields(error)) == (ErrorCode.INVALID_ARGUMENT, ["body"])


@given(contents, st.data())
async def test_a_form_that_breaks_off_anywhere_is_refused(content: bytes, data: st.DataObject) -> None:
    body = form_of(('name="file"; filename="a.txt"', content), end=b"--")
    at = data.draw(st.integers(0, len(body) - 1))
    error = await refusal(body[:at], size=data.draw(st.integers(1, 60)))
    assert "ends before its last boundary" in error.message


@given(st.integers(1, 80), st.binary(min_size=1, max_size=60).filter(lambda data: data.strip(b"\r\n")))
async def test_a_form_that_goes_on_after_its_end_is_refused(size: int, more: bytes) -> None:
    body = form_of(('name="file"; filename="a.txt"', b"text"))
    error = await refusal(body + more, size=size)
    assert "goes on after its last boundary" in error.message


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_line_ends_around_a_form_are_fine(size: int) -> None:
    body = form_of(('name="a"', b"1"))
    assert await parsed(b"\r\n" + body + b"\r\n\r\n", size=size) == [("a", None, b"1")]
    assert await parsed(form_of(end=b"--"), size=size) == []


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('filename="Räumung.pdf"', "Räumung.pdf"),
        ('filename="a \\"quoted\\" name.pdf"', 'a "quoted" name.pdf'),
        ("filename=plain.pdf", "plain.pdf"),
        ('filename="semi;colon.pdf"', "semi;colon.pdf"),
        ('filename=""', ""),
        ('FileName="case.pdf"', "case.pdf"),
        ('filename="../../etc/passwd"', "../../etc/passwd"),
    ],
)
async def test_file_names_are_read_as_they_were_written(written: str, read: str) -> None:
    assert await parsed(form_of((f'name="file"; {written}', b"x"))) == [("file", read, b"x")]


async def test_a_file_name_that_is_not_utf_8_is_read_all_the_same() -> None:
    body = form_of(('name="file"; filename="NAME"', b"x")).replace(b"NAME", "Räumung.pdf".encode("latin-1"))
    assert await parsed(body) == [("file", "R\ufffdumung.pdf", b"x")]


@pytest.mark.parametrize(
    "header",
    ["multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""', HEADER + "x" * 300],
)
async def test_a_header_without_a_boundary_is_named(header: str) -> None:
    assert fields(await refusal(form_of(), header=header)) == ["Content-Type"]


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Type: text/plain",
        b"Content-Disposition: attachment; name=file",
        b"Content-Disposition: form-data",
        b"Content-Disposition: form-data; name=file\r\nno colon",
        b"X: " + b"y" * 9000,
        b"\r\n".join(b"X-%d: y" % number for number in range(30)),
    ],
)
async def test_a_part_whose_head_is_none_is_refused(head: bytes) -> None:
    body = b"--a-boundary\r\n" + head + b"\r\n\r\nx\r\n--a-boundary--"
    assert fields(await refusal(body)) == ["body"]


async def test_bytes_that_stand_for_others_are_refused_rather_than_stored() -> None:
    body = form_of(('name="file"; filename="a.txt"\r\nContent-Transfer-Encoding: base64', b"eA=="))
    assert fields(await refusal(body)) == ["file"]
    plain = form_of(('name="file"; filename="a.txt"\r\nContent-Transfer-Encoding: 8BIT', b"x"))
    assert await parsed(plain) == [("file", "a.txt", b"x")]


async def test_a_body_beyond_the_limit_is_cut_off_there() -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield form_of(('name="file"; filename="a.txt"', b""))[:60]
        while True:
            read += 1000
            yield b"\r\n" * 500

    form = MultipartForm(HEADER, endless(), max_bytes=100_000)
    part = await anext(form.parts())
    with pytest.raises(PipelineError) as raised:
        [chunk async for chunk in part.chunks()]
    assert (raised.value.code, raised.value.details["max_bytes"]) == (ErrorCode.FILE_TOO_LARGE, 100_000)
    assert read <= 101_000


async def test_a_part_that_is_too_large_to_be_held_is_named() -> None:
    form = MultipartForm(HEADER, cut(form_of(('name="metadata"', b"x" * 5000)), 700), max_bytes=1 << 20)
    part = await anext(form.parts())
    with pytest.raises(PipelineError) as raised:
        await part.read(1000)
    assert fields(raised.value) == ["metadata"]


async def test_no_more_is_read_than_is_asked_for_and_what_nobody_wants_is_passed_over() -> None:
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        async for chunk in cut(form_of(('name="a"', b"x" * 1000), ('name="b"', b"y")), 100):
            taken += len(chunk)
            yield chunk

    form = MultipartForm(HEADER, counted(), max_bytes=1 << 20)
    names = []
    async for part in form.parts():
        names.append(part.name)
        if part.name == "a":
            chunks = part.chunks()
            await anext(chunks)
            assert taken <= 200
    assert names == ["a", "b"]
