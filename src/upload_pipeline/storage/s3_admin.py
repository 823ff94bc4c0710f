"""Requests about a bucket itself, not about what is in it: those that obstore does not make.

Signed with the keys of the environment: those of a role stay inside obstore and sign nothing here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.failures import STORAGE_SETTING, translate, unavailable
from upload_pipeline.storage.http_bounds import ANSWER_SECONDS, RETRY_PAUSES
from upload_pipeline.storage.s3 import bucket_endpoint, bucket_region
from upload_pipeline.storage.s3_failures import s3_refusal
from upload_pipeline.storage.s3_xml import parse
from upload_pipeline.storage.sigv4 import Credentials, canonical_query, signed_headers
from upload_pipeline.storage_address import Bucket

MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""Of a configuration; the largest that S3 keeps, 1,000 life-cycle rules, is far below."""

_NOT_OFFERED_STATUSES = frozenset({405, 501})
_NOT_OFFERED_CODES = frozenset({"NotImplemented", "MethodNotAllowed", "UnsupportedOperation", "NotSupported"})


class NotOffered(Exception):  # noqa: N818 - it says what the server is like, nothing went wrong
    """The server does not know this kind of configuration."""


@dataclass
class Refused(Exception):  # noqa: N818 - named for what the server did
    """The server refused, for the reason that its code gives."""

    status: int
    code: str
    message: str

    @property
    def denied(self) -> bool:
        """Whether a right is missing."""
        return self.status == 403 or self.code in ("AccessDenied", "AllAccessDisabled")


@dataclass(frozen=True, slots=True)
class BucketAdmin:
    """A bucket as its owner sees it; open one with `open_admin`.

    Attributes:
        bucket: which.
        endpoint: of the server; the bucket's name goes into the path.
        region: that requests are signed for.
    """

    bucket: Bucket
    endpoint: str
    region: str
    credentials: Credentials
    session: aiohttp.ClientSession

    @property
    def tls(self) -> bool:
        """Whether the server is reached by TLS."""
        return self.endpoint.startswith("https://")

    async def read(self, subresource: str, absent: frozenset[str]) -> bytes | None:
        """A part of the configuration, `None` where it is not set.

        Args:
            subresource: as `lifecycle`.
            absent: the codes by which the server says that it is not set.

        Raises:
            NotOffered, Refused: as the classes say. A server that does not know the question may also take it for
                one about what is in the bucket.
            PipelineError: `STORAGE_UNAVAILABLE` where the server does not answer; `STORAGE_DENIED` for keys that it
                does not know.
        """
        try:
            answer = await self._ask("GET", subresource)
        except Refused as error:
            if error.code in absent:
                return None
            raise
        if _is_listing(answer):
            raise NotOffered("it gave a listing")
        return answer

    async def write(
        self, subresource: str, body: bytes, headers: Mapping[str, str] | None = None, *, method: str = "PUT"
    ) -> None:
        """Sets a part of the configuration; with an empty name the bucket itself is made.

        Raises:
            NotOffered, Refused, PipelineError: as `read` does.
        """
        more = dict(headers or {})
        if body:
            # S3 wants some sum of such a body; this is the one that every server takes.
            more["content-md5"] = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            more.setdefault("content-type", "application/xml")
        await self._ask(method, subresource, body, more)

    async def _ask(
        self, method: str, subresource: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        action = f"{method} the bucket {self.bucket.name}{f' ({subresource})' if subresource else ''}"
        for pause in (*RETRY_PAUSES, None):
            try:
                status, answer = await self._send(method, subresource, body, headers or {})
            except (aiohttp.ClientError, TimeoutError) as error:
                if pause is None:
                    reason = str(error) or type(error).__name__
                    remedy = f"Check that the server of {STORAGE_SETTING}, {self.endpoint}, answers, then try again."
                    raise unavailable(action, reason, remedy) from error
            else:
                if status < 300:
                    return answer
                # 501 is an answer: trying again changes nothing. A change that meets another one is put off (409).
                passing = status in (429, 500, 502, 503, 504) or b"<Code>OperationAborted</Code>" in answer
                if not passing or pause is None:
                    raise self._refused(action, status, answer)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _send(self, method: str, subresource: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        parts = urlsplit(self.endpoint)
        path = f"{parts.path}/{quote(self.bucket.name)}"
        query = {subresource: ""} if subresource else {}
        signed = signed_headers(
            self.credentials,
            self.region,
            method=method,
            host=parts.netloc,
            path=path,
            query=query,
            headers=headers,
            body=body,
        )
        spelled = f"?{canonical_query(query)}" if query else ""
        url = URL(f"{parts.scheme}://{parts.netloc}{path}{spelled}", encoded=True)
        async with self.session.request(method, url, data=body, headers=signed, allow_redirects=False) as answer:
            data = await answer.content.read(MAX_ANSWER_BYTES)
            while more := await answer.content.read(MAX_ANSWER_BYTES):
                data += more
                if len(data) > MAX_ANSWER_BYTES:
                    raise aiohttp.ClientPayloadError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
            return answer.status, data

    def _refused(self, action: str, status: int, answer: bytes) -> Exception:
        try:
            told = parse(answer)
            code, message = told.value("Code"), told.value("Message")
        except ValueError:
            code, message = "", ""
        if status in _NOT_OFFERED_STATUSES or code in _NOT_OFFERED_CODES:
            return NotOffered(code or str(status))
        told_of = OSError(f"<Code>{code}</Code><Message>{message}</Message>")
        named = translate(told_of, action, refusal=s3_refusal(told_of, STORAGE_SETTING))
        # What is wrong with the keys, the region or the server is wrong for every part of the configuration.
        if status >= 500 or status == 301 or (named.code is ErrorCode.STORAGE_DENIED and code != "AccessDenied"):
            return named
        if code == "AuthorizationHeaderMalformed":
            return named
        return Refused(status, code or str(status), message or "no reason given")


def _is_listing(answer: bytes) -> bool:
    try:
        return parse(answer).name.startswith("List")
    except ValueError:
        return False


@asynccontextmanager
async def open_admin(bucket: Bucket) -> AsyncGenerator[BucketAdmin]:
    """The bucket of a storage URL, asked with the keys, the region and the endpoint of the environment.

    Raises:
        PipelineError: `SETTING_INVALID` where there are no keys, or the endpoint may not be spoken to.
    """
    region = bucket_region()
    credentials = Credentials(
        os.environ.get("AWS_ACCESS_KEY_ID", ""),
        os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        os.environ.get("AWS_SESSION_TOKEN", ""),
    )
    if not credentials.access_key_id or not credentials.secret_access_key:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set. Set them to those of whoever owns the bucket; a "
            "role is no help here, but its temporary keys are (with AWS_SESSION_TOKEN).",
            {"setting": "AWS_ACCESS_KEY_ID"},
        )
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield BucketAdmin(bucket, bucket_endpoint(region), region, credentials, session)
