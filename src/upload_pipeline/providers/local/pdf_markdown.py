"""PDF to Markdown, by liteparse (PDFium). Only ever called inside a guarded process: PDFium aborts at will."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# The compiled class: the public wrapper copies each text item with its box into Python objects, which nobody
# reads here and which takes a quarter of the time.
from liteparse._liteparse import LiteParse

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.parsing import ParsedMarkdown

if sys.platform != "win32":
    import resource

_OPTIONS: dict[str, Any] = {
    "output_format": "markdown",
    "ocr_enabled": False,
    "image_mode": "off",
    "quiet": True,
    "num_workers": 1,
    "continue_on_page_error": True,
    "max_pages": 2**31 - 1,  # the default stops at 1,000 pages without a word
}

_EMPTY_FENCE = re.compile(r"^```[a-z]*\n\s*```$\n?", re.MULTILINE)
"""What stands in the Markdown for a page or region without text."""

_RESERVE_BYTES = 1024**3
"""Writable memory that PDFium reserves for each document that it opens; where it cannot, it does without."""


def pdf_markdown(path: Path) -> ParsedMarkdown:
    """Turns a PDF into Markdown, page by page; images are left out and nothing is recognised optically.

    Raises:
        PipelineError: `ENCRYPTED`, `CORRUPT_FILE`, `PARSE_FAILED` (no page could be read).
    """
    engine = _engine()
    try:
        result = engine.parse_bytes(path.read_bytes())
    except RuntimeError as error:
        raise _refusal(error) from error
    count = int(result.total_pages)
    if count < 1:
        raise _no_pages()
    pages = {page.page_num: _tidy(page.markdown) for page in result.pages}
    unread = [number for number in range(1, count + 1) if number not in pages]
    if len(unread) == count:
        reasons = "; ".join(sorted({str(error.message) for error in result.page_errors})[:3])
        raise PipelineError(
            ErrorCode.PARSE_FAILED, f"No page of the PDF could be read{': ' if reasons else ''}{reasons}."
        )
    blank = sum(not text for text in pages.values())
    warnings = []
    if unread:
        warnings.append(f"Pages that could not be read: {', '.join(map(str, unread[:50]))}.")
    if blank:
        warnings.append(f"{blank} of {count} pages hold no text; scanned pages are not recognised.")
    markdown = "\f".join(pages.get(number, "") for number in range(1, count + 1))
    return ParsedMarkdown(markdown, count, tuple(warnings))


def inspect_pdf(path: Path) -> None:
    """Opens a PDF and counts its pages without reading them.

    Raises:
        PipelineError: `ENCRYPTED` or `CORRUPT_FILE`.
    """
    try:
        pages = _engine().open_batch_session_bytes(path.read_bytes(), 1).total_pages
    except RuntimeError as error:
        raise _refusal(error) from error
    if pages < 1:
        raise _no_pages()


def _engine() -> Any:
    """Makes the engine, and sees to it that PDFium's reserve does not use up the memory limit.

    Reserved memory counts as used, and little of what a document needs comes from it. So a limit that would leave
    less than 1 GiB beside the reserve is lowered to where the reserve cannot be had and all else can.
    """
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY and _RESERVE_BYTES < soft < 2 * _RESERVE_BYTES:
            resource.setrlimit(resource.RLIMIT_DATA, (_RESERVE_BYTES, hard))
    return LiteParse(**_OPTIONS)


def _tidy(markdown: str) -> str:
    return _EMPTY_FENCE.sub("", markdown.replace("\f", "\n")).strip("\n")


def _refusal(error: RuntimeError) -> PipelineError:
    reason = str(error).removeprefix("PDF error: ")
    if "password" in reason.lower():
        return PipelineError(
            ErrorCode.ENCRYPTED,
            "The PDF needs a password to be opened. Remove the protection and send it again.",
        )
    return PipelineError(
        ErrorCode.CORRUPT_FILE,
        f"The PDF cannot be opened ({reason}). Save it anew from its application and send that.",
    )


def _no_pages() -> PipelineError:
    return PipelineError(ErrorCode.CORRUPT_FILE, "The PDF has no pages. Send one that has.")
