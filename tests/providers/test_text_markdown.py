from __future__ import annotations

import codecs

import pytest

from upload_pipeline.providers.local.text_markdown import decode, text_markdown

RUSSIAN = "Это простой текст на русском языке, который нужно прочитать и понять без труда."


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Grüße, 日本語, 🙂", "utf-8"),
        ("Grüße, 日本語, 🙂", "utf-8-sig"),
        ("Grüße, 日本語, 🙂", "utf-16"),
        ("Grüße, 日本語, 🙂", "utf-32"),
        ("Prämie fällig am 1. März, Schäden", "latin-1"),
        ("Müller sagt: „Größe“ – für 5 €", "cp1252"),
        ("“Déjà vu”, s’il vous plaît : à bientôt, garçon", "cp1252"),
        ("¿Qué pasó con el seguro del niño?", "cp1252"),
        ("Não há cobertura até à inspeção", "cp1252"),
        ("Försäkring för båt på sjön", "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        ("Zażółć gęślą jaźń, proszę bardzo, dziękuję", "cp1250"),
        ("日本語の文章をここに書いておきます。とても短い文です。", "shift_jis"),
        ("这是一个简单的中文文本，用来测试编码检测。", "gb18030"),
    ],
)
def test_text_comes_out_right_in_its_character_set(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


def test_markdown_passes_through_untouched() -> None:
    source = "# T\r\n\n\n* a\t \n\f```\ncode\n```"
    assert text_markdown(source.encode()) == source


def test_what_the_content_declares_wins_over_guessing() -> None:
    assert decode(RUSSIAN.encode("cp1251"), ["windows-1251"]) == RUSSIAN
    assert decode("日本".encode("iso-2022-jp"), ["ISO-2022-JP"]) == "日本"


@pytest.mark.parametrize("label", ["no-such-set", "hex", "utf-7", "idna", "unicode_escape", "utf-8\x00", ""])
def test_a_declared_set_that_is_none_is_passed_over(label: str) -> None:
    assert decode(b"a+AGE-\\u0041 \xc3\xa9", [label]) == "a+AGE-\\u0041 é"


def test_a_declared_set_that_the_bytes_are_not_in_is_passed_over() -> None:
    assert decode("schöne Grüße".encode("latin-1"), ["utf-8", "shift_jis"]) == "schöne Grüße"


def test_latin1_in_name_is_windows_1252() -> None:
    assert decode(b"\x80 5 \x93x\x94", ["iso-8859-1"]) == "€ 5 “x”"


def test_bytes_in_no_character_set_still_give_text() -> None:
    text = decode(b"a\x81\x8d" + bytes(range(128, 256)) + b" plain words")
    assert text.endswith("plain words")


def test_what_is_damaged_behind_a_byte_order_mark_is_marked() -> None:
    assert decode(codecs.BOM_UTF8 + b"ab\xffc") == "ab\ufffdc"
    assert decode(codecs.BOM_UTF16_LE + b"a\x00b") == "a\ufffd"


def test_nothing_is_no_text() -> None:
    assert decode(b"") == ""
