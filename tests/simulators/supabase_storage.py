"""A server that speaks Supabase Storage: its REST API, its S3 endpoint, users' tokens, policies, and its bad days.

    python -m tests.simulators.supabase_storage --port 8300 --bucket files --faults '{"slow_down": 0.1}' --seed 7

As in the real one the HTTP status is 400 for nearly every refusal, with the true one in the body; a signed upload is
checked against the policies when it is made and not when it is used; S3 replaces whatever a request says. Each S3
request's signature is computed once more by botocore. Faults are asked for by `POST /misbehave`, and `GET /requests`
tells what was asked how often.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import jwt
from aiohttp import web

from tests.s3_servers import fault as signature_fault
from tests.simulators.object_server import Bucket, Fault, ObjectServer, Stored
from tests.simulators.supabase_wire import (
    PUBLISHABLE_KEY,
    SECRET_KEY,
    Refused,
    described,
    error_response,
    received,
    told,
)
from tests.simulators.xml_wire import XmlWire, refused

JWT_SECRET = "a secret of thirty-two bytes, or of more"
"""What users' tokens are signed with unless another one is given."""

API = "/storage/v1"
BAD_KEY = re.compile(r"[^A-Za-z0-9_/!.*'() &$=@;:+,?-]")


@dataclass(frozen=True)
class Caller:
    """Who asks: a user, nobody in particular, or the service itself, which no policy holds back."""

    user: str | None = None
    service: bool = False


def own_folder(action: str, bucket: str, name: str, user: str | None) -> bool:
    """Insert and select below `raw/<user>`, in whatever folder that is; nothing else."""
    del bucket
    folders = name.split("/")[:-1]
    return action in {"insert", "select"} and user is not None and folders[-2:] == ["raw", user]


