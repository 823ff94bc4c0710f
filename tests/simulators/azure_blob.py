"""A server that speaks Azure Blob Storage, one account of it, with shared keys and shared access signatures checked.

    python -m tests.simulators.azure_blob --port 8500 --container files

Clients reach the account below its name, as that of Azure's own emulator. Faults: see `object_server`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hmac
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web

from tests.simulators.object_server import Bucket, Fault, ObjectServer, Stored

ACCOUNT = "pipelinetest"
KEY = base64.b64encode(b"the key of an account, which is sixty-four bytes long: like this").decode()
MOST_LISTED = 5000

# Shared Key: these headers are signed by their values alone, in this order.
_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
    *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)
_SHARED_ACCESS = ("", "", "spr", "sv", "sr", "", "", "", "rscd", "", "", "rsct")
_BLOCKS = re.compile(r"<(?:Latest|Uncommitted|Committed)>([^<]+)</")
_DELETIONS = re.compile(r"Content-ID: (\d+).*?DELETE (\S+) HTTP/1.1", re.DOTALL)


@dataclass
class AzureBlob(ObjectServer):
    """The server; see `ObjectServer`. `powerless` tells whether the key may do nothing."""

    powerless: bool = False

    @property
    def endpoint(self) -> str:
        """What clients take as theirs."""
        return f"{self.url}/{ACCOUNT}"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """The containers, below the account's name."""
        router.add_route("*", f"/{ACCOUNT}/{{container}}", self._answer)
        router.add_route("*", f"/{ACCOUNT}/{{container}}/{{key:.*}}", self._answer)

    def refusal(self, fault: Fault) -> web.Response:
        """As Azure words it."""
        if fault is Fault.SERVER_ERROR:
            return _refused(500, "InternalError", "The server encountered an internal error.")
        return _refused(503, "ServerBusy", "The server is currently unable to receive requests.")

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        name, key = request.match_info["container"], request.match_info.get("key", "")
        open_to_all = request.method == "GET" and key and name in self.buckets and self.buckets[name].public
        code = None if open_to_all else self._fault(request, name, key)
        if code is not None:
            return _refused(403, code, "refused by the check\nRequestId:1\nTime:now")
        container = self.buckets.get(name)
        if container is None:
            return _refused(404, "ContainerNotFound", "The specified container does not exist.\nRequestId:1")
        query = request.query
        match request.method, query.get("comp", ""):
            case "GET", "list":
                return self._listing(container, request)
            case "POST", "batch":
                return self._batch(container, name, body)
            case "PUT", "block":
                container.uploads.setdefault(key, (key, {}, ""))
                blocks = container.uploads[key][1]
                blocks[hash(query["blockid"])] = body
                return web.Response(status=201)
            case "PUT", "blocklist":
                blocks = container.uploads.pop(key)[1]
                named = [unquote(block) for block in _BLOCKS.findall(body.decode())]
                return self._stored(container, key, Stored(b"".join(blocks[hash(block)] for block in named)))
            case "PUT", _ if "x-ms-copy-source" in request.headers:
                return self._copy(container, name, key, request)
            case "PUT", _ if request.headers.get("x-ms-blob-type") == "BlockBlob":
                kind = request.headers.get("Content-Type", "application/octet-stream")
                return self._stored(container, key, Stored(body, kind))
            case (("GET" | "HEAD"), _):
                found = container.objects.get(key)
                if found is None:
                    return _refused(404, "BlobNotFound", "The specified blob does not exist.")
                wished = {"Content-Disposition": query.get("rscd"), "Content-Type": query.get("rsct")}
                return found.response(request, **{header: value for header, value in wished.items() if value})
        return _refused(400, "InvalidQueryParameterValue", "not simulated")

    def _stored(self, container: Bucket, key: str, stored: Stored) -> web.Response:
        container.objects[key] = stored
        moment = format_datetime(stored.modified_at, usegmt=True)
        return web.Response(status=201, headers={"ETag": stored.etag, "Last-Modified": moment})

    def _copy(self, container: Bucket, name: str, key: str, request: web.Request) -> web.Response:
        source = unquote(request.headers["x-ms-copy-source"]).removeprefix(f"{self.endpoint}/{name}/")
        found = container.objects.get(source)
        if found is None:
            return _refused(404, "BlobNotFound", "The specified blob does not exist.")
        self._stored(container, key, Stored(found.data, found.content_type))
        return web.Response(status=202, headers={"x-ms-copy-status": "success", "x-ms-copy-id": "1"})

    def _listing(self, container: Bucket, request: web.Request) -> web.Response:
        prefix, marker = request.query.get("prefix", ""), request.query.get("marker", "")
        most = int(request.query.get("maxresults", MOST_LISTED))
        keys = sorted(key for key in container.objects if key.startswith(prefix) and key > marker)
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties>"
            f"<Last-Modified>{format_datetime(found.modified_at, usegmt=True)}</Last-Modified>"
            f"<Content-Length>{len(found.data)}</Content-Length><Content-Type>{found.content_type}</Content-Type>"
            f"<Etag>{escape(found.etag)}</Etag></Properties></Blob>"
            for key in keys[:most]
            if (found := container.objects[key])
        )
        more = escape(keys[most - 1]) if len(keys) > most else ""
        text = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{more}</NextMarker></EnumerationResults>"
        return web.Response(text=text, content_type="application/xml")

    def _batch(self, container: Bucket, name: str, body: bytes) -> web.Response:
        answers = []
        for number, path in _DELETIONS.findall(body.decode()):
            key = unquote(path).removeprefix(f"/{ACCOUNT}/{name}/")
            gone = container.objects.pop(key, None)
            status = "202 Accepted" if gone else "404 The specified blob does not exist."
            answers.append(
                f"--answers\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n"
                + ("" if gone else "x-ms-error-code: BlobNotFound\r\n")
                + "x-ms-version: 2023-11-03\r\n\r\n"
            )
        text = "".join(answers) + "--answers--"
        return web.Response(
            status=202, body=text.encode(), headers={"Content-Type": "multipart/mixed; boundary=answers"}
        )

    def _fault(self, request: web.Request, container: str, key: str) -> str | None:
        if "sig" in request.query:
            code = self._fault_of_url(request, container, key)
        else:
            signature = request.headers.get("Authorization", "").removeprefix(f"SharedKey {ACCOUNT}:")
            code = None if signature == _signed(self._shared_key_text(request)) else "AuthenticationFailed"
        return code or ("AuthorizationFailure" if self.powerless else None)

    def _shared_key_text(self, request: web.Request) -> str:
        headers = {name.lower(): value for name, value in request.headers.items()}
        if headers.get("content-length") == "0":
            headers["content-length"] = ""
        own = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers) if name.startswith("x-ms-"))
        resource = f"/{ACCOUNT}{request.rel_url.raw_path}"
        asked = "".join(f"\n{name}:{request.query[name]}" for name in sorted(request.query))
        values = "\n".join(headers.get(name, "") for name in _SIGNED)
        return f"{request.method}\n{values}\n{own}{resource}{asked}"

    def _fault_of_url(self, request: web.Request, container: str, key: str) -> str | None:
        query = request.query
        fields = [
            *(query.get(name, "") for name in ("sp", "st", "se")),
            f"/blob/{ACCOUNT}/{container}/{key}",
            *(query.get(name, "") for name in _SHARED_ACCESS),
        ]
        if query["sig"] != _signed("\n".join(fields)):
            return "AuthenticationFailed"
        if datetime.now(UTC) > datetime.fromisoformat(query["se"]):
            return "AuthenticationFailed"
        allowed = {"r": {"GET", "HEAD"}}.get(query["sp"], set())
        return None if request.method in allowed else "AuthorizationPermissionMismatch"


def _signed(text: str) -> str:
    return base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()


def _refused(status: int, code: str, message: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml", headers={"x-ms-error-code": code})


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--container", action="append", default=[], help="may be given again")
    options = parser.parse_args()

    async def serve() -> None:
        async with AzureBlob(port=options.port, buckets={name: Bucket() for name in options.container}) as server:
            print(server.endpoint, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
