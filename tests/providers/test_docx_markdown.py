from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from sample_files import docx_of, paragraph

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.local.docx_markdown import docx_markdown, inspect_docx

STYLES = (
    '<w:styles xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
    '<w:style w:type="paragraph" w:styleId="T"><w:name w:val="Title"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="C"><w:name w:val="Source Code"/></w:style></w:styles>'
)


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "document"
    path.write_bytes(content)
    return path


def cell(text: str) -> str:
    return f"<w:tc>{paragraph(text)}</w:tc>"


def test_headings_tables_and_code_are_kept(tmp_path: Path) -> None:
    body = (
        paragraph("Policy", "T")
        + paragraph("Cover", "H1")
        + paragraph("Fire & flood")
        + f"<w:tbl><w:tr>{cell('Peril')}{cell('Limit')}</w:tr><w:tr>{cell('Fire')}{cell('5')}</w:tr></w:tbl>"
        + paragraph("x = 1", "C")
        + paragraph("  y = 2", "C")
    )
    parsed = docx_markdown(written(tmp_path, docx_of(body, {"word/styles.xml": STYLES})))
    assert parsed.markdown == (
        "# Policy\n\n# Cover\n\nFire & flood\n\n| Peril | Limit |\n| --- | --- |\n| Fire | 5 |\n\n"
        "```\nx = 1\n  y = 2\n```"
    )
    assert parsed.page_count is None


def test_an_empty_document_is_empty_markdown(tmp_path: Path) -> None:
    assert docx_markdown(written(tmp_path, docx_of(""))).markdown == ""


def corrupt_main_part() -> bytes:
    content = docx_of(paragraph("x" * 5000))
    at = content.index(b"word/document.xml") + 40
    return content[:at] + b"\x00" * 20 + content[at + 20 :]


BOMB = {"word/bomb.xml": b" " * (60 * 1024 * 1024)}
ENTITIES = '<!DOCTYPE w [<!ENTITY a "aaaa">]><w:document xmlns:w="x"><w:body>&a;</w:body></w:document>'


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (docx_of(paragraph("x"))[:-200], ErrorCode.CORRUPT_FILE, "container"),
        (b"PK\x03\x04 but no more", ErrorCode.CORRUPT_FILE, "container"),
        (corrupt_main_part(), ErrorCode.CORRUPT_FILE, "opened"),
        (docx_of("<w:p>"), ErrorCode.CORRUPT_FILE, "not well-formed"),
        (docx_of("", BOMB), ErrorCode.CORRUPT_FILE, "unpacks"),
        (docx_of("", {"word/document.xml": ENTITIES}), ErrorCode.CORRUPT_FILE, "DTD"),
        (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99), ErrorCode.TYPE_MISMATCH, "older Office"),
        (
            bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99_999) + "EncryptedPackage".encode("utf-16-le"),
            ErrorCode.ENCRYPTED,
            "password",
        ),
    ],
)
def test_a_file_that_cannot_be_opened_is_refused_on_sight(
    tmp_path: Path, content: bytes, code: ErrorCode, word: str
) -> None:
    path = written(tmp_path, content)
    for opening in (inspect_docx, docx_markdown):
        with pytest.raises(PipelineError, match=word) as caught:
            opening(path)
        assert caught.value.code is code


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, docx_of(paragraph("x")))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        inspect_docx(path)
    assert caught.value.code is ErrorCode.ENCRYPTED


def test_a_zip_without_a_word_folder_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.docx"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("notes.txt", "x")
    with pytest.raises(PipelineError) as caught:
        inspect_docx(path)
    assert caught.value.code is ErrorCode.TYPE_MISMATCH


def test_a_container_without_a_main_part_cannot_be_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.docx"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("word/styles.xml", "<x/>")
    with pytest.raises(PipelineError) as caught:
        docx_markdown(path)
    assert caught.value.code in (ErrorCode.PARSE_FAILED, ErrorCode.CORRUPT_FILE)
