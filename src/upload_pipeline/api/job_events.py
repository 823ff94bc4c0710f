"""A job's history, as JSON page by page or as a stream of events that goes on until the job ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.job_bodies import EVENT_EXAMPLE, Event, EventPage
from upload_pipeline.api.job_feed import Watch, event_frame
from upload_pipeline.api.jobs import JobId, no_such_job
from upload_pipeline.api.principals import CurrentPrincipal, Principal
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.user_jobs import last_event_id, list_events

router = APIRouter(prefix="/api/v2/jobs", tags=["jobs"])

EVENT_STREAM = "text/event-stream"
MAX_EVENTS = 1000
_PAGE_OF_STREAM = 200

# Names that proxies read: nginx passes the stream on as it comes.
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

EventId = Annotated[str, Query(pattern=r"^[0-9]{1,18}$")]

_STREAM_EXAMPLE = f"""retry: 3000

id: {EVENT_EXAMPLE["event_id"]}
data: {json.dumps(EVENT_EXAMPLE)}

: heart-beat

event: end
data: {{"state":"done"}}
"""


@router.get(
    "/{job_id}/events",
    summary="A job's history; as a stream of events until it ends",
    response_model=EventPage,
    responses={
        200: {
            "description": "The history. With `Accept: text/event-stream` a stream: the history, then each event as it "
            "happens, its `id` the event's, its `data` an `Event`; comments in between; at the end of the job an "
            "event `end` with the job's state. `Last-Event-ID` goes on behind that event.",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}},
        },
        **documented_errors(400, 401, 404, 429),
    },
)
async def read_events(
    request: Request,
    job_id: JobId,
    principal: CurrentPrincipal,
    resources: AppResources,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="Most events of a page of JSON.")] = 200,
    cursor: Annotated[EventId | None, Query(description="`next_cursor` of the page before.")] = None,
    last_event_id_header: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            pattern=r"^[0-9]{0,18}$",
            description="Of a stream: the last event that arrived. Browsers send it by themselves.",
        ),
    ] = None,
) -> Response:
    """Oldest first. A client that comes back with `Last-Event-ID` misses nothing and gets nothing twice."""
    if EVENT_STREAM in request.headers.get("Accept", ""):
        return await _stream(resources, principal, job_id, int(last_event_id_header or 0))
    async with as_user(resources.db, principal.user_id) as connection:
        if await last_event_id(connection, job_id) is None:
            raise no_such_job(job_id)
        found = await list_events(connection, job_id, after=int(cursor or 0), limit=limit + 1)
    items = [Event.model_validate(event) for event in found[:limit]]
    page = EventPage(items=items, next_cursor=str(items[-1].event_id) if len(found) > limit else None)
    return Response(page.model_dump_json(), media_type="application/json")


class _EventStream(StreamingResponse):
    """A stream that holds a place among the open ones until it has ended, however that comes about."""

    def __init__(self, frames: AsyncGenerator[bytes], place: ExitStack) -> None:
        super().__init__(frames, media_type=EVENT_STREAM, headers=_STREAM_HEADERS)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _stream(resources: Resources, principal: Principal, job_id: UUID, after: int) -> Response:
    with ExitStack() as stack:
        stack.enter_context(resources.streams.opened(principal.user_id))
        async with as_user(resources.db, principal.user_id) as connection:
            newest = await last_event_id(connection, job_id)
        if newest is None:
            raise no_such_job(job_id)
        # An id that the job has not reached would hide what is to come.
        frames = _frames(resources, principal.user_id, job_id, min(after, newest), _seconds(resources, principal))
        return _EventStream(frames, stack.pop_all())


def _seconds(resources: Resources, principal: Principal) -> float:
    """How long a stream may last: what it shows is for whom the credentials name, as long as they are good."""
    longest = resources.settings.sse_seconds
    return longest if principal.expires_at is None else min(longest, principal.expires_at - time.time())


async def _frames(
    resources: Resources, user_id: UUID, job_id: UUID, after: int, seconds: float
) -> AsyncGenerator[bytes]:
    settings = resources.settings
    now = asyncio.get_running_loop().time
    deadline = now() + seconds
    with resources.job_feed.watch(job_id, after=after) as watch:
        yield f"retry: {round(settings.sse_retry * 1000)}\n\n".encode()
        while not watch.closed and now() < deadline:
            frames = watch.frames_after(after)
            if frames is None:
                frames = await _older_frames(resources, user_id, job_id, after)
                if not frames:
                    # Its partition was dropped: what is kept here is all that is left.
                    after = watch.start
                    continue
            for event_id, frame in frames:
                yield frame
                after = event_id
            if frames:
                continue
            if watch.finished:
                yield _end_frame(watch)
                return
            if not await watch.wait(min(settings.sse_heartbeat, deadline - now())) and now() < deadline:
                yield b": heart-beat\n\n"


async def _older_frames(resources: Resources, user_id: UUID, job_id: UUID, after: int) -> list[tuple[int, bytes]]:
    async with as_user(resources.db, user_id) as connection:
        found = await list_events(connection, job_id, after=after, limit=_PAGE_OF_STREAM)
    return [(event.event_id, event_frame(event)) for event in found]


def _end_frame(watch: Watch) -> bytes:
    state: dict[str, Any] = {"state": watch.state}
    return f"event: end\ndata: {json.dumps(state, separators=(',', ':'))}\n\n".encode()
