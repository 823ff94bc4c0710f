"""A server that speaks S3, in a process of its own: moto, behind a check of every request's signature.

moto keeps objects as S3 does but believes every signature. The check here is botocore's: it signs what has arrived
once more and compares. So a request with another length or type than its URL was signed for is refused, as S3
refuses it. A sha256 in the headers is compared with the body, which S3 documents and moto does not. Keys that were
given a policy may do what it says, and nothing else.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

ACCESS_KEY_ID = "AKIATEST"
SECRET_ACCESS_KEY = "correct horse battery staple"
POWERLESS_KEY_ID = "AKIAPOWERLESS"
"""A key with the same secret that may do nothing."""

REGION = "eu-central-1"
START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server: its address, and how tests look behind its back (requests without a signature)."""

    endpoint: str

    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        place = (
            f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        )
        self._request("PUT", name, place.encode())

    def give_policy(self, key_id: str, policy: dict[str, Any]) -> dict[str, str]:
        """Makes an access key with that policy; its environment."""
        self._request("PUT", f"-policies/{key_id}", json.dumps(policy).encode())
        return self.environment() | {"AWS_ACCESS_KEY_ID": key_id}

    def rights(self, key_id: str) -> dict[str, set[tuple[str, str]]]:
        """Actions and ARNs that a key of `give_policy` has `used`, and those that it `lacked`."""
        told = json.loads(self._request("GET", f"-policies/{key_id}"))
        return {name: {(action, arn) for action, arn in rights} for name, rights in told.items()}

    def listing(self, bucket: str, query: str = "") -> str:
        """The XML of the bucket's listing; with `uploads` of the uploads in parts that have not ended.

        With the name of a configuration, as `lifecycle`, that one.
        """
        return self._request("GET", f"{bucket}?{query}").decode()

    def add_objects(self, bucket: str, keys: list[str]) -> None:
        """Puts small objects there, many at once."""
        self._request("PUT", f"-objects/{bucket}", json.dumps(keys).encode())

    def configure(self, bucket: str, subresource: str, body: bytes, **headers: str) -> None:
        """Sets a configuration of the bucket; underscores in names of headers stand for hyphens."""
        self._answer("PUT", f"{bucket}?{subresource}", body, **headers)

    def headers(self, bucket: str, key: str) -> dict[str, str]:
        """What a HEAD of the object answers, by lower-case name."""
        return self._answer("HEAD", f"{bucket}/{key}")[0]

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return self._answer(method, path, body)[1]

    def _answer(self, method: str, path: str, body: bytes | None = None, **more: str) -> tuple[dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"), timeout=30)
        try:
            # Without some signature moto shows nobody an object that was copied.
            headers = {"X-Behind-The-Back": "yes", "Authorization": "AWS behind:back"}
            headers |= {name.replace("_", "-"): value for name, value in more.items()}
            connection.request(method, f"/{path}", body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        assert answer.status < 300, (answer.status, path, data)
        return {name.lower(): value for name, value in answer.getheaders()}, data


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server as long as the context lasts."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), "the S3 server did not start"
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.communicate(timeout=START_SECONDS)


def headers_of(environ: dict[str, Any]) -> dict[str, str]:
    """The headers of a request, by lower-case name."""
    headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_")}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    return headers


def key_of(environ: dict[str, Any]) -> str:
    """The id of the key that a request says it is signed with; empty where it says none."""
    presigned = dict(parse_qsl(environ["QUERY_STRING"])).get("X-Amz-Credential", "")
    header = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2]
    return (presigned or header).partition("/")[0]


def fault(environ: dict[str, Any], keys: Container[str] = (ACCESS_KEY_ID, POWERLESS_KEY_ID)) -> str | None:
    """The S3 code of what is wrong with a request's signature; None where it is good."""
    from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    headers = headers_of(environ)
    if "x-behind-the-back" in headers:
        return None
    query = dict(parse_qsl(environ["QUERY_STRING"], keep_blank_values=True))
    presigned = "X-Amz-Signature" in query
    if presigned:
        given, names, stamp = query["X-Amz-Signature"], query["X-Amz-SignedHeaders"], query["X-Amz-Date"]
        credential = query["X-Amz-Credential"]
    elif "authorization" in headers:
        fields = dict(part.strip().split("=", 1) for part in headers["authorization"].partition(" ")[2].split(","))
        given, names, credential = fields["Signature"], fields["SignedHeaders"], fields["Credential"]
        stamp = headers["x-amz-date"]
    else:
        return "AccessDenied"
    key_id, _, region, _, _ = credential.split("/")
    if key_id not in keys:
        return "InvalidAccessKeyId"
    begin = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if presigned and datetime.now(UTC) > begin + timedelta(seconds=int(query["X-Amz-Expires"])):
        return "AccessDenied"
    credentials = Credentials(key_id, SECRET_ACCESS_KEY)
    auth = S3SigV4QueryAuth(credentials, "s3", region) if presigned else S3SigV4Auth(credentials, "s3", region)
    signed = {name: headers[name] for name in names.split(";") if name in headers}
    # S3 signs what a query means: clients on the way may have escaped it in another way.
    query.pop("X-Amz-Signature", None)
    url = f"http://{headers['host']}{environ['REQUEST_URI'].partition('?')[0]}?{urlencode(query, quote_via=quote)}"
    request = AWSRequest(environ["REQUEST_METHOD"], url, headers=signed)
    request.context["timestamp"] = stamp
    expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    if given != expected:
        return "SignatureDoesNotMatch"
    return "AccessDenied" if key_id == POWERLESS_KEY_ID else None


def main() -> None:
    """Serves until the other end of its input is gone."""
    import threading

    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from s3_rights import Rights, needed
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto = DomainDispatcherApplication(create_backend_app)
    rights = Rights()

    def denial(environ: dict[str, Any]) -> str | None:
        key_id = key_of(environ)
        if key_id not in rights.policies:
            return None
        body = b""
        if environ["REQUEST_METHOD"] == "POST":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = BytesIO(body)
        path = environ["REQUEST_URI"].partition("?")[0]
        wanted = needed(environ["REQUEST_METHOD"], path, environ["QUERY_STRING"], headers_of(environ), body)
        return None if rights.ask(key_id, wanted) else "AccessDenied"

    def checked(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/-policies/"):
            key_id = environ["PATH_INFO"].rpartition("/")[2]
            if environ["REQUEST_METHOD"] == "PUT":
                rights.give(key_id, environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode())
            start_response("200 OK", [("Content-Type", "application/json")])
            return [rights.told(key_id)]
        if environ["PATH_INFO"].startswith("/-objects/"):
            bucket = environ["PATH_INFO"].rpartition("/")[2]
            for key in json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))):
                s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, b"x")
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]
        code = fault(environ, {ACCESS_KEY_ID, POWERLESS_KEY_ID, *rights.policies}) or denial(environ)
        if code is None and "HTTP_X_AMZ_CHECKSUM_SHA256" in environ:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = BytesIO(body)
            if b64encode(sha256(body).digest()).decode() != environ["HTTP_X_AMZ_CHECKSUM_SHA256"]:
                code = "BadDigest"
        if code is None:
            return moto(environ, start_response)
        # Read what was sent, lest the connection break before the answer is seen.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status = "400 Bad Request" if code == "BadDigest" else "403 Forbidden"
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>refused by the check</Message></Error>".encode()]

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None: ...

    server = make_server("127.0.0.1", 0, checked, threaded=True, request_handler=Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