@dataclass
class SupabaseStorage(ObjectServer):
    """The server; see `ObjectServer`.

    Attributes:
        jwt_secret: of users' tokens (HS256).
        upload_seconds: that a token for an upload lives, whoever asks.
        policy: whether (action, bucket, name, user) is allowed to a user.
    """

    jwt_secret: str = JWT_SECRET
    upload_seconds: float = 7200.0
    policy: Callable[[str, str, str, str | None], bool] = own_folder
    _url_secret: str = "the key that the server signs its own URLs with"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """The REST API, the S3 endpoint below it, and what tests ask."""
        self._wire = XmlWire(self.buckets, bad_key=BAD_KEY)
        router.add_route("*", f"{API}/s3/{{bucket}}", self._s3)
        router.add_route("*", f"{API}/s3/{{bucket}}/{{key:.*}}", self._s3)
        router.add_get(f"{API}/object/public/{{bucket}}/{{key:.+}}", self._download_public)
        place = f"{API}/object/{{bucket}}/{{key:.+}}"
        for method, path, handler in (
            ("POST", f"{API}/bucket", self._make_bucket),
            ("GET", f"{API}/object/sign/{{bucket}}/{{key:.+}}", self._use_download),
            ("PUT", f"{API}/object/upload/sign/{{bucket}}/{{key:.+}}", self._use_upload),
            ("POST", f"{API}/object/upload/sign/{{bucket}}/{{key:.+}}", self._sign_upload),
            ("POST", f"{API}/object/sign/{{bucket}}/{{key:.+}}", self._sign_download),
            ("POST", f"{API}/object/sign/{{bucket}}", self._sign_downloads),
            ("POST", f"{API}/object/list/{{bucket}}", self._list),
            ("POST", f"{API}/object/list-v2/{{bucket}}", self._list_v2),
            ("POST", f"{API}/object/move", self._move),
            ("POST", f"{API}/object/copy", self._move),
            ("GET", f"{API}/object/info/{{bucket}}/{{key:.+}}", self._info),
            ("GET", f"{API}/object/authenticated/{{bucket}}/{{key:.+}}", self._download),
            ("DELETE", f"{API}/object/{{bucket}}", self._remove),
            ("DELETE", place, self._remove_one),
            ("GET", place, self._download),
            ("POST", place, self._upload),
            ("PUT", place, self._upload),
        ):
            router.add_route(method, path, told(handler))
        router.add_get("/requests", self._show_requests)
        router.add_post("/misbehave", self._ask_to_misbehave)

    def refusal(self, fault: Fault) -> web.Response:
        """As the REST API words it; S3's clients go by the status."""
        match fault:
            case Fault.SLOW_DOWN:
                return error_response(429, "429", "SlowDown", "SlowDown", "Please reduce your request rate")
            case Fault.TIMEOUT:
                return error_response(
                    544, "544", "DatabaseTimeout", "DatabaseTimeout", "The connection to the database timed out"
                )
        return error_response(500, "500", "InternalError", "Internal", "Internal Server Error")

    def token(self, user: str, **claims: Any) -> str:
        """A user's access token; `claims` replace those of a good one."""
        good = {"sub": user, "aud": "authenticated", "role": "authenticated", "exp": int(time.time()) + 600}
        return jwt.encode({**good, **claims}, self.jwt_secret, algorithm="HS256")

    # --- who asks, and whether they may

    def _caller(self, request: web.Request) -> Caller:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer == SECRET_KEY:
            return Caller(service=True)
        if bearer in {"", PUBLISHABLE_KEY}:
            return Caller()
        try:
            claims = jwt.decode(bearer, self.jwt_secret, algorithms=["HS256"], audience="authenticated")
        except jwt.ExpiredSignatureError as error:
            raise Refused("ExpiredToken") from error
        except jwt.InvalidTokenError as error:
            raise Refused("InvalidJWT") from error
        return Caller(claims["sub"])

    def _may(self, caller: Caller, action: str, bucket: str, name: str) -> bool:
        return caller.service or self.policy(action, bucket, name, caller.user)

    def _bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise Refused("NoSuchBucket")
        return self.buckets[name]

    def _readable(self, caller: Caller, bucket: str, name: str) -> Stored:
        """An object; one that the policies hide is like one that is not there."""
        found = self._bucket(bucket).objects.get(name)
        if found is None or not self._may(caller, "select", bucket, name):
            raise Refused("NoSuchKey")
        return found

    def _check_insert(self, caller: Caller, bucket: str, name: str, *, upsert: bool) -> None:
        if BAD_KEY.search(name):
            raise Refused("InvalidKey")
        there = name in self._bucket(bucket).objects
        needed = ("insert", "select", "update") if upsert else ("insert",)
        if not all(self._may(caller, action, bucket, name) for action in needed):
            raise Refused("AccessDenied")
        if there and not upsert:
            raise Refused("KeyAlreadyExists")

    # --- URLs that carry their permission

    async def _sign_upload(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        caller, upsert = self._caller(request), request.headers.get("x-upsert") == "true"
        self._check_insert(caller, bucket, name, upsert=upsert)
        granted = {"owner": caller.user, "url": f"{bucket}/{name}", "upsert": upsert, "scope": "upload"}
        token = self._granting(granted, self.upload_seconds)
        return web.json_response({"url": f"/object/upload/sign/{bucket}/{name}?token={token}", "token": token})

    async def _use_upload(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        granted = self._granted(request, "upload")
        if name in self._bucket(bucket).objects and not granted["upsert"]:
            await request.read()
            raise Refused("KeyAlreadyExists")
        await self._store(request, bucket, name, granted["owner"])
        return web.json_response({"Key": f"{bucket}/{name}"})

    async def _sign_download(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        seconds = float((await request.json())["expiresIn"])
        self._readable(self._caller(request), bucket, name)
        return web.json_response({"signedURL": self._download_path(bucket, name, seconds)})

    async def _sign_downloads(self, request: web.Request) -> web.Response:
        bucket, asked, caller = request.match_info["bucket"], await request.json(), self._caller(request)
        answers = []
        for name in asked["paths"]:
            try:
                self._readable(caller, bucket, name)
                signed: str | None = self._download_path(bucket, name, float(asked["expiresIn"]))
            except Refused:
                signed = None
            problem = None if signed else "Either the object does not exist or you do not have access to it"
            answers.append({"error": problem, "path": name, "signedURL": signed})
        return web.json_response(answers)

    async def _use_download(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        self._granted(request, "download")
        found = self._bucket(bucket).objects.get(name)
        if found is None:
            raise Refused("NoSuchKey")
        download = request.query.get("download")
        if download is None:
            return found.response(request)
        named = (
            f"; filename={quote(download, safe='')}; filename*=UTF-8''{quote(download, safe='')};" if download else ""
        )
        return found.response(request, **{"Content-Disposition": f"attachment{named}"})

    def _download_path(self, bucket: str, name: str, seconds: float) -> str:
        token = self._granting({"url": f"{bucket}/{name}", "scope": "download"}, seconds)
        return f"/object/sign/{bucket}/{name}?token={token}"

    def _granting(self, granted: dict[str, Any], seconds: float) -> str:
        now = time.time()
        return jwt.encode({**granted, "iat": int(now), "exp": int(now + seconds)}, self._url_secret, algorithm="HS256")

    def _granted(self, request: web.Request, scope: str) -> dict[str, Any]:
        try:
            granted: dict[str, Any] = jwt.decode(
                request.query.get("token", ""), self._url_secret, algorithms=["HS256"], options={"require": ["exp"]}
            )
        except jwt.ExpiredSignatureError as error:
            raise Refused("ExpiredToken") from error
        except jwt.InvalidTokenError as error:
            raise Refused("InvalidJWT") from error
        if granted["url"] != "/".join(_place(request)) or granted["scope"] != scope:
            raise Refused("InvalidSignature")
        return granted

    # --- objects

    async def _upload(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        caller = self._caller(request)
        upsert = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        self._check_insert(caller, bucket, name, upsert=upsert)
        stored = await self._store(request, bucket, name, caller.user)
        return web.json_response({"Id": stored.object_id, "Key": f"{bucket}/{name}"})

    async def _store(self, request: web.Request, bucket: str, name: str, owner: str | None) -> Stored:
        place = self._bucket(bucket)
        stored = await received(request)
        stored.owner = owner
        if place.media_types and stored.content_type.partition(";")[0] not in place.media_types:
            raise Refused("InvalidMimeType")
        if place.max_bytes is not None and len(stored.data) > place.max_bytes:
            raise Refused("EntityTooLarge")
        place.objects[name] = stored
        return stored

    async def _download(self, request: web.Request) -> web.Response:
        return self._readable(self._caller(request), *_place(request)).response(request)

    async def _download_public(self, request: web.Request) -> web.Response:
        """A bucket that is not public is said not to be there."""
        bucket, name = _place(request)
        found = self.buckets.get(bucket)
        if found is None or not found.public:
            return error_response(400, "404", "NoSuchBucket", "Bucket not found", "Bucket not found")
        return found.objects[name].response(request)

    async def _info(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        found = self._readable(self._caller(request), bucket, name)
        return web.json_response({**described(name, found), "bucket_id": bucket, "metadata": found.metadata})

    async def _list(self, request: web.Request) -> web.Response:
        """What lies in one folder; folders themselves have no id."""
        bucket, asked = request.match_info["bucket"], await request.json()
        folder = asked["prefix"].rstrip("/") + "/" if asked["prefix"] else ""
        visible = self._visible(self._caller(request), bucket, folder)
        inside: dict[str, Stored | None] = {}
        for name, stored in visible.items():
            head, slash, _ = name.removeprefix(folder).partition("/")
            inside[head] = None if slash else stored
        names = sorted(inside, reverse=asked.get("sortBy", {}).get("order") == "desc")
        page = [(name, inside[name]) for name in names[asked["offset"] : asked["offset"] + asked["limit"]]]
        return web.json_response(
            [described(name, found) if found else {"name": name, "id": None} for name, found in page]
        )

    async def _list_v2(self, request: web.Request) -> web.Response:
        """All names below a prefix, a page at a time."""
        bucket, asked = request.match_info["bucket"], await request.json()
        visible = self._visible(self._caller(request), bucket, asked.get("prefix", ""))
        names = [name for name in sorted(visible) if name > asked.get("cursor", "")]
        page = names[: asked.get("limit", 1000)]
        answer: dict[str, Any] = {
            "hasNext": len(names) > len(page),
            "folders": [],
            "objects": [described(name, visible[name]) for name in page],
        }
        if answer["hasNext"]:
            answer["nextCursor"] = page[-1]
        return web.json_response(answer)

    def _visible(self, caller: Caller, bucket: str, prefix: str) -> dict[str, Stored]:
        found = self._bucket(bucket).objects.items()
        return {
            name: stored
            for name, stored in found
            if name.startswith(prefix) and self._may(caller, "select", bucket, name)
        }

    async def _move(self, request: web.Request) -> web.Response:
        asked, caller = await request.json(), self._caller(request)
        bucket, source, target = asked["bucketId"], asked["sourceKey"], asked["destinationKey"]
        found = self._readable(caller, bucket, source)
        copied = request.path.endswith("/copy")
        if not copied and not self._may(caller, "update", bucket, source):
            raise Refused("AccessDenied")
        self._check_insert(Caller(service=True) if not copied else caller, bucket, target, upsert=False)
        self.buckets[bucket].objects[target] = found if not copied else Stored(found.data, found.content_type)
        if not copied:
            del self.buckets[bucket].objects[source]
        return web.json_response({"message": "Successfully moved", "Key": f"{bucket}/{target}"})

    async def _remove(self, request: web.Request) -> web.Response:
        bucket, names, caller = request.match_info["bucket"], (await request.json())["prefixes"], self._caller(request)
        if len(names) > 1000:
            return error_response(
                400, "400", "InvalidRequest", "Invalid request", "prefixes must NOT have more than 1000 items"
            )
        objects = self._bucket(bucket).objects
        gone = [name for name in names if name in objects and self._may(caller, "delete", bucket, name)]
        return web.json_response([described(name, objects.pop(name)) for name in gone])

    async def _remove_one(self, request: web.Request) -> web.Response:
        bucket, name = _place(request)
        if name not in self._bucket(bucket).objects or not self._may(self._caller(request), "delete", bucket, name):
            raise Refused("NoSuchKey")
        del self.buckets[bucket].objects[name]
        return web.json_response({"message": "Successfully deleted"})

    async def _make_bucket(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if not self._caller(request).service:
            raise Refused("AccessDenied")
        if asked["id"] in self.buckets:
            raise Refused("KeyAlreadyExists")
        allowed = tuple(asked.get("allowed_mime_types") or ())
        self.buckets[asked["id"]] = Bucket(max_bytes=asked.get("file_size_limit"), media_types=allowed)
        return web.json_response({"name": asked["id"]})

    # --- S3, and tests

    async def _s3(self, request: web.Request) -> web.Response:
        headers = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items()}
        path, _, query = request.raw_path.partition("?")
        code = signature_fault(
            {**headers, "REQUEST_METHOD": request.method, "REQUEST_URI": path, "QUERY_STRING": query}
        )
        body = await request.read()
        if code is None and request.headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD") not in (
            "UNSIGNED-PAYLOAD",
            sha256(body).hexdigest(),
        ):
            code = "XAmzContentSHA256Mismatch"
        if code is not None:
            return refused(403, code, "refused by the check of signatures")
        return await self._wire.answer(request, request.match_info["bucket"], request.match_info.get("key", ""))

    async def _show_requests(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(self.requests)

    async def _ask_to_misbehave(self, request: web.Request) -> web.Response:
        self.misbehave(**await request.json())
        return web.json_response({})


def _place(request: web.Request) -> tuple[str, str]:
    return request.match_info["bucket"], request.match_info["key"]


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[], help="may be given again")
    parser.add_argument("--jwt-secret", default=JWT_SECRET)
    parser.add_argument("--upload-seconds", type=float, default=7200.0, help="that a token for an upload lives")
    parser.add_argument("--faults", type=json.loads, default={}, help='as {"slow_down": 0.1, "dropped": 0.02}')
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    options["buckets"] = {name: Bucket() for name in options.pop("bucket")}

    async def serve() -> None:
        async with SupabaseStorage(**options) as server:
            print(server.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
