"""A server that speaks LlamaCloud's files and parse API: its statuses, failed pages, webhooks, and its bad days.

    python -m tests.simulators.llama_cloud --port 8200 --running 0.5 --faults '{"rate_limited": 0.1}' --seed 7

A page's Markdown is a function of the file alone: of text the pages are the parts between form feeds, of a PDF as many
as it names. A job is paid for when it is made, unless it is one that is to fail. The books tell which documents were
paid for, how often, and whose answers never arrived; over HTTP they are at `GET /books`. `POST /misbehave` asks for
faults, as `{"fault": "quota", "times": 2}`, and for how the next job ends, as `{"ending": "FAILED"}` or
`{"failed_pages": [2]}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import uuid4

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from tests.simulators.llama_cloud_books import Books, Ending, Fault, ParseJob, StoredFile
from tests.simulators.llama_cloud_wire import page_of, pages_of, read_form, refusal, sign
from tests.simulators.openai_server import Window, until_gone

KEY = "llx-simulated"
"""The API key that is accepted."""
CREDITS = {"fast": 1, "cost_effective": 3, "agentic": 10, "agentic_plus": 45}
"""Of a page, by tier."""
_TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
_EVENTS = {"PENDING": "pending", "RUNNING": "running", "COMPLETED": "success", "FAILED": "error"}


@dataclass
class LlamaCloudSimulator:
    """The server: `async with LlamaCloudSimulator(…) as simulator: simulator.url`.

    Attributes:
        pending: seconds that a job waits.
        running: seconds that it then takes.
        requests_per_minute: refused beyond it; the free plan has 20.
        uploads_per_5_s: files, refused beyond it.
        parses_per_10_s: jobs that are made, refused beyond it.
        file_life: seconds after which an uploaded file is gone. A job that was made of it goes on.
        expired_listed: whether such a file is still found, with the time that is over; unknown of the real one.
        faults: share of requests for each fault, by `seed`.
        retry_after: what a 429 says.
        unique_external_ids: whether a second file with the same external id is refused (409); unknown of the real one.
        webhooks_doubled: whether each message is sent twice.
        webhooks_reversed: whether messages are held until a job has ended, and then sent last first.
        billed: whether a job that has ended tells its credits; they are null until billing has recorded them.
        bills_failures: whether a job that fails costs as much as one that does not; unknown of the real one.
        clock: seconds that only grow.
        port: to listen on; 0 takes any that is free.
    """

    pending: float = 0.0
    running: float = 0.0
    requests_per_minute: int = 1_000_000
    uploads_per_5_s: int = 50
    parses_per_10_s: int = 50
    file_life: float = 48 * 3600.0
    expired_listed: bool = False
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    retry_after: float = 1.0
    unique_external_ids: bool = False
    webhooks_doubled: bool = False
    webhooks_reversed: bool = False
    billed: bool = True
    bills_failures: bool = False
    clock: Callable[[], float] = time.monotonic
    books: Books = field(default_factory=Books)
    port: int = 0
    url: str = ""
    _asked: list[tuple[Fault, str | None]] = field(default_factory=list)
    _endings: list[tuple[Ending, frozenset[int]]] = field(default_factory=list)
    _files: dict[str, StoredFile] = field(default_factory=dict)
    _jobs: dict[str, ParseJob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(Fault)
        if unknown:
            raise ValueError(f"there is no fault {', '.join(sorted(unknown))}")
        self._chance = random.Random(self.seed)
        self._minute = Window(self.requests_per_minute, 60.0, self.clock)
        self._windows = {
            "upload": Window(self.uploads_per_5_s, 5.0, self.clock),
            "submit": Window(self.parses_per_10_s, 10.0, self.clock),
        }

    async def __aenter__(self) -> Self:
        """Serves on the loopback address; `url` is then what a client takes as its base URL."""
        self._runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._session = ClientSession(timeout=ClientTimeout(total=5))
        self._telling = asyncio.create_task(self._tell())
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._telling.cancel()
        with suppress(asyncio.CancelledError):
            await self._telling
        await self._session.close()
        await self._runner.cleanup()

    @property
    def busiest_minute(self) -> int:
        """The most requests that counted in a minute."""
        return self._minute.most

    def misbehave(self, fault: str, *, operation: str | None = None, times: int = 1) -> None:
        """The next `times` requests (of this operation: upload, find, submit, list, poll) have this fault."""
        self._asked.extend([(Fault(fault), operation)] * times)

    def end_next(self, ending: str = "COMPLETED", *, failed_pages: tuple[int, ...] = ()) -> None:
        """The next job that is made ends like this."""
        self._endings.append((Ending(ending), frozenset(failed_pages)))

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        files, parse = "/api/v1/beta/files", "/api/v2/parse"
        app.router.add_post(files, self._operation("upload", self._upload))
        app.router.add_get(files, self._operation("find", self._list_files))
        app.router.add_get(files + "/{id}", self._operation("find", self._one_file))
        app.router.add_delete(files + "/{id}", self._operation("find", self._delete_file))
        app.router.add_post(parse, self._operation("submit", self._submit))
        app.router.add_get(parse, self._operation("list", self._list_jobs))
        app.router.add_get(parse + "/{id}", self._operation("poll", self._poll))
        app.router.add_get("/books", self._show_books)
        app.router.add_post("/misbehave", self._ask_to_misbehave)
        return app

    async def _show_books(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(vars(self.books))

    async def _ask_to_misbehave(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if "fault" in asked:
            self.misbehave(**asked)
        else:
            self.end_next(asked.get("ending", "COMPLETED"), failed_pages=tuple(asked.get("failed_pages", ())))
        return web.json_response({})

    def _operation(self, name: str, answer: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.books.requests[name] += 1
            if request.headers.get("Authorization") != f"Bearer {KEY}":
                return refusal(401, "Invalid API key")
            if self._minute.remaining() < 1:
                self.books.over_limit += 1
                return refusal(429, "Rate limit exceeded", {"retry-after": f"{self._minute.reset():.0f}"})
            self._minute.take(1)
            window = self._windows.get(name)
            if window is not None and window.remaining() < 1:
                self.books.over_window[name] += 1
                return refusal(429, f"Too many {name} requests", {"retry-after": f"{math.ceil(window.reset())}"})
            if window is not None:
                window.take(1)
            fault = self._next_fault(name)
            if fault is not None:
                self.books.faults[fault.value] += 1
            if fault not in (None, Fault.STALLED, Fault.DROPPED, Fault.TRUNCATED):
                await request.read()
                return await self._refuse(request, fault)
            response: web.Response = await answer(request)
            if fault is not None and name == "submit" and response.status == 200:
                self.books.lost[_document_of(self._jobs[json.loads(response.text or "")["id"]])] += 1
            if fault is Fault.STALLED:
                await until_gone(request)
            if fault is Fault.DROPPED and request.transport is not None:
                request.transport.abort()
            if fault is Fault.TRUNCATED:
                text = response.text or ""
                return web.Response(text=text[: len(text) // 2], content_type="application/json")
            return response

        return handle

    def _next_fault(self, operation: str) -> Fault | None:
        for position, (fault, only) in enumerate(self._asked):
            if only in (None, operation):
                del self._asked[position]
                return fault
        draw = self._chance.random()
        for name, share in self.faults.items():
            if draw < share:
                return Fault(name)
            draw -= share
        return None

    async def _refuse(self, request: web.Request, fault: Fault | None) -> web.Response:
        match fault:
            case Fault.RATE_LIMITED:
                return refusal(429, "Rate limit exceeded", {"retry-after": f"{self.retry_after:g}"})
            case Fault.RATE_LIMITED_SILENT:
                return refusal(429, "Rate limit exceeded")
            case Fault.QUOTA:
                return refusal(402, "You have used all credits of your plan.")
            case Fault.UNAUTHORISED:
                return refusal(401, f"Invalid API key {KEY}")
            case Fault.REJECTED:
                return refusal(422, "Unsupported file type.")
            case Fault.GONE:
                return refusal(404, "Job not found")
            case Fault.HANG:
                await until_gone(request)
                return web.Response()
            case _:
                return refusal(500, "Internal server error", {"x-should-retry": "true"})

    async def _upload(self, request: web.Request) -> web.Response:
        fields, sent = await read_form(request)
        if sent is None or "purpose" not in fields:
            return refusal(422, [{"loc": ["body", "file"], "msg": "Field required", "type": "missing"}])
        name = fields.get("external_file_id")
        if self.unique_external_ids and any(file.external_file_id == name for file in self._files.values() if name):
            return refusal(409, "A file with this external_file_id exists.")
        file = StoredFile(f"dfl-{uuid4()}", sent[0], name, sent[1], self.clock())
        self._files[file.id] = file
        self.books.uploads[name or file.id] += 1
        return web.json_response(self._file_json(file))

    async def _list_files(self, request: web.Request) -> web.Response:
        wanted = request.query.get("external_file_id")
        found = [file for file in self._files.values() if wanted in (None, file.external_file_id)]
        shown = [file for file in found if self.expired_listed or self._left(file) > 0]
        return page_of(request, [self._file_json(file) for file in shown])

    async def _one_file(self, request: web.Request) -> web.Response:
        file = self._file(request.match_info["id"])
        return web.json_response(self._file_json(file)) if file else refusal(404, "File not found")

    async def _delete_file(self, request: web.Request) -> web.Response:
        gone = self._files.pop(request.match_info["id"], None)
        return web.Response(status=204) if gone else refusal(404, "File not found")

    def _file(self, file_id: str) -> StoredFile | None:
        file = self._files.get(file_id)
        return file if file is not None and self._left(file) > 0 else None

    def _left(self, file: StoredFile) -> float:
        return file.made + self.file_life - self.clock()

    def _file_json(self, file: StoredFile) -> dict[str, Any]:
        return file.as_json(datetime.now(UTC) + timedelta(seconds=self._left(file)))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("tier") not in CREDITS or not isinstance(body.get("version"), str):
            return refusal(422, [{"loc": ["body", "tier"], "msg": "Input should be a tier", "type": "enum"}])
        file = self._file(body.get("file_id"))
        if file is None:
            return refusal(404, "File not found")
        ending, failed = self._endings.pop(0) if self._endings else (Ending.COMPLETED, frozenset[int]())
        pages = len(pages_of(file.content))
        cost = CREDITS[body["tier"]] * pages if ending is Ending.COMPLETED or self.bills_failures else 0
        job = ParseJob(f"pjb-{uuid4()}", file, body, self.clock(), datetime.now(UTC), ending, failed, cost)
        self._jobs[job.id] = job
        if cost:
            self.books.paid[_document_of(job)] += 1
            self.books.pages += pages
            self.books.credits += cost
        return web.json_response(self._job_json(job))

    async def _list_jobs(self, request: web.Request) -> web.Response:
        since = request.query.get("created_at_on_or_after")
        first = datetime.fromisoformat(since) if since else datetime.min.replace(tzinfo=UTC)
        until = request.query.get("created_at_on_or_before")
        last = datetime.fromisoformat(until) if until else datetime.max.replace(tzinfo=UTC)
        newest_first = [job for job in reversed(self._jobs.values()) if first <= job.made_at <= last]
        return page_of(request, [self._job_json(job) for job in newest_first])

    async def _poll(self, request: web.Request) -> web.Response:
        job = self._jobs.get(request.match_info["id"])
        if job is None:
            return refusal(404, "Job not found")
        asked = request.query.getall("expand", [])
        answer: dict[str, Any] = {"job": self._job_json(job)}
        if "usage" in asked:
            told = self.billed and self._status(job) in _TERMINAL
            answer["job"]["usage"] = {"credits": job.cost if told else None}
        if self._status(job) == "COMPLETED" and "markdown" in asked:
            answer["markdown"] = {
                "pages": [
                    {"page_number": number, "success": False, "error": "The page could not be read."}
                    if number in job.failed_pages
                    else {"page_number": number, "success": True, "markdown": text}
                    for number, text in enumerate(pages_of(job.file.content), 1)
                ]
            }
        return web.json_response(answer)

    def _status(self, job: ParseJob) -> str:
        age = self.clock() - job.made
        if age < self.pending:
            return "PENDING"
        return "RUNNING" if age < self.pending + self.running else job.ending.value

    def _job_json(self, job: ParseJob) -> dict[str, Any]:
        status = self._status(job)
        return {
            "id": job.id,
            "project_id": "prj-1",
            "status": status,
            "created_at": job.made_at.isoformat(),
            "error_message": "The document could not be parsed." if status == "FAILED" else None,
            "tier": job.body["tier"],
            "user_metadata": job.body.get("user_metadata"),
        }

    async def _tell(self) -> None:
        """Sends webhooks as jobs go on; each event of a job once, unless they are to be doubled."""
        while True:
            await asyncio.sleep(0.02)
            for job in list(self._jobs.values()):
                if job.body.get("webhook_configurations"):
                    await self._tell_of(job)

    async def _tell_of(self, job: ParseJob) -> None:
        status = self._status(job)
        order = ["PENDING", "RUNNING", job.ending.value]
        if self.webhooks_reversed and status not in _TERMINAL:
            return
        events = [one for one in order[: order.index(status) + 1] if one not in job.told]
        job.told += events
        for event in reversed(events) if self.webhooks_reversed else events:
            for hook in job.body["webhook_configurations"]:
                for _ in range(2 if self.webhooks_doubled else 1):
                    await self._post(hook, job, _event_name(event, job))

    async def _post(self, hook: dict[str, Any], job: ParseJob, event: str) -> None:
        if hook.get("webhook_events") and event not in hook["webhook_events"]:
            return
        message: Any = {
            "event_id": f"evt-{uuid4()}",
            "event_type": event,
            "timestamp": time.time(),
            "data": {"job_id": job.id, "user_metadata": job.body.get("user_metadata")},
        }
        if hook.get("webhook_output_format", "string") != "json":
            message = json.dumps(message)
        raw = json.dumps(message).encode()
        headers = {**hook.get("webhook_headers", {}), "Content-Type": "application/json"}
        if secret := hook.get("webhook_signing_secret"):
            headers["LC-Signature"] = sign(raw, secret)
        self.books.webhooks["sent"] += 1
        with suppress(ClientError, TimeoutError):
            async with self._session.post(hook["webhook_url"], data=raw, headers=headers) as response:
                self.books.webhooks["taken"] += response.ok


def _document_of(job: ParseJob) -> str:
    return str((job.body.get("user_metadata") or {}).get("document") or job.file.id)


def _event_name(status: str, job: ParseJob) -> str:
    partial = status == "COMPLETED" and job.failed_pages
    return "parse." + ("partial_success" if partial else _EVENTS.get(status, "cancelled"))


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pending", type=float, default=0.0)
    parser.add_argument("--running", type=float, default=0.5)
    parser.add_argument("--faults", type=json.loads, default={}, help='as {"rate_limited": 0.1, "dropped": 0.02}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests-per-minute", type=int, default=1_000_000, help="of the free plan: 20")
    parser.add_argument("--uploads-per-5-s", type=int, default=50)
    parser.add_argument("--parses-per-10-s", type=int, default=50)
    parser.add_argument("--file-life", type=float, default=48 * 3600.0, help="seconds")
    parser.add_argument("--retry-after", type=float, default=1.0)
    for switch in ("expired-listed", "unique-external-ids", "webhooks-doubled", "webhooks-reversed"):
        parser.add_argument(f"--{switch}", action="store_true")
    options = vars(parser.parse_args())

    async def serve() -> None:
        async with LlamaCloudSimulator(**options) as simulator:
            print(simulator.url, flush=True)
            await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    main()
