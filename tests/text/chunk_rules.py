"""Generated texts and the rules that every division of a text into chunks keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import regex
from hypothesis import strategies as st

from upload_pipeline.text.blocks import BlockKind, read_outline
from upload_pipeline.text.chunker import Chunk, ChunkOptions

WORDS = (
    "roof",
    "claim",
    "slate",
    "e.g.",
    "Dr.",
    "policy",
    "3.5",
    "été",
    "שלום",
    "漢字",
    "e\u0301\u0323",
    "👩‍👩‍👧",
    "🇩🇪",
    "ok",
)
SENTENCE_ENDS = (".", "!", "?", "…", "。", " -")


def sentences() -> st.SearchStrategy[str]:
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
    sentence = st.tuples(words, st.sampled_from(SENTENCE_ENDS)).map("".join)
    return st.lists(sentence, min_size=1, max_size=12).map(" ".join)


def headings() -> st.SearchStrategy[str]:
    atx = st.tuples(st.integers(1, 6), st.sampled_from(["Roof", "Limits", "**Bold**", "Über uns", "A\\. b"]))
    setext = st.sampled_from(["Title\n=====", "Sub title\n-----"])
    return st.one_of(atx.map(lambda found: f"{'#' * found[0]} {found[1]}"), setext)


def lists() -> st.SearchStrategy[str]:
    items = st.lists(st.tuples(st.sampled_from(["- ", "  - ", "1. "]), sentences()), min_size=1, max_size=8)
    return items.map(lambda found: "\n".join(mark + text for mark, text in found))


def fences() -> st.SearchStrategy[str]:
    lines = st.lists(st.sampled_from(["x = 1", "", "    y = '漢字'", "# no heading", "| a |", "z" * 130]), max_size=60)
    shape = st.sampled_from([("", "```"), ("", "~~~~"), ("> ", "```"), ("  ", "```")])

    def write(found: tuple[list[str], tuple[str, str], str]) -> str:
        code, (lead, mark), info = found
        return "\n".join([f"{lead}{mark}{info}", *(lead + line for line in code), f"{lead}{mark}"])

    return st.tuples(lines, shape, st.sampled_from(["", "python", " js {1}"])).map(write)


def tables() -> st.SearchStrategy[str]:
    cell = st.sampled_from(["", "1", "Slate roof", "漢字", "1,234.50", "long " * 20])
    row = st.tuples(cell, cell).map(lambda found: f"| {found[0]} | {found[1]} |")
    rows = st.lists(row, min_size=1, max_size=60).map("\n".join)
    return rows.map(lambda body: f"| Item | Limit |\n| --- | ---: |\n{body}")


def documents(*, with_tables: bool = True) -> st.SearchStrategy[str]:
    blobs = st.integers(1, 5000).map(lambda size: "QUJD" * (size // 4 + 1))
    quotes = sentences().map(lambda text: "> " + text.replace(". ", ".\n> "))
    kinds = [sentences(), headings(), headings(), lists(), fences(), quotes, blobs, st.just("---")]
    blocks = st.lists(st.one_of(*kinds, *([tables()] if with_tables else [])), max_size=14)
    return st.tuples(blocks, st.sampled_from(["\n\n", "\n\n\n\n"])).map(lambda found: found[1].join(found[0]) + "\n")


OPTIONS = st.sampled_from(
    [
        ChunkOptions(),
        ChunkOptions(target_chars=400, overlap_chars=80, max_bytes=1600),
        ChunkOptions(target_chars=600, overlap_chars=0, max_bytes=700),
        ChunkOptions(target_chars=2000, overlap_chars=1000, max_bytes=400),
        ChunkOptions(target_chars=100, overlap_chars=50, max_bytes=400),
    ]
)


def check_chunks(
    text: str,
    chunks: Sequence[Chunk],
    options: ChunkOptions,
    page_starts: Sequence[int] = (),
    *,
    graphemes: bool = True,
) -> None:
    """Asserts what holds of any text: coverage, order, limits, sections, pages, whole grapheme clusters."""
    if not text.strip():
        assert chunks == []
        return
    outline = read_outline(text, page_starts)
    sections = {section.ordinal: section for section in outline.sections}
    boundaries = {0, *(found.end() for found in regex.finditer(r"\X", text))}
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    assert chunks[0].start == 0
    assert chunks[-1].end == len(text)
    for chunk, following in pairwise(chunks):
        assert chunk.end == following.start
    for chunk in chunks:
        span = text[chunk.start : chunk.end]
        assert span.strip(), "a blank chunk cannot be embedded"
        assert span in chunk.text or span.strip() in chunk.text
        assert len(chunk.text.encode("utf-8", "surrogatepass")) <= options.max_bytes
        if graphemes:
            assert chunk.start in boundaries
        assert len(chunk.heading_path) == len(chunk.section_ordinals)
        assert list(chunk.section_ordinals) == sorted(set(chunk.section_ordinals))
        assert chunk.heading_path == tuple(sections[ordinal].title for ordinal in chunk.section_ordinals)
        if page_starts:
            first = chunk.start + len(span) - len(span.lstrip())
            last = chunk.start + len(span.rstrip()) - 1
            assert chunk.page_from == sum(start <= first for start in page_starts)
            assert chunk.page_to == sum(start <= last for start in page_starts)
        else:
            assert (chunk.page_from, chunk.page_to) == (None, None)


def open_fences(text: str) -> int:
    """How many fences of `text` are not closed in it."""
    return sum(block.kind is BlockKind.FENCE and not block.closed for block in read_outline(text).blocks)
