"""The tasks of the local parser's guarded processes: parse a file, inspect a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upload_pipeline import media_types
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.local.docx_markdown import docx_markdown, inspect_docx
from upload_pipeline.providers.local.html_markdown import html_markdown
from upload_pipeline.providers.local.pdf_markdown import inspect_pdf, pdf_markdown
from upload_pipeline.providers.local.text_markdown import text_markdown
from upload_pipeline.providers.parsing import ParsedMarkdown


def parse_file(arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Parses a file.

    Args:
        arguments: `path` and `media_type`.

    Returns:
        `page_count` and `warnings`, and the Markdown in UTF-8.
    """
    parsed = _parse(Path(arguments["path"]), arguments["media_type"])
    facts = {"page_count": parsed.page_count, "warnings": list(parsed.warnings)}
    return facts, parsed.markdown.encode("utf-8", "replace")


def inspect_file(arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Opens a file as far as it takes to see that it can be read; `arguments` as for `parse_file`."""
    path = Path(arguments["path"])
    match arguments["media_type"]:
        case media_types.PDF:
            inspect_pdf(path)
        case media_types.DOCX:
            inspect_docx(path)
        case _:
            pass
    return {}, b""


def _parse(path: Path, media_type: str) -> ParsedMarkdown:
    match media_type:
        case media_types.PDF:
            return pdf_markdown(path)
        case media_types.DOCX:
            return docx_markdown(path)
        case media_types.HTML:
            return ParsedMarkdown(html_markdown(path.read_bytes()), None)
        case media_types.MARKDOWN | media_types.PLAIN:
            return ParsedMarkdown(text_markdown(path.read_bytes()), None)
        case _:
            raise PipelineError(
                ErrorCode.UNSUPPORTED_TYPE,
                f"The local parser does not read {media_type!r}; it reads {', '.join(media_types.MEDIA_TYPES)}.",
                {"media_type": media_type},
            )
