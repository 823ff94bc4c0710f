from __future__ import annotations

import pytest
from chunk_rules import documents
from hypothesis import given, settings

from upload_pipeline.text.blocks import BlockKind, read_outline

H, P, L, Q, F, T, B = (
    BlockKind.HEADING, BlockKind.PARAGRAPH, BlockKind.LIST, BlockKind.QUOTE, BlockKind.FENCE, BlockKind.TABLE,
    BlockKind.BREAK,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        ("\n \n", []),
        ("a\nb\n\nc\n", [P, P]),
        ("# a\nb", [H, P]),
        ("#a\n\n#\n\n# #\n\n####### a", [P, P, P, P]),
        ("   ### a ###", [H]),
        ("    # code", [P]),
        ("a\n===\nb\n--\nc", [H, H, P]),
        ("a\nb\n---\nc", [P, B, P]),
        ("a\n\n---\n\n***\n\n_ _ _", [P, B, B, B]),
        ("x" * 201 + "\n---", [P, B]),
        ("a\n-\nb", [P]),
        ("- a\n- b\n\n  c\n\n- d\n\ne", [L, P]),
        ("- a\n  # no heading\n# heading", [L, H]),
        ("1. a\n2. b", [L]),
        ("the year\n1986. It was\n1. item", [P, L]),
        ("a\n- b", [P, L]),
        ("> a\nlazy\n> b\n\n> c\n\nd", [Q, Q, P]),
        ("a\n```\n# b\n\n- c\n```\nd", [P, F, P]),
        ("~~~ x `y`\n```\n~~~\na", [F, P]),
        ("``` a`b\nc", [P]),
        ("```\na\n```` \nb", [F, P]),
        ("````\na\n```\nb", [F]),
        ("1. a\n\n   ```sh\n   # b\n   ```\n2. c", [L, F, L]),
        ("> ```\n> a\nb", [F, P]),
        ("| a | b |\n|---|---|\n| 1 | 2 |\nafter", [T, P]),
        ("intro\na | b\n-|-\n1 | 2\n\n| x |", [P, T, P]),
        ("a\n|---|\nb", [P]),
        ("| a |\n---\nb", [H, P]),
        ("- a\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |\n- b", [L, T, L]),
        ("| a | b |\n| 1 | 2 |", [P]),
        ("<div>\n# heading\n</div>", [P, H, P]),
        ("`" * 33 + "\na", [P]),
    ],
)
def test_kinds_of_blocks(text: str, kinds: list[BlockKind]) -> None:
    assert [block.kind for block in read_outline(text).blocks] == kinds


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("# a b  ##", "a b"),
        ("# C#", "C#"),
        ("# **Bold** move", "Bold move"),
        ("# *all*", "all"),
        ("# snake_case_", "snake_case_"),
        ("# 1\\. [Scope](#scope)", "1. Scope"),
        ("# \tשלום ", "שלום"),
    ],
)
def test_titles_are_plain_text(line: str, title: str) -> None:
    assert [section.title for section in read_outline(line).sections] == [title]


def test_sections_know_what_encloses_them() -> None:
    outline = read_outline("a\n# A\n### B\n## C\nx\n# D\n")
    assert [(section.level, section.title, section.parent) for section in outline.sections] == [
        (1, "A", -1), (3, "B", 0), (2, "C", 0), (1, "D", -1),
    ]  # fmt: skip
    assert [block.section for block in outline.blocks] == [-1, 0, 1, 2, 2, 3]
    assert [section.title for section in outline.path(2)] == ["A", "C"]
    assert outline.path(-1) == ()


def test_an_open_fence_ends_with_its_page() -> None:
    text = "```\na\n\n# b\n"
    assert [block.kind for block in read_outline(text).blocks] == [F]
    outline = read_outline(text, (0, 7))
    assert [(block.kind, block.closed) for block in outline.blocks] == [(F, False), (H, True)]


@settings(max_examples=150, deadline=None)
@given(documents())
def test_blocks_tile_the_text_and_start_with_something(text: str) -> None:
    blocks = read_outline(text).blocks
    position = 0
    for block in blocks:
        assert block.start == position
        assert text[block.start : block.stop].strip()
        assert text[block.stop : block.end].strip() == ""
        assert block.start <= block.body <= block.end
        position = block.end
    assert position == (len(text) if blocks else 0)
