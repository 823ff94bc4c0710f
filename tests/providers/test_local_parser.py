from __future__ import annotations

import asyncio
import csv
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_files import (
    docx_of,
    encrypted_pdf,
    is_running,
    paragraph,
    pdf_of_nested_forms,
    pdf_of_objects,
    pdf_of_pages,
    pdf_with_content,
    readers_of,
    repeated,
)

from upload_pipeline import media_types
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import DOCX, HTML, MARKDOWN, PDF, PLAIN
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.providers.parsing import ParsedMarkdown, Parser

GIB = 1024**3
CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus"
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's")


@pytest.fixture(scope="module")
def parser() -> Iterator[LocalParser]:
    made = LocalParser(timeout=60, memory_bytes=GIB)
    yield made
    made.close()


async def parse(parser: LocalParser, folder: Path, content: bytes, media_type: str) -> ParsedMarkdown:
    path = folder / "file"
    path.write_bytes(content)
    return await parser.parse(path, media_type)


async def test_each_page_of_a_pdf_stands_between_form_feeds(parser: LocalParser, tmp_path: Path) -> None:
    parsed = await parse(parser, tmp_path, pdf_of_pages(["first page", "", "third (page)"]), PDF)
    assert parsed.markdown.split("\f") == ["first page", "", "third (page)"]
    assert parsed.page_count == 3
    assert parsed.warnings == ("1 of 3 pages hold no text; scanned pages are not recognised.",)


async def test_a_pdf_of_more_than_a_thousand_pages_is_read_to_its_end(parser: LocalParser, tmp_path: Path) -> None:
    parsed = await parse(parser, tmp_path, pdf_of_pages([f"page {n}" for n in range(1, 1202)]), PDF)
    assert parsed.page_count == 1201
    assert parsed.markdown.split("\f")[-1] == "page 1201"


@pytest.mark.parametrize(
    ("content", "media_type", "expected"),
    [
        (docx_of(paragraph("word")), DOCX, "word"),
        (b"<h1>T</h1><script>x</script><p>words", HTML, "# T\n\nwords"),
        (b"# T\r\nx", MARKDOWN, "# T\r\nx"),
        ("Prämie".encode("latin-1"), PLAIN, "Prämie"),
        (b"", PLAIN, ""),
    ],
)
async def test_formats_without_pages_say_so(
    parser: LocalParser, tmp_path: Path, content: bytes, media_type: str, expected: str
) -> None:
    assert await parse(parser, tmp_path, content, media_type) == ParsedMarkdown(expected, None, ())


