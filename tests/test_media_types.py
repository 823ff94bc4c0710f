from __future__ import annotations

import codecs
import io
import random
import zipfile

import pytest

from upload_pipeline import media_types
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.media_types import (
    DOCX,
    HTML,
    MARKDOWN,
    PDF,
    PLAIN,
    declared_media_type,
    detect_media_type,
    media_type_of_zip,
)

OLE = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPEG = b"\xff\xd8\xff\xe0" + bytes(100)


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as container:
        for name in names:
            container.writestr(name, b"x" * 50)
    return buffer.getvalue()


def detect(name: str, content: bytes) -> str:
    return detect_media_type(name, content[: media_types.HEAD_BYTES], size=len(content))


def refusal(name: str, content: bytes) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        detect(name, content)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", b"%PDF-1.7\n", PDF),
        ("A.PDF", b"%PDF-1.7\n", PDF),
        ("folder/a.pdf", b"%PDF-1.7\n", PDF),
        ("no-extension", b"%PDF-1.7\n", PDF),
        ("a.bin", b"%PDF-1.7\n", PDF),
        (".pdf", b"words", PLAIN),  # a dot file has no extension
        ("junk-before.pdf", b"\x00\x01junk" * 100 + b"%PDF-1.4", PDF),
        ("a.docx", zip_of("[Content_Types].xml", "word/document.xml"), DOCX),
        ("a", zip_of("[Content_Types].xml", "word/document.xml"), DOCX),
        ("a.html", b"<p>x", HTML),
        ("a.htm", b"just words", HTML),
        ("a", b"\n <!-- note\n --> <!DOCTYPE  html><html>", HTML),
        ("a", b'<?xml version="1.0"?>\n<html xmlns="x">', HTML),
        ("a", codecs.BOM_UTF8 + b"<HTML>", HTML),
        ("a", "<html>é".encode("utf-16"), HTML),
        ("a", b"<pastry> is no tag of HTML", PLAIN),
        ("a.md", b"<h1 align=center>Project</h1>", MARKDOWN),
        ("a.txt", b"<html> as somebody wrote it", PLAIN),
        ("a.markdown", b"# x", MARKDOWN),
        ("a.txt", b"plain", PLAIN),
        ("a.csv", b"a,b\n1,2\n", PLAIN),
        ("a.txt", "Grüße".encode("latin-1"), PLAIN),
        ("a.txt", codecs.BOM_UTF8 + "é".encode(), PLAIN),
        ("a.txt", "Grüße".encode("utf-16"), PLAIN),
        ("a.txt", codecs.BOM_UTF16_BE + "Grüße".encode("utf-16-be"), PLAIN),
        ("a.txt", "текст".encode("utf-32"), PLAIN),
        ("a.txt", "日本語の文章".encode("shift_jis"), PLAIN),
        ("how-to.txt", b"A PDF begins with %PDF-1.7 and", PLAIN),
    ],
)
def test_content_and_extension_give_the_type(name: str, content: bytes, expected: str) -> None:
    assert detect(name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "code", "word"),
    [
        ("a.pdf", b"", ErrorCode.EMPTY_FILE, "empty"),
        ("a.png", PNG, ErrorCode.UNSUPPORTED_TYPE, "PNG image"),
        ("a.jpg", JPEG, ErrorCode.UNSUPPORTED_TYPE, "JPEG image"),
        ("a", JPEG, ErrorCode.UNSUPPORTED_TYPE, "JPEG image"),
        ("a.zip", zip_of("notes.txt"), ErrorCode.UNSUPPORTED_TYPE, "ZIP archive"),
        ("a.xlsx", zip_of("[Content_Types].xml", "xl/workbook.xml"), ErrorCode.UNSUPPORTED_TYPE, "XLSX"),
        ("a.pptx", zip_of("ppt/presentation.xml"), ErrorCode.UNSUPPORTED_TYPE, "PPTX"),
        ("a.odt", zip_of("mimetype", "content.xml"), ErrorCode.UNSUPPORTED_TYPE, "OpenDocument"),
        ("a.epub", zip_of("mimetype", "META-INF/container.xml"), ErrorCode.UNSUPPORTED_TYPE, "EPUB"),
        ("a.exe", b"MZ\x90\x00\x03", ErrorCode.UNSUPPORTED_TYPE, "Windows program"),
        ("a.doc", OLE, ErrorCode.UNSUPPORTED_TYPE, "legacy Office"),
        ("a.rtf", b"{\\rtf1 x}", ErrorCode.UNSUPPORTED_TYPE, "RTF"),
        ("a", bytes(range(256)) * 4, ErrorCode.UNSUPPORTED_TYPE, "unknown binary"),
        ("a.pdf", b"only words", ErrorCode.TYPE_MISMATCH, "content is text"),
        ("a.pdf", b"<html>", ErrorCode.TYPE_MISMATCH, "HTML"),
        ("a.pdf", PNG, ErrorCode.TYPE_MISMATCH, "PNG image"),
        ("a.txt", b"%PDF-1.7\n\x00", ErrorCode.TYPE_MISMATCH, "PDF"),
        ("a.png", JPEG, ErrorCode.TYPE_MISMATCH, "JPEG image"),
        ("a.png", b"only words", ErrorCode.TYPE_MISMATCH, "content is text"),
        ("a.docx", zip_of("xl/workbook.xml"), ErrorCode.TYPE_MISMATCH, "XLSX"),
        ("a.docx", zip_of("notes.txt"), ErrorCode.TYPE_MISMATCH, "ZIP archive"),
        ("a.pdf", zip_of("word/document.xml"), ErrorCode.TYPE_MISMATCH, "DOCX"),
        ("a.txt", random.Random(1).randbytes(4096), ErrorCode.TYPE_MISMATCH, "unknown binary"),
        ("a.txt", b"\x00text", ErrorCode.TYPE_MISMATCH, "unknown binary"),
        ("a.txt", codecs.BOM_UTF16_LE + b"\x00\xd8" * 9, ErrorCode.TYPE_MISMATCH, "unknown binary"),
        ("a.docx", OLE + "EncryptedPackage".encode("utf-16-le"), ErrorCode.ENCRYPTED, "password"),
    ],
)
def test_a_refusal_names_the_file_and_the_kind(name: str, content: bytes, code: ErrorCode, word: str) -> None:
    error = refusal(name, content)
    assert error.code is code
    assert word in error.message
    assert repr(name) in error.message


