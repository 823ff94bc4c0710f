from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from chunk_rules import check_chunks

from upload_pipeline.text.chunker import CHUNKER, Chunk, ChunkOptions, chunk_markdown
from upload_pipeline.text.normalise import normalise_markdown

SMALL = ChunkOptions(target_chars=400, overlap_chars=80)
SENTENCE = "The adjuster photographs every slope of the roof. "


def prose(characters: int) -> str:
    return (SENTENCE * (characters // len(SENTENCE) + 1))[:characters].rstrip()


def paths(chunks: list[Chunk]) -> list[tuple[str, ...]]:
    return [chunk.heading_path for chunk in chunks]


# headings


def test_a_section_starts_a_chunk_and_the_path_names_where_it_stands() -> None:
    headings = ("# Handbook", "## Roof", "### Slates", "## Walls")
    text = "".join(f"{heading}\n\n{prose(300)}\n\n" for heading in headings)
    chunks = chunk_markdown(text, options=SMALL)
    assert paths(chunks) == [
        ("Handbook",),
        ("Handbook", "Roof"),
        ("Handbook", "Roof", "Slates"),
        ("Handbook", "Walls"),
    ]
    assert [chunk.section_ordinals for chunk in chunks] == [(0,), (0, 1), (0, 1, 2), (0, 3)]
    assert chunks[1].text.startswith("## Roof\n"), "nothing is repeated in front of a heading"


def test_a_title_and_a_short_lead_go_with_the_first_section() -> None:
    text = f"# Handbook\n\n## Roof\n\n{prose(300)}\n"
    (chunk,) = chunk_markdown(text, options=SMALL)
    assert chunk.heading_path == ("Handbook", "Roof"), "the heading without content of its own is passed over"
    assert chunk.section_ordinals == (0, 1)


def test_tiny_sections_share_a_chunk_up_to_half_the_target() -> None:
    text = "".join(f"## Term {number}\n\nMeans this.\n\n" for number in range(40))
    chunks = chunk_markdown(text, options=SMALL)
    assert all(150 <= len(chunk.text) <= 200 for chunk in chunks[:-2])
    assert all(chunk.text.startswith("## Term") for chunk in chunks)


def test_a_short_last_section_does_not_swallow_a_chapter() -> None:
    text = f"# One\n\n{prose(300)}\n\n## Tail\n\n{prose(90)}\n\n# Two\n\n{prose(250)}\n"
    chunks = chunk_markdown(text, options=ChunkOptions(target_chars=1000, overlap_chars=0))
    assert paths(chunks) == [("One",), ("Two",)]


def test_a_heading_is_not_left_at_the_end_of_a_chunk() -> None:
    text = f"{prose(390)}\n\n## Empty\n\n### Full\n\n{prose(390)}\n"
    chunks = chunk_markdown(text, options=SMALL)
    assert [chunk.text.count("#") for chunk in chunks] == [0, 5]


def test_text_without_headings_has_no_path() -> None:
    (chunk,) = chunk_markdown("Just a note.")
    assert (chunk.heading_path, chunk.section_ordinals, chunk.text) == ((), (), "Just a note.")


def test_a_heading_of_megabytes_gives_a_short_title() -> None:
    chunks = chunk_markdown("# " + "word " * 20_000 + "\n\ntext\n")
    assert {len(chunk.heading_path[0]) <= 201 for chunk in chunks} == {True}
    assert chunks[0].heading_path[0].endswith("word…")


# prose


def test_paragraphs_are_whole_where_they_fit() -> None:
    paragraphs = [prose(180 + 10 * number) for number in range(8)]
    chunks = chunk_markdown("\n\n".join(paragraphs), options=ChunkOptions(target_chars=450, overlap_chars=0))
    assert all(chunk.text.strip().split("\n\n")[0] in paragraphs for chunk in chunks)


def test_a_long_paragraph_is_cut_between_sentences_and_overlaps_by_whole_sentences() -> None:
    chunks = chunk_markdown(prose(3000), options=SMALL)
    assert len(chunks) > 5
    for chunk in chunks[1:]:
        assert chunk.text.startswith(SENTENCE * 2 if chunk.text.startswith(SENTENCE * 2) else SENTENCE)
        assert len(chunk.text) - (chunk.end - chunk.start) in range(1, 81)


def test_abbreviations_numbers_and_initials_end_no_sentence() -> None:
    text = "Mr. J. Smith of Roof Co. Ltd. paid No. 5 of Art. 3.5 i.e. all. " * 3 + "Then " + "x" * 60 + " left."
    chunks = chunk_markdown(text, options=ChunkOptions(target_chars=250, overlap_chars=0))
    assert [chunk.text.startswith(("Mr.", "Then")) for chunk in chunks] == [True] * len(chunks)


def test_cjk_text_without_spaces_is_cut_behind_a_full_stop() -> None:
    text = "屋根の写真を撮影してください。" * 100
    chunks = chunk_markdown(text, options=SMALL)
    assert all(chunk.text.rstrip().endswith("。") for chunk in chunks)
    assert all(chunk.text.startswith("屋根") for chunk in chunks)


def test_a_blob_without_spaces_is_cut_at_the_target_without_overlap() -> None:
    chunks = chunk_markdown("QUJDREVG" * 1000)
    assert [len(chunk.text) for chunk in chunks] == [2000] * 4


def test_a_long_list_is_cut_between_its_outer_items() -> None:
    text = "".join(f"- Item {n}\n  - Detail one of it\n  - Detail two of it\n" for n in range(60))
    chunks = chunk_markdown(text, options=SMALL)
    assert all(text[chunk.start :].startswith("- Item") for chunk in chunks)


def test_overlap_does_not_reach_over_a_table_or_a_heading() -> None:
    text = f"# A\n\nIntro words here.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{prose(200)}\n\n{prose(390)}\n"
    chunks = chunk_markdown(text, options=SMALL)
    assert all("| 1 | 2 |" not in chunk.text for chunk in chunks[1:])
    assert chunks[1].text.startswith(SENTENCE.strip() + "\n\n"), "and does reach back into the paragraph before"


# tables and code


def table(rows: int) -> str:
    return "| Item | Limit |\n| --- | ---: |\n" + "".join(f"| Slate {n} | {n * 100} |\n" for n in range(rows))


def test_a_cut_table_repeats_its_header_and_keeps_its_rows_whole() -> None:
    text = f"Limits:\n\n{table(100)}\nAfter.\n"
    chunks = chunk_markdown(text, options=SMALL)
    rows = [line for chunk in chunks for line in chunk.text.splitlines() if line.startswith("| Slate")]
    assert rows == [f"| Slate {n} | {n * 100} |" for n in range(100)]
    assert all("| Item | Limit |\n| --- | ---: |\n| Slate" in chunk.text for chunk in chunks)
    assert all(text[chunk.start :].startswith("| Slate") for chunk in chunks[1:])


def test_a_table_that_fits_a_chunk_of_its_own_is_not_cut() -> None:
    text = f"{prose(200)}\n\n{table(15)}\n{prose(300)}\n"
    chunks = chunk_markdown(text, options=SMALL)
    assert sum(table(15) in chunk.text for chunk in chunks) == 1


def test_a_row_longer_than_the_target_stays_whole_up_to_the_byte_limit() -> None:
    long_row = "| " + "word " * 500 + "| x |\n"
    text = table(3) + long_row + "| Slate 9 | 1 |\n"
    chunks = chunk_markdown(text, options=ChunkOptions(target_chars=400, overlap_chars=0))
    assert [long_row in chunk.text for chunk in chunks].count(True) == 1
    assert all(chunk.text.startswith("| Item | Limit |\n| --- | ---: |\n") for chunk in chunks)


def test_a_header_too_large_to_repeat_is_not_repeated() -> None:
    text = f"| {'wide ' * 60}| b |\n|---|---|\n" + "| 1 | 2 |\n" * 100
    chunks = chunk_markdown(text, options=SMALL)
    assert ["wide" in chunk.text for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("opening", "closing", "lead"),
    [("```python", "```", ""), ("~~~~ sql", "~~~~", ""), ("> ```js", "> ```", "> "), ("- ```", "  ```", "  ")],
)
def test_cut_code_is_opened_and_closed_again(opening: str, closing: str, lead: str) -> None:
    lines = [f"{lead}value_{n} = {n}" for n in range(100)]
    text = "\n".join(["Before.", "", opening, *lines, closing, "", "After.", ""])
    chunks = chunk_markdown(text, options=SMALL)
    assert len(chunks) > 3
    again = opening.replace("- ", "  ").replace("~ ", "~")
    for number, chunk in enumerate(chunks):
        assert (again if number else opening) in chunk.text.splitlines()
        assert chunk.text.splitlines().count(closing) == (2 if again == closing and number else 1)
    assert [line for chunk in chunks for line in chunk.text.splitlines() if line in set(lines)] == lines


def test_code_is_cut_at_a_blank_line_where_there_is_one() -> None:
    function = "def check(value):\n    if value:\n        return 1\n    return 0\n"
    chunks = chunk_markdown("```python\n" + "\n".join([function] * 20) + "```\n", options=SMALL)
    assert all(chunk.text.startswith("```python\ndef check") for chunk in chunks)


def test_code_that_is_never_closed_is_closed_in_each_chunk() -> None:
    chunks = chunk_markdown("```py\n" + "x = 1\n" * 200, options=SMALL)
    assert all(chunk.text.startswith("```py\n") and chunk.text.endswith("x = 1\n```") for chunk in chunks)


def test_headings_in_code_open_no_section() -> None:
    (chunk,) = chunk_markdown("```\n# comment\n```\n\ntext\n")
    assert chunk.heading_path == ()


# pages, input, identity


def test_pages_of_a_chunk_are_those_of_its_first_and_last_characters() -> None:
    done = normalise_markdown("\f".join([prose(150), "", prose(150), prose(350), ""]), paged=True)
    chunks = chunk_markdown(done.text, page_starts=done.page_starts, options=SMALL)
    assert [(chunk.page_from, chunk.page_to) for chunk in chunks] == [(1, 3), (4, 4)]


def test_code_left_open_on_a_page_does_not_swallow_the_next_page() -> None:
    done = normalise_markdown("```\ncode\f# Title\n\ntext", paged=True)
    chunks = chunk_markdown(done.text, page_starts=done.page_starts)
    assert [(chunk.heading_path, chunk.page_from) for chunk in chunks] == [((), 1), (("Title",), 2)]
    assert chunks[0].text == "```\ncode\n\n```"


@pytest.mark.parametrize("text", ["", " ", "\n\n\t\n"])
def test_blank_text_has_no_chunks(text: str) -> None:
    assert chunk_markdown(text) == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_chars": 99}, "target_chars"),
        ({"overlap_chars": 1001}, "overlap_chars"),
        ({"overlap_chars": -1}, "overlap_chars"),
        ({"max_bytes": 399}, "max_bytes"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        ChunkOptions(**options)


@pytest.mark.parametrize("starts", [(1,), (0, 5, 4), (0, 99)])
def test_pages_that_cannot_be_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="page"):
        chunk_markdown("some text", page_starts=starts)


def test_what_this_version_gives_is_fixed() -> None:
    """A change that alters this digest needs a new version in `CHUNKER`: stored chunk ids depend on it."""
    text = (
        f"Lead.\n\n# Über uns\n\n{prose(700)}\n\n## Grenzen\n\n{table(60)}\n> quoted {prose(300)}\n\n"
        f"```py\n{'x = 1' * 3}\n{'y = 2' * 120}\n```\n\n- {prose(260)}\n- {prose(260)}\n\n"
        f"Title\n=====\n\n漢字。{'漢' * 900}\n"
    )
    chunks = chunk_markdown(text, page_starts=(0, 500, 500, 1500), options=SMALL)
    check_chunks(text, chunks, SMALL, (0, 500, 500, 1500))
    digest = sha256("\x1e".join(repr(chunk) for chunk in chunks).encode()).hexdigest()
    assert (CHUNKER, len(chunks), digest[:16]) == ("markdown-simple@1", 14, "bc734abcd1060bd7")


def test_the_handbook_keeps_its_long_table_and_its_long_code_readable() -> None:
    path = Path(__file__).parents[3] / "shared" / "corpus" / "handbook.md"
    if not path.exists():
        pytest.skip("the corpus is not beside the project")
    text = normalise_markdown(path.read_text(encoding="utf-8"), paged=False).text
    chunks = chunk_markdown(text)
    check_chunks(text, chunks, ChunkOptions())
    tables = [chunk for chunk in chunks if "| Slate type" in chunk.text]
    assert len(tables) > 1
    assert all("| Item | Limit |\n| --- | --- |\n| Slate type" in chunk.text for chunk in tables)
    code = [chunk for chunk in chunks if "limit_" in chunk.text]
    assert len(code) > 1
    assert all(chunk.text.count("```") == 2 and "```python\nlimit_" in chunk.text for chunk in code)
    assert {chunk.heading_path for chunk in chunks} == {
        ("Storm claims handbook", "Roof"),
        ("Storm claims handbook", "Code"),
    }
