from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

import pytest
from chunk_rules import OPTIONS, check_chunks, documents, lists, open_fences, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_text_splitter import MarkdownSplitter

from upload_pipeline.text.chunker import ChunkOptions, chunk_markdown
from upload_pipeline.text.normalise import normalise_markdown


@settings(max_examples=150, deadline=None)
@given(documents(), OPTIONS)
def test_documents_are_covered_within_limits(text: str, options: ChunkOptions) -> None:
    check_chunks(text, chunk_markdown(text, options=options), options)


@settings(max_examples=100, deadline=None)
@given(st.lists(documents(), max_size=6), st.booleans())
def test_pages_are_those_that_a_chunk_touches(pages: list[str], pad: bool) -> None:
    raw = "\f".join(["", *pages, ""] if pad else pages)
    done = normalise_markdown(raw, paged=True)
    options = ChunkOptions(target_chars=500, overlap_chars=100)
    chunks = chunk_markdown(done.text, page_starts=done.page_starts, options=options)
    check_chunks(done.text, chunks, options, done.page_starts)


CHARACTERS = st.sampled_from(
    "ab .!\n\n\t`~#|-=>*1_\r\u0301\u200d\u0e33\u1100\u1161\u0915\u094d\u0937漢。👩🏽🇩🇪\u3000\u00a0\ufeff\ud800"
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(CHARACTERS, max_size=3000), st.text(max_size=1500)), OPTIONS)
def test_any_characters_at_all_are_covered_within_limits(text: str, options: ChunkOptions) -> None:
    check_chunks(text, chunk_markdown(text, options=options), options)


@settings(max_examples=100, deadline=None)
@given(documents(with_tables=False))
def test_without_tables_no_chunk_is_longer_than_target_and_stretch(text: str) -> None:
    options = ChunkOptions(target_chars=600, overlap_chars=100)
    for chunk in chunk_markdown(text, options=options):
        assert len(chunk.text.rstrip()) <= 750


@settings(max_examples=100, deadline=None)
@given(documents(), OPTIONS)
def test_the_same_text_gives_the_same_chunks(text: str, options: ChunkOptions) -> None:
    assert chunk_markdown(text, options=options) == chunk_markdown("".join(list(text)), options=options)


@settings(max_examples=100, deadline=None)
@given(documents(), st.booleans())
def test_every_fence_in_a_chunk_is_closed_in_it(text: str, cut_short: bool) -> None:
    text = text[: len(text) * 2 // 3] if cut_short else text
    for chunk in chunk_markdown(text, options=ChunkOptions(target_chars=500, overlap_chars=0)):
        assert open_fences(chunk.text) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(sentences(), min_size=1, max_size=20).map("\n\n".join))
def test_overlap_repeats_the_text_right_before_and_begins_with_a_word(text: str) -> None:
    options = ChunkOptions(target_chars=400, overlap_chars=100)
    for chunk in chunk_markdown(text, options=options)[1:]:
        repeated = chunk.text[: chunk.text.rindex(text[chunk.start : chunk.end].rstrip())]
        assert len(repeated) <= 100
        assert text.endswith(repeated, 0, chunk.start)
        before = text[chunk.start - len(repeated) - 1]
        assert repeated == "" or before.isspace() or before == "。"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(sentences(), lists()), max_size=30).map("\n\n".join))
def test_prose_gives_about_as_many_chunks_of_the_same_text_as_the_oracle(text: str) -> None:
    options = ChunkOptions(target_chars=1000, overlap_chars=0)
    ours = [text[chunk.start : chunk.end] for chunk in chunk_markdown(text, options=options)]
    theirs = [part for _, part in MarkdownSplitter(1000, trim=False).chunk_indices(text)] if text.strip() else []
    assert "".join(ours).split() == "".join(theirs).split()
    assert len(theirs) / 2 - 1 <= len(ours) <= 2 * len(theirs) + 1


