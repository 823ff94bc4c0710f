"""How LlamaCloud speaks: forms, pages of lists, refusals, signatures, and a file's pages as Markdown."""

from __future__ import annotations

import hashlib
import hmac
import io
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from python_multipart import parse_form

_PDF_PAGE = re.compile(rb"/Type\s*/Page\b")


async def read_form(request: web.Request) -> tuple[dict[str, str], tuple[str, bytes] | None]:
    """The fields of a form, and its file by name and content."""
    # Not aiohttp's own reader: it leaves its temporary file open where a client is killed while it sends.
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []

    def on_field(field: Any) -> None:
        fields[field.field_name.decode()] = (field.value or b"").decode()

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append((file.file_name.decode(), file.file_object.read()))
        file.close()

    body = await request.read()
    parse_form({"Content-Type": request.headers["Content-Type"].encode()}, io.BytesIO(body), on_field, on_file)
    return fields, files[0] if files else None


def sign(raw: bytes, secret: str) -> str:
    """What `LC-Signature` says of a message."""
    return "sha256=" + hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()


def pages_of(content: bytes) -> list[str]:
    """The Markdown of each page of a file, as this server parses it."""
    if content.startswith(b"%PDF"):
        mark = hashlib.sha256(content).hexdigest()[:12]
        count = len(_PDF_PAGE.findall(content)) or 1
        return [f"# Page {number}\n\nText of the file {mark}." for number in range(1, count + 1)]
    return content.decode("utf-8", "replace").split("\f")


def page_of(request: web.Request, items: list[dict[str, Any]]) -> web.Response:
    """The part of a list that a request asks for, and where the next one begins."""
    size, start = int(request.query.get("page_size", 10)), int(request.query.get("page_token") or 0)
    following = str(start + size) if start + size < len(items) else None
    return web.json_response({"items": items[start : start + size], "next_page_token": following})


def refusal(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer that is no success."""
    return web.json_response({"detail": detail}, status=status, headers=headers)
