"""The XML dialect that S3 has made and Google Cloud Storage speaks as well: objects, listings, copies, parts.

Whose request it is has been checked before. Google's differences: its headers' prefix, 404 where what is deleted is
missing, no deletion of many at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import unquote
from uuid import uuid4
from xml.sax.saxutils import escape, unescape

from aiohttp import web

from tests.simulators.object_server import Bucket, Stored

_KEYS = re.compile(r"<Key>([^<]*)</Key>")
_PARTS = re.compile(r"<PartNumber>(\d+)</PartNumber>")
MOST_LISTED = 1000


@dataclass(frozen=True)
class XmlWire:
    """Answers requests for the objects of buckets.

    Attributes:
        buckets: by name.
        header: prefix of its own headers, as `x-amz-`.
        forgiving: whether deleting what is missing is fine.
        bad_key: what a key must not contain.
    """

    buckets: dict[str, Bucket]
    header: str = "x-amz-"
    forgiving: bool = True
    bad_key: re.Pattern[str] = re.compile(r"(?!)")

    async def answer(self, request: web.Request, bucket_name: str, key: str) -> web.Response:
        """The answer to any request below the address of the buckets."""
        bucket = self.buckets.get(bucket_name)
        body = await request.read()
        if bucket is None:
            return refused(404, "NoSuchBucket", "The specified bucket does not exist")
        if self.bad_key.search(key):
            return refused(400, "InvalidKey", f"Invalid key: {key}")
        query = request.query
        match request.method:
            case "GET" if not key:
                return self._listing(bucket, bucket_name, request)
            case "GET" | "HEAD":
                return self._read(bucket, key, request)
            case "PUT" if "uploadId" in query:
                return self._part(bucket, request, body)
            case "PUT" if f"{self.header}copy-source" in request.headers:
                return self._copy(bucket, key, request)
            case "PUT" if request.headers.get(f"{self.header}if-generation-match") == "0" and key in bucket.objects:
                return refused(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
            case "PUT":
                bucket.objects[key] = Stored(body, request.headers.get("Content-Type", "application/octet-stream"))
                return web.Response(headers={"ETag": bucket.objects[key].etag})
            case "POST" if "delete" in query:
                return self._delete_many(bucket, body)
            case "POST" if "uploads" in query:
                upload = uuid4().hex
                bucket.uploads[upload] = (key, {}, request.headers.get("Content-Type", "application/octet-stream"))
                return _xml("InitiateMultipartUploadResult", f"<Key>{escape(key)}</Key><UploadId>{upload}</UploadId>")
            case "POST" if "uploadId" in query:
                return self._complete(bucket, request, body)
            case "DELETE" if "uploadId" in query:
                bucket.uploads.pop(query["uploadId"], None)
                return web.Response(status=204)
            case "DELETE":
                if bucket.objects.pop(key, None) is None and not self.forgiving:
                    return _no_key()
                return web.Response(status=204)
        return refused(405, "MethodNotAllowed", "not simulated")

    def _read(self, bucket: Bucket, key: str, request: web.Request) -> web.Response:
        found = bucket.objects.get(key)
        if found is None:
            return _no_key()
        wished = {
            name: request.query[f"response-{name.lower()}"]
            for name in ("Content-Disposition", "Content-Type")
            if f"response-{name.lower()}" in request.query
        }
        return found.response(request, **wished)

    def _listing(self, bucket: Bucket, name: str, request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        after = request.query.get("continuation-token", "")
        most = min(int(request.query.get("max-keys", MOST_LISTED)), MOST_LISTED)
        keys = sorted(key for key in bucket.objects if key.startswith(prefix) and key > after)
        shown = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_stamp(bucket.objects[key].modified_at)}</LastModified>"
            f"<ETag>{escape(bucket.objects[key].etag)}</ETag><Size>{len(bucket.objects[key].data)}</Size></Contents>"
            for key in keys[:most]
        ]
        more = len(keys) > most
        if more:
            shown.append(f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>")
        head = f"<Name>{name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys[:most])}</KeyCount>"
        return _xml("ListBucketResult", f"{head}<IsTruncated>{str(more).lower()}</IsTruncated>{''.join(shown)}")

    def _copy(self, bucket: Bucket, key: str, request: web.Request) -> web.Response:
        source = unquote(request.headers[f"{self.header}copy-source"]).lstrip("/")
        source_bucket, _, source_key = source.partition("/")
        found = self.buckets.get(source_bucket, Bucket()).objects.get(source_key)
        if found is None:
            return _no_key()
        bucket.objects[key] = Stored(found.data, found.content_type)
        return _xml("CopyObjectResult", f"<ETag>{escape(found.etag)}</ETag>")

    def _delete_many(self, bucket: Bucket, body: bytes) -> web.Response:
        names = [unescape(name) for name in _KEYS.findall(body.decode())]
        if len(names) > MOST_LISTED:
            return refused(400, "MalformedXML", "too many keys")
        for name in names:
            bucket.objects.pop(name, None)
        return _xml("DeleteResult", "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names))

    def _part(self, bucket: Bucket, request: web.Request, body: bytes) -> web.Response:
        upload = bucket.uploads.get(request.query["uploadId"])
        if upload is None:
            return refused(404, "NoSuchUpload", "The specified upload does not exist")
        upload[1][int(request.query["partNumber"])] = body
        return web.Response(headers={"ETag": Stored(body).etag})

    def _complete(self, bucket: Bucket, request: web.Request, body: bytes) -> web.Response:
        upload = bucket.uploads.pop(request.query["uploadId"], None)
        if upload is None:
            return refused(404, "NoSuchUpload", "The specified upload does not exist")
        key, parts, content_type = upload
        named = [int(number) for number in _PARTS.findall(body.decode())]
        bucket.objects[key] = Stored(b"".join(parts[number] for number in named), content_type)
        etag = bucket.objects[key].etag
        return _xml("CompleteMultipartUploadResult", f"<Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag>")


def refused(status: int, code: str, message: str) -> web.Response:
    """An error as S3 writes it."""
    text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def _no_key() -> web.Response:
    return refused(404, "NoSuchKey", "The specified key does not exist.")


def _xml(name: str, inner: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{inner}</{name}>'
    return web.Response(text=text, content_type="application/xml")


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
