from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.intake.filenames import MAX_FILENAME_CHARS, display_name


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("policy.pdf", "policy.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\claim.docx", "claim.docx"),
        ("a/b\\c.txt", "c.txt"),
        ("line\nbreak\r\t\x00\x7f\x85.txt", "linebreak.txt"),
        ("cafe\u0301.md", "caf\u00e9.md"),
        ("  spaced.pdf  ", "spaced.pdf"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("half\ud800.txt", "half.txt"),
        ("יְהוֹדַיָה.pdf", "יְהוֹדַיָה.pdf"),
        ("", "unnamed"),
        ("/", "unnamed"),
        ("..", "unnamed"),
        ("dir/", "unnamed"),
        ("\x00\x01", "unnamed"),
        (".gitignore", ".gitignore"),
    ],
)
def test_a_name_is_made_safe_to_show(given_name, shown):
    assert display_name(given_name) == unicodedata.normalize("NFC", shown)


def test_a_long_name_is_cut_before_its_extension():
    shown = display_name("x" * 400 + ".markdown")
    assert len(shown) == MAX_FILENAME_CHARS
    assert shown.endswith("x.markdown")


def test_an_extension_that_is_too_long_to_be_one_is_cut():
    assert display_name("a." + "b" * 400) == "a." + "b" * (MAX_FILENAME_CHARS - 2)


@given(st.text())
def test_any_name_becomes_one_that_can_be_stored_and_stays(name):
    shown = display_name(name)
    assert 1 <= len(shown) <= MAX_FILENAME_CHARS
    assert "/" not in shown
    assert "\\" not in shown
    assert unicodedata.is_normalized("NFC", shown)
    assert not any(unicodedata.category(character) in {"Cc", "Cs"} for character in shown)
    assert display_name(shown) == shown
