"""A team's own model behind the detector `webhook`: it takes signed messages and answers by signed callbacks.

    python -m tests.simulators.detection_model --port 8102 --secret "$UPLOAD_PIPELINE_DETECTION_SECRET" --latency 1

It is written against docs/detection.md alone and shares no code with the service: it checks and signs by itself. What
it finds is a function of the photo's id and the detection types. The books tell each message that came and each
callback's status; over HTTP they are at `GET /books`, and faults are asked for by `POST /misbehave`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from aiohttp import ClientError, ClientSession, ClientTimeout, web

FIELDS = {"photo_id", "s3_url", "detection_types", "priority"}


class Fault(StrEnum):
    """How a message can be dealt with badly. The first five take no message."""

    SERVER_ERROR = "server_error"  # 500
    BUSY = "busy"  # 429 and Retry-After
    REJECTED = "rejected"  # 422
    REDIRECT = "redirect"  # 307 to itself
    HANG = "hang"  # no answer, ever
    SILENT = "silent"  # taken, never called back
    LATE = "late"  # called back after `late` seconds
    TWICE = "twice"  # the same callback twice
    CONTRADICTS = "contradicts"  # a second callback that says something else
    FORGED = "forged"  # a callback under another secret
    STALE = "stale"  # a callback signed an hour ago
    OUTSIDE = "outside"  # a callback with a box beyond the edge
    ERROR = "error"  # a callback that reports an error
    EAGER = "eager"  # called back before the message is answered


_NOT_TAKEN = {Fault.SERVER_ERROR, Fault.BUSY, Fault.REJECTED, Fault.REDIRECT, Fault.HANG}


@dataclass
class Books:
    """What came and what became of it.

    Attributes:
        messages: (delivery id, attempt, message) of each that was signed well, in order.
        refused: messages whose signature or shape was wrong.
        callbacks: (photo id, status) of each callback, in order; status 0 where nobody answered.
        faults: what was done wrong, and how often.
        headers: of the last message.
    """

    messages: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)
    refused: int = 0
    callbacks: list[tuple[str, int]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)

    def deliveries(self) -> Counter[str]:
        """How often the message of each photo came."""
        return Counter(message["photo_id"] for _, _, message in self.messages)


@dataclass
class DetectionModel:
    """The model's server: `async with DetectionModel(secret) as model: model.url`.

    Attributes:
        secret: that it shares with the service.
        latency: seconds between a message and its callback.
        late: seconds of a late one.
        call_back: whether it calls back at all; what is held back is sent by `answer_all`.
        port: to listen on; 0 takes any that is free.
    """

    secret: str
    latency: float = 0.0
    late: float = 2.0
    call_back: bool = True
    port: int = 0
    url: str = ""
    books: Books = field(default_factory=Books)
    _asked: list[Fault] = field(default_factory=list)
    _under_way: set[asyncio.Task[None]] = field(default_factory=set)
    _held: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Serves on the loopback address."""
        app = web.Application()
        app.router.add_post("/detect", self._detect)
        app.router.add_get("/books", self._show_books)
        app.router.add_post("/misbehave", self._ask_to_misbehave)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/detect"
        self._session = ClientSession(timeout=ClientTimeout(total=10))
        return self

    async def __aexit__(self, *raised: object) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._session.close()
        await self._runner.cleanup()

    def misbehave(self, fault: str, *, times: int = 1) -> None:
        """The next `times` messages are dealt with like this."""
        self._asked.extend([Fault(fault)] * times)

    async def answer_all(self) -> None:
        """Calls back for every message that was held back."""
        held, self._held = self._held, []
        for callback, message in held:
            await self._post(callback, _answer_to(message))

    async def _show_books(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({**vars(self.books), "messages": [message for _, _, message in self.books.messages]})

    async def _ask_to_misbehave(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.misbehave(asked["fault"], times=asked.get("times", 1))
        return web.json_response({})

    async def _detect(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        if not self._is_signed(request.headers.get("X-Upload-Pipeline-Signature", ""), raw):
            self.books.refused += 1
            return web.json_response({"error": "wrong signature"}, status=401)
        message = json.loads(raw)
        if set(message) != FIELDS:
            self.books.refused += 1
            return web.json_response({"error": "not the message"}, status=400)
        self.books.headers = dict(request.headers)
        delivery, attempt = request.headers["X-Upload-Pipeline-Delivery"], request.headers["X-Upload-Pipeline-Attempt"]
        self.books.messages.append((delivery, int(attempt), message))
        fault = self._asked.pop(0) if self._asked else None
        if fault is not None:
            self.books.faults[fault.value] += 1
        if fault in _NOT_TAKEN:
            return await self._refuse(request, fault)
        callback = request.headers["X-Upload-Pipeline-Callback"]
        if fault is Fault.EAGER:
            await self._post(callback, _answer_to(message))
        elif not self.call_back:
            self._held.append((callback, message))
        elif fault is not Fault.SILENT:
            task = asyncio.create_task(self._call_back(callback, message, fault))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        return web.json_response({"taken": delivery}, status=202)

    async def _refuse(self, request: web.Request, fault: Fault | None) -> web.Response:
        match fault:
            case Fault.BUSY:
                return web.json_response({}, status=429, headers={"Retry-After": "1"})
            case Fault.REJECTED:
                return web.json_response({"error": "no such photo"}, status=422)
            case Fault.REDIRECT:
                return web.Response(status=307, headers={"Location": self.url})
            case Fault.HANG:
                while request.transport is not None and not request.transport.is_closing():
                    await asyncio.sleep(0.05)
                return web.Response()
            case _:
                return web.json_response({"error": "out of memory"}, status=500)

    async def _call_back(self, callback: str, message: dict[str, Any], fault: Fault | None) -> None:
        await asyncio.sleep(self.late if fault is Fault.LATE else self.latency)
        answer = _answer_to(message)
        match fault:
            case Fault.ERROR:
                await self._post(callback, {"photo_id": message["photo_id"], "error": "The photo is too dark."})
            case Fault.FORGED:
                await self._post(callback, answer, secret="somebody else's secret, 32 bytes long")
            case Fault.STALE:
                await self._post(callback, answer, at=time.time() - 3600)
            case Fault.OUTSIDE:
                answer["detections"][0]["box"] = {"x": 0.5, "y": 0.5, "width": 0.6, "height": 0.1}
                await self._post(callback, answer)
            case _:
                await self._post(callback, answer)
        if fault is Fault.TWICE:
            await self._post(callback, answer)
        if fault is Fault.CONTRADICTS:
            await self._post(callback, {**answer, "detections": []})

    async def _post(
        self, callback: str, answer: dict[str, Any], *, secret: str | None = None, at: float | None = None
    ) -> None:
        raw = json.dumps(answer).encode()
        headers = {
            "Content-Type": "application/json",
            "X-Upload-Pipeline-Signature": signature(raw, secret or self.secret, at=at or time.time()),
        }
        status = 0
        with suppress(ClientError, TimeoutError):
            async with self._session.post(callback, data=raw, headers=headers) as response:
                status = response.status
        self.books.callbacks.append((answer["photo_id"], status))

    def _is_signed(self, header: str, raw: bytes) -> bool:
        told = dict(part.partition("=")[::2] for part in header.split(","))
        if not told.get("t", "").isdecimal() or abs(time.time() - int(told["t"])) > 300:
            return False
        return hmac.compare_digest(signature(raw, self.secret, at=int(told["t"])), header)


def signature(raw: bytes, secret: str, *, at: float) -> str:
    """What `X-Upload-Pipeline-Signature` says of a body."""
    moment = str(int(at))
    return f"t={moment},v1={hmac.new(secret.encode(), f'{moment}.'.encode() + raw, hashlib.sha256).hexdigest()}"


def findings_of(photo_id: str, types: list[str]) -> list[dict[str, Any]]:
    """What the model finds in a photo."""
    found = []
    for kind in types:
        draw = hashlib.sha256(f"{kind} {photo_id}".encode()).digest()
        box = {"x": round(draw[0] / 512, 3), "y": round(draw[1] / 512, 3), "width": 0.25, "height": 0.5}
        confidence = round(draw[2] / 255, 3)
        found.append({"type": kind, "label": f"{kind} {draw[3]}", "confidence": confidence, "box": box, "note": ""})
    return found


def _answer_to(message: dict[str, Any]) -> dict[str, Any]:
    return {
        "photo_id": message["photo_id"],
        "detections": findings_of(message["photo_id"], message["detection_types"]),
    }


def main() -> None:
    """Serves until it is interrupted; the first line that is printed is the URL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--secret", required=True)
    parser.add_argument("--latency", type=float, default=0.0)
    options = vars(parser.parse_args())

    async def serve() -> None:
        async with DetectionModel(**options) as model:
            print(model.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
