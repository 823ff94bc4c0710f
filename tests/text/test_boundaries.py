from __future__ import annotations

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from upload_pipeline.text.boundaries import (
    after_blank,
    byte_cut,
    grapheme_cut,
    item_cut,
    line_cut,
    overlap_start,
    sentence_cut,
    word_cut,
)

CLUSTERS = st.lists(
    st.sampled_from(
        [
            "a",
            " ",
            "é",
            "e\u0301",
            " \u0301",
            "👩🏽‍🚒",
            "🇩🇪",
            "🇩",
            "漢",
            "한",
            "\u1100\u1161",
            *("\n", "क्ष", "\r\n", "\u200d"),
        ]
    ),
    min_size=1,
    max_size=60,
).map("".join)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("One. Two. Three", "Three"),
        ('He left ("now!") Then', "Then"),
        ("See Fig. 3 of Mr. Smith", None),
        ("J. Smith", None),
        ("Costs 3.5 or e.g. 4", None),
        ("Use v1.2 here. then not", None),
        ("First.\n2. Second item", "2. Second item"),
        ("一。二！三", "三"),
        ("ماذا؟ نعم", "نعم"),
        ("...", None),
    ],
)
def test_where_sentences_start(text: str, rest: str | None) -> None:
    cut = sentence_cut(text, 0, len(text))
    assert (None if cut in (None, len(text)) else text[cut:]) == rest


def test_words_start_behind_blank_space_or_a_clause() -> None:
    assert word_cut("one two three", 0, 10) == 8
    assert word_cut("one two three", 0, 7) == 7
    assert word_cut("屋根、壁と床", 0, 5) == 3
    assert word_cut("unbroken", 0, 5) is None


def test_lines_and_items_start_at_the_given_offset_at_the_latest() -> None:
    text = "- a\n  - b\n- c\n  - d\n"
    assert line_cut(text, 0, 9) == 4
    assert line_cut(text, 0, 10) == 10
    assert line_cut(text, 10, 13) is None
    assert item_cut(text, 0, len(text)) == 10
    assert item_cut(text, 0, 9) == 4
    assert item_cut(text, 0, 3) is None


def test_blank_space_goes_with_the_part_before_and_indentation_with_its_line() -> None:
    assert after_blank("a   b", 1, 5) == 4
    assert after_blank("a \n\n  b", 1, 7) == 4
    assert after_blank("a\n  b", 2, 5) == 2
    assert after_blank("a  \n ", 1, 5) == 5
    assert after_blank("a  \u0301b", 1, 5) == 2


@settings(max_examples=300, deadline=None)
@given(CLUSTERS, st.data())
def test_no_cut_parts_a_grapheme_cluster(text: str, data: st.DataObject) -> None:
    boundaries = [0, *(found.end() for found in regex.finditer(r"\X", text))]
    start = data.draw(st.sampled_from(boundaries[:-1]))
    high = data.draw(st.integers(start + 1, len(text)))
    cut = grapheme_cut(text, start, high, len(text))
    expected = [offset for offset in boundaries if start < offset <= high]
    assert cut == (expected[-1] if expected else next(offset for offset in boundaries if offset > high))
    word = word_cut(text, start, high)
    assert word is None or word in boundaries
    assert overlap_start(text, 0, cut, 10) in boundaries


def test_a_cluster_that_passes_the_ceiling_is_cut_there() -> None:
    text = "a" + "\u0301" * 50
    assert grapheme_cut(text, 0, 5, 20) == 20
    assert grapheme_cut(text, 0, 5, 50) == 50
    assert grapheme_cut(text, 0, 5, 51) == 51


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.integers(0, 90), st.integers(4, 200))
def test_byte_cut_is_the_furthest_that_fits(text: str, end: int, budget: int) -> None:
    end = min(end, len(text))
    cut = byte_cut(text, 0, end, budget)
    assert len(text[:cut].encode("utf-8", "surrogatepass")) <= budget
    assert cut == end or len(text[: cut + 1].encode("utf-8", "surrogatepass")) > budget


def test_overlap_starts_with_a_sentence_else_a_word_else_not_at_all() -> None:
    text = "First one here. Second one here. Third"
    assert text[overlap_start(text, 0, 33, 25) : 33] == "Second one here. "
    assert text[overlap_start(text, 0, 15, 10) : 15] == "one here."
    assert overlap_start("x" * 100, 0, 90, 20) == 90
    assert overlap_start(text, 16, 33, 30) == 16