class CountingText(str):
    """Text that counts the characters which slicing and searching it read."""

    __slots__ = ()
    read: ClassVar[int] = 0

    def __getitem__(self, key: object) -> str:
        part = super().__getitem__(key)  # type: ignore[index]
        CountingText.read += len(part)
        return part

    def find(self, sub: str, start: int = 0, end: int = sys.maxsize) -> int:  # type: ignore[override]
        found = super().find(sub, start, end)
        CountingText.read += (min(end, len(self)) if found < 0 else found) - start
        return found

    def rfind(self, sub: str, start: int = 0, end: int = sys.maxsize) -> int:  # type: ignore[override]
        found = super().rfind(sub, start, end)
        CountingText.read += min(end, len(self)) - (start if found < 0 else found)
        return found


def work(text: str) -> int:
    """Function calls made and characters read while chunking `text`."""
    calls = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    CountingText.read = 0
    counted = CountingText(text)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        chunk_markdown(counted)
    finally:
        sys.setprofile(before)
    return calls + CountingText.read


HOSTILE: dict[str, Callable[[int], str]] = {
    "one paragraph without spaces": lambda size: "x" * size,
    "one paragraph without spaces or plain letters": lambda size: "漢" * size,
    "headings": lambda size: "".join(f"## H {number}\n" for number in range(size // 8)),
    "headings that outrank each other": lambda size: "# a\n## b\n" * (size // 9),
    "empty headings at the end of each chunk": lambda size: ("text " * 120 + "\n" + "# a\n" * 300) * (size // 1800),
    "a table": lambda size: "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * (size // 10),
    "a row": lambda size: "| a | b |\n|---|---|\n" + "| 1 " * (size // 4),
    "quotes in quotes on one line": lambda size: "> " * (size // 2) + "x",
    "quotes in quotes on many lines": lambda size: "".join("> " * (n % 90) + "x\n" for n in range(size // 90)),
    "an open fence": lambda size: "```py\n" + "x = 1\n" * (size // 6),
    "fences that never close": lambda size: "```\n~~~\n" * (size // 8),
    "an open fence on each page": lambda size: "```\nx\n\n" * (size // 7),
    "combining marks": lambda size: "a" + "\u0301" * size,
    "flags": lambda size: "🇩" * (size // 4),
    "blank lines": lambda size: "a\n" + "\n" * size + "b",
    "blanks in code": lambda size: "```\n" + " " * size + "x\n```\n",
    "delimiter rows": lambda size: "-|-\n" * (size // 4),
    "a rule that is none": lambda size: "a\n" + "- " * (size // 2) + "x",
    "full stops": lambda size: ". " * (size // 2),
    "list items": lambda size: "- a\n" * (size // 4),
    "backticks": lambda size: "`" * size,
    "brackets in a heading": lambda size: "# " + "[" * size,
    "paragraphs of a letter": lambda size: "a\n\n" * (size // 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_grows_with_the_size_of_hostile_text(name: str) -> None:
    make = HOSTILE[name]
    small, large = work(make(16_000)), work(make(64_000))
    # Each character is read at least once, so quadratic work would be 16 times as much; a chunk more or less is
    # what the sum allows for.
    assert small >= 16_000
    assert large <= 4.6 * small + 40_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_covered_within_limits(name: str) -> None:
    text = HOSTILE[name](40_000)
    check_chunks(text, chunk_markdown(text), ChunkOptions(), graphemes=name not in ("combining marks", "flags"))


def test_a_grapheme_cluster_longer_than_a_chunk_is_cut_at_the_byte_limit() -> None:
    text = "a" + "\u0301" * 20_000
    sizes = [len(chunk.text.encode()) for chunk in chunk_markdown(text)]
    assert all(7997 <= size <= 8000 for size in sizes[:-1])


def test_a_grapheme_cluster_longer_than_the_target_and_within_the_limit_stays_whole() -> None:
    cluster = "a" + "\u0301" * 3000
    chunks = chunk_markdown("b" * 1999 + cluster + "c" * 1999)
    assert [chunk.text.count("\u0301") for chunk in chunks] == [0, 3000, 0]


@pytest.mark.parametrize("text", ["x" * 4_000_000, "".join(f"# {n}\n" for n in range(200_000))])
def test_megabytes_are_chunked(text: str) -> None:
    chunks = chunk_markdown(text)
    assert chunks[-1].end == len(text)
    assert max(len(chunk.text) for chunk in chunks) <= 2500