@pytest.mark.parametrize(
    ("content", "media_type", "code"),
    [
        (encrypted_pdf(), PDF, ErrorCode.ENCRYPTED),
        (b"%PDF-1.7\nnothing more", PDF, ErrorCode.CORRUPT_FILE),
        (b"", PDF, ErrorCode.CORRUPT_FILE),
        (
            pdf_of_objects([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"]),
            PDF,
            ErrorCode.CORRUPT_FILE,
        ),
        (b"PK\x03\x04", DOCX, ErrorCode.CORRUPT_FILE),
        (bytes.fromhex("d0cf11e0a1b11ae1") + "EncryptedPackage".encode("utf-16-le"), DOCX, ErrorCode.ENCRYPTED),
    ],
)
async def test_a_file_that_does_not_open_is_refused_by_inspection_and_parse_alike(
    parser: LocalParser, tmp_path: Path, content: bytes, media_type: str, code: ErrorCode
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for look in (parser.inspect, parser.parse):
        with pytest.raises(PipelineError) as caught:
            await look(path, media_type)
        assert caught.value.code is code


async def test_inspection_passes_what_can_be_read(parser: LocalParser, tmp_path: Path) -> None:
    for content, media_type in (
        (pdf_of_pages(["x"]), PDF),
        (docx_of(paragraph("x")), DOCX),
        (b"<p>x", HTML),
        (b"", PLAIN),
    ):
        path = tmp_path / "file"
        path.write_bytes(content)
        await parser.inspect(path, media_type)


async def test_other_types_and_missing_files_are_named(parser: LocalParser, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="image/png") as caught:
        await parse(parser, tmp_path, b"x", "image/png")
    assert caught.value.code is ErrorCode.UNSUPPORTED_TYPE
    with pytest.raises(PipelineError, match="absent") as caught:
        await parser.parse(tmp_path / "absent", PDF)
    assert caught.value.code is ErrorCode.FILE_NOT_FOUND


async def test_html_nested_too_deeply_is_refused(parser: LocalParser, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="nested too deeply") as caught:
        await parse(parser, tmp_path, b"<div>" * 20_000 + b"x", HTML)
    assert caught.value.code is ErrorCode.PARSE_FAILED
    assert (await parse(parser, tmp_path, b"<div>" * 1000 + b"x", HTML)).markdown == "x"


async def test_another_process_gives_the_same(parser: LocalParser, tmp_path: Path) -> None:
    other = LocalParser(timeout=60, memory_bytes=512 * 1024**2)
    try:
        assert other.version == parser.version
        html = b"<p class='z y x'>a</p>" + b"<table><tr><td>1<td>2<tr><td>3</table>" * 5
        for content, media_type in ((pdf_of_pages(["a", "b"]), PDF), (html, HTML), (docx_of(paragraph("x")), DOCX)):
            first = await parse(parser, tmp_path, content, media_type)
            assert await parse(other, tmp_path, content, media_type) == first
    finally:
        other.close()


def test_the_parser_is_one_and_its_version_names_its_engines(parser: LocalParser) -> None:
    as_protocol: Parser = parser
    assert as_protocol.name == "local"
    assert as_protocol.version.startswith("local@1 liteparse=")


HOSTILE = {
    "a stream that unpacks to a gibibyte": lambda: pdf_with_content(repeated(b" ", GIB)),
    "a stream packed twice": lambda: pdf_with_content(
        zlib.compress(repeated(b" ", GIB), 9), b"[/FlateDecode /FlateDecode]"
    ),
    "forms nested to a thousand million drawings": lambda: pdf_of_nested_forms(30),
    "a flood of drawing operators": lambda: pdf_with_content(repeated(b"q 0 0 m 1 1 l S Q ", GIB // 4)),
    "a flood of saved states": lambda: pdf_with_content(repeated(b"q ", GIB // 8)),
    "a flood of text": lambda: pdf_with_content(repeated(b"BT /F1 12 Tf (hello world) Tj ET ", GIB // 4)),
}


@linux
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_pdf_ends_with_a_code_and_the_next_file_is_read(tmp_path: Path, name: str) -> None:
    small = LocalParser(timeout=30, memory_bytes=256 * 1024**2)
    try:
        with pytest.raises(PipelineError) as caught:
            await parse(small, tmp_path, HOSTILE[name](), PDF)
        assert caught.value.code is ErrorCode.PARSE_MEMORY, caught.value
        assert (await parse(small, tmp_path, pdf_of_pages(["x"]), PDF)).markdown == "x"
    finally:
        small.close()


@linux
async def test_a_limit_above_what_the_engine_likes_to_reserve_is_the_files_alone(tmp_path: Path) -> None:
    large = LocalParser(timeout=60, memory_bytes=GIB + GIB // 16)
    try:
        parsed = await parse(large, tmp_path, pdf_with_content(repeated(b" ", GIB // 8)), PDF)
        assert parsed.page_count == 1
    finally:
        large.close()


@linux
async def test_markup_that_exhausts_memory_ends_with_a_code(tmp_path: Path) -> None:
    small = LocalParser(timeout=60, memory_bytes=128 * 1024**2)
    try:
        with pytest.raises(PipelineError) as caught:
            await parse(small, tmp_path, b"<p>a<b>c</b>" * 400_000, HTML)
        assert caught.value.code is ErrorCode.PARSE_MEMORY
    finally:
        small.close()


async def test_a_file_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    hasty = LocalParser(timeout=0.05, memory_bytes=GIB)
    try:
        with pytest.raises(PipelineError) as caught:
            await parse(hasty, tmp_path, b"<p>a<b>c</b>" * 100_000, HTML)
        assert caught.value.code is ErrorCode.PARSE_TIMEOUT
    finally:
        hasty.close()


@linux
async def test_the_process_of_a_parse_can_be_killed_without_harm(parser: LocalParser, tmp_path: Path) -> None:
    parsing = asyncio.create_task(parse(parser, tmp_path, b"<p>a<b>c</b>" * 200_000, HTML))
    while not (children := readers_of(os.getpid())):
        assert not parsing.done()
        await asyncio.sleep(0.005)
    os.kill(children[0], signal.SIGKILL)
    with pytest.raises(PipelineError) as caught:
        await parsing
    assert caught.value.code is ErrorCode.PARSE_MEMORY
    assert not is_running(children[0])
    assert (await parse(parser, tmp_path, b"x", PLAIN)).markdown == "x"


def _manifest() -> list[Any]:
    manifest = CORPUS / "MANIFEST.csv"
    if not manifest.exists():
        reason = "the shared corpus is not beside this clone"
        return [pytest.param({}, marks=pytest.mark.skip(reason=reason), id="corpus")]
    with manifest.open(encoding="utf-8", newline="") as file:
        return [pytest.param(row, id=row["path"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("row", _manifest())
async def test_each_file_of_the_corpus_ends_as_its_manifest_says(parser: LocalParser, row: dict[str, str]) -> None:
    path = CORPUS / row["path"]
    content = path.read_bytes()
    code, parsed = None, None
    try:
        media_type = media_types.detect_media_type(row["path"], content[: media_types.HEAD_BYTES], size=len(content))
        await parser.inspect(path, media_type)
        parsed = await parser.parse(path, media_type)
    except PipelineError as error:
        code = error.code
    if path.suffix in (".jpg", ".png"):  # for the pipeline of photos; this one names their kind
        assert code in (ErrorCode.UNSUPPORTED_TYPE, ErrorCode.TYPE_MISMATCH)
    elif row["expected"].startswith("reject "):
        assert code == row["expected"].removeprefix("reject ")
    elif row["expected"] == "accept-or-reject":
        assert parsed is not None or code in (ErrorCode.CORRUPT_FILE, ErrorCode.ENCRYPTED)
    else:
        assert parsed is not None, code
        assert parsed.markdown.strip()
        assert parsed.page_count == (int(row["pages"]) if row["pages"] else None)
        if parsed.page_count:
            assert parsed.markdown.count("\f") == parsed.page_count - 1


@pytest.mark.skipif(not CORPUS.exists(), reason="the shared corpus is not beside this clone")
@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("latin1.txt", ["Prämie fällig am 1. März", "Schäden"], ["\ufffd"]),
        ("utf8-bom.txt", ["Hail policy"], ["\ufeff"]),
        ("blog.html", ["## Experiment Setup", "- gpt-3.5-turbo, a rel", "](https://"], ["<script", "Skip to main"]),
        ("encyclopedia.html", ["# Microsoft", "## History", "| --- |"], ["Jump to content", "Afrikaans"]),
        ("tables.docx", ["| Header 0.0 | Header 0.1 | Header 0.2 |\n| --- | --- | --- |\n| Cell 1.0"], []),
        ("headings.docx", ["# Section 1\n", "## Section 1.1\n", "### Section 1.2.3\n"], []),
        ("warn-report-table.pdf", ["| Notice Date | Effective | Received |"], ["![", "```text"]),
        ("policy-cyber-risk.pdf", ["# "], ["!["]),
    ],
)
async def test_what_matters_in_real_files_is_kept(
    parser: LocalParser, name: str, present: list[str], absent: list[str]
) -> None:
    path = CORPUS / name
    content = path.read_bytes()
    media_type = media_types.detect_media_type(name, content[: media_types.HEAD_BYTES], size=len(content))
    markdown = (await parser.parse(path, media_type)).markdown
    assert [text for text in present if text not in markdown] == []
    assert [text for text in absent if text in markdown] == []
