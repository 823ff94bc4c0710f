from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.text.normalise import NormalisedMarkdown, check_text, normalise_markdown


def again(done: NormalisedMarkdown) -> NormalisedMarkdown:
    """Normalises the pages of `done` once more."""
    if not done.page_starts:
        return normalise_markdown(done.text, paged=False)
    ends = [*done.page_starts[1:], len(done.text)]
    pages = [done.text[start:end] for start, end in zip(done.page_starts, ends, strict=True)]
    return normalise_markdown("\f".join(pages), paged=True)


def text_of(raw: str) -> str:
    return normalise_markdown(raw, paged=False).text


def test_line_ends_of_every_kind_become_newlines() -> None:
    assert text_of("a\r\nb\rc\u0085d\u2028e\u2029f\vg") == "a\nb\nc\nd\ne\nf\ng\n"


def test_byte_order_marks_controls_and_noncharacters_go_and_tabs_stay() -> None:
    assert text_of("\ufeffa\x00b\x07c\x7f\x9fd\ufeff\tx\ufffe\U0001ffffe") == "abcd\txe\n"


def test_surrogates_become_storable() -> None:
    assert text_of("a\ud83d\ude00b\ud800c") == "a\U0001f600b\ufffdc\n"


def test_text_is_composed() -> None:
    assert text_of("e\u0301") == "\u00e9\n"


def test_a_character_removed_between_a_letter_and_its_accent_does_not_keep_them_apart() -> None:
    assert text_of("e\x00\u0301") == "\u00e9\n"


def test_long_runs_of_marks_are_divided_before_they_are_ordered() -> None:
    marks = "\u0301\u0327" * 200_000
    done = text_of("a" + marks)  # without the joiners this takes minutes
    assert done.count("\u034f") == (len(marks) - 1) // 30
    assert done.replace("\u034f", "").count("\u0327") == 200_000
    assert text_of(done) == done


def test_blank_space_at_line_ends_and_runs_of_blank_lines_go() -> None:
    assert text_of("a  \n\n \t\n\n\nb\u00a0\nc") == "a\n\nb\nc\n"


def test_code_is_kept_as_it_is() -> None:
    code = "```python\nx = 1  \n\n\n\n\ny = 2\n```\n"
    assert text_of("a\n\n\n\n" + code + "\n\n\n\nb") == "a\n\n" + code + "\nb\n"


def test_a_fence_of_one_kind_is_not_closed_by_the_other_or_by_a_shorter_one() -> None:
    code = "````\n```\n~~~~\n\n\n\nx\n````\n"
    assert text_of(code) == code


def test_indentation_of_the_first_line_stays() -> None:
    assert text_of("\n\n    code\n") == "    code\n"


def test_blank_input_is_empty_text() -> None:
    assert normalise_markdown("", paged=False) == NormalisedMarkdown("", ())
    assert normalise_markdown(" \n\t\n", paged=False) == NormalisedMarkdown("", ())


def test_pages_start_where_their_text_starts() -> None:
    done = normalise_markdown("\n\nOne  \n\f\n Two\n\n\f\f \n\fFive\f", paged=True)
    assert done.text == "One\n\n Two\n\nFive\n"
    assert [done.text[start:][:4] for start in done.page_starts] == ["One\n", " Two", "Five", "Five", "Five", ""]


def test_leading_empty_pages_keep_their_numbers() -> None:
    done = normalise_markdown("\f\fThree", paged=True)
    assert done == NormalisedMarkdown("Three\n", (0, 0, 0))


def test_a_format_without_pages_has_none_and_a_pdf_of_one_page_has_one() -> None:
    assert normalise_markdown("a", paged=False).page_starts == ()
    assert normalise_markdown("a", paged=True).page_starts == (0,)
    assert normalise_markdown("a\fb", paged=False).page_starts == (0, 3)


def test_a_fence_left_open_on_a_page_does_not_reach_the_next() -> None:
    done = normalise_markdown("```\nx\f a  \n\n\n\nb", paged=True)
    assert done.text == "```\nx\n\n a\n\nb\n"


PIECES = st.sampled_from(
    [
        *("```\n", "~~~~\n", "> ```\n", "- ```x\n", "a", " ", "  \n", "\n", "\n\n\n", "\r\n", "\r", "\t", "\f"),
        *(
            "\u0301",
            "\u0344",
            "\ud800",
            "\udc00",
            "\x00",
            "\ufeff",
            "\u0958",
            "\u05e9\u05c1",
            "é",
            "漢",
            "\u2028",
            "\x85",
        ),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=200)), st.booleans())
def test_doing_it_again_changes_nothing_and_the_result_is_storable(raw: str, paged: bool) -> None:
    done = normalise_markdown(raw, paged=paged)
    assert again(done) == done
    assert unicodedata.is_normalized("NFC", done.text)
    done.text.encode("utf-8")
    assert not set(done.text) & {"\x00", "\r", "\f", "\ufeff"}
    assert done.text == "" or (done.text.endswith("\n") and done.text.strip())
    assert list(done.page_starts) == sorted(done.page_starts)
    if paged or "\f" in raw:
        assert len(done.page_starts) == raw.count("\f") + 1
        assert done.page_starts[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        "a", "7", "שלום", "مرحبا", "漢字", "हिन्दी", "| 1 | 2 |\n|---|---|\n| 3 | 4 |\n", "12.5\n13.5\n",
        "```\ncode\n```\n", "![A slate roof](roof.png)", "[link](x)", "x \ufffd y z",
    ],
)  # fmt: skip
def test_text_of_any_script_and_numbers_pass(text: str) -> None:
    check_text(text, None)
    check_text(text, 3)


@pytest.mark.parametrize(
    ("text", "pages", "reason", "says"),
    [
        ("", 3, "no_text", "OCR"),
        ("", 1, "no_text", "scanned"),
        ("", None, "no_text", "no letter"),
        ("```text\n\n```\n\n```text\n\n```\n", 3, "no_text", "OCR"),
        ("![](img_p1_1.png)\n\n<!-- image -->\n", 1, "no_text", "OCR"),
        ("--- *** ... ___ |---|---|", None, "no_letters", "no letter"),
        ("\ufffd\ufffd\ufffd ab", 2, "unreadable_characters", "fonts"),
        ("\ue000\ue001\ue002\ue003", None, "unreadable_characters", "OCR"),
        ("(cid:12)(cid:7)(cid:31)", 1, "unreadable_characters", "fonts"),
    ],
)
def test_text_with_nothing_to_find_is_refused_with_the_reason(
    text: str, pages: int | None, reason: str, says: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        check_text(text, pages)
    assert caught.value.code is ErrorCode.PARSE_EMPTY
    assert not caught.value.retryable
    assert caught.value.details == {"reason": reason, "characters": len(text), "page_count": pages}
    assert says in caught.value.message


def test_checking_takes_no_more_than_a_pass_over_hostile_text() -> None:
    for text in ("![" * 200_000, "![](" * 100_000, "](" * 200_000, "<!--" * 100_000, "(cid:" * 100_000):
        check_text("a " + text + " b c d e f", None)