def test_a_character_cut_by_the_end_of_the_head_is_no_damage() -> None:
    content = "é".encode() * 100
    assert detect_media_type("a.txt", content[:99], size=len(content)) == PLAIN


def test_text_that_begins_as_utf8_and_is_not_is_still_text() -> None:
    assert detect("a.txt", "é".encode() * 40 + "é".encode("latin-1")) == PLAIN


def test_a_head_that_shows_no_member_of_a_docx_is_believed_only_under_its_name() -> None:
    content = zip_of("[Content_Types].xml", "media.bin")
    assert detect_media_type("a.docx", content, size=len(content) + 1) == DOCX
    with pytest.raises(PipelineError, match="ZIP archive"):
        detect_media_type("a", content, size=len(content) + 1)


def test_an_ole_container_named_docx_is_left_for_opening_to_judge() -> None:
    assert detect("a.docx", OLE) == DOCX


def test_the_names_of_a_whole_container_decide() -> None:
    assert media_type_of_zip("a", ["docProps/app.xml", "word/document.xml"]) == DOCX
    with pytest.raises(PipelineError, match="XLSX"):
        media_type_of_zip("a", ["xl/workbook.xml"])


@pytest.mark.parametrize(
    ("name", "declared", "expected"),
    [
        ("a.pdf", "application/pdf", PDF),
        ("A.PDF", "Application/PDF; charset=binary", PDF),
        ("a.pdf", "", PDF),
        ("a.docx", "application/octet-stream", DOCX),
        ("a.pdf", "application/x-pdf", PDF),
        ("no-extension", "application/pdf", PDF),
        ("a.bin", "text/html", HTML),
        ("a.xhtml", "application/xhtml+xml", HTML),
        ("a.md", "text/plain", MARKDOWN),
        ("a.md", "text/x-web-markdown", MARKDOWN),
        ("a.txt", "text/markdown", PLAIN),
        ("a", "text/x-markdown", MARKDOWN),
        ("table.csv", "text/csv", PLAIN),
    ],
)
def test_name_and_declaration_give_the_type_that_is_expected(name: str, declared: str, expected: str) -> None:
    assert declared_media_type(name, declared) == expected


@pytest.mark.parametrize(
    ("name", "declared", "code", "word"),
    [
        ("a.pdf", "text/plain", ErrorCode.TYPE_MISMATCH, "text/plain"),
        ("a.txt", "application/pdf", ErrorCode.TYPE_MISMATCH, "named as text"),
        ("a.pdf", "image/png", ErrorCode.TYPE_MISMATCH, "image/png"),
        ("a.xlsx", "application/pdf", ErrorCode.TYPE_MISMATCH, "XLSX"),
        ("a.xlsx", "", ErrorCode.UNSUPPORTED_TYPE, "XLSX"),
        ("a.png", "image/png", ErrorCode.UNSUPPORTED_TYPE, "PNG"),
        ("a", "image/png", ErrorCode.UNSUPPORTED_TYPE, "image/png"),
        ("a", "", ErrorCode.UNSUPPORTED_TYPE, "no type"),
        ("a.bin", "application/octet-stream", ErrorCode.UNSUPPORTED_TYPE, "octet-stream"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(name: str, declared: str, code: ErrorCode, word: str) -> None:
    with pytest.raises(PipelineError) as caught:
        declared_media_type(name, declared)
    assert caught.value.code is code
    assert word in caught.value.message
    assert repr(name) in caught.value.message
