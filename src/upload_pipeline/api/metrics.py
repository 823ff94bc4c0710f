"""What Prometheus reads: this process's requests, and the queue as the database has it.

Numbers of the queue are the database's, so each process of the service reports the same ones: take their maximum, not
their sum. Counters of events begin at 0 with the process.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from upload_pipeline.api.limits import UPLOAD_ROUTES
from upload_pipeline.database.queue_metrics import read_depths, read_happened

if TYPE_CHECKING:
    from datetime import datetime

    from upload_pipeline.api.resources import Resources
    from upload_pipeline.database.queue import Executor

log = structlog.get_logger(__name__)

LOOK_SECONDS = 5.0
"""Shortest time between two looks at the database, however many scrape."""
LOOK_TIMEOUT = 5.0

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PREFIX = "upload_pipeline_"


class ServiceMetrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}http_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}http_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("method", "route"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self._uploads = Counter(
            f"{_PREFIX}uploads",
            "Uploads by how they were sent (whole as multipart, announced as json, then their bytes) and the outcome.",
            ("mode", "outcome"),
            registry=self.registry,
        )
        self._up = Gauge(
            f"{_PREFIX}database_up", "1 where the database answered the last look.", registry=self.registry
        )
        self._depth = Gauge(
            f"{_PREFIX}jobs", "Jobs that have not ended.", ("pipeline", "stage", "state"), registry=self.registry
        )
        self._oldest = Gauge(
            f"{_PREFIX}oldest_ready_seconds",
            "How long the oldest ready job has waited; 0 where none does.",
            registry=self.registry,
        )
        self._events = Counter(
            f"{_PREFIX}events", "Events of the audit trail by code.", ("code",), registry=self.registry
        )
        self._retries = Counter(
            f"{_PREFIX}job_retries", "Failures after which a job tries again.", registry=self.registry
        )
        self._dead = Counter(f"{_PREFIX}dead_letters", "Jobs that failed for good.", registry=self.registry)
        self._fenced = Counter(
            f"{_PREFIX}fenced_writes",
            "Writes of workers that the database refused, since the job's lease was lost.",
            registry=self.registry,
        )
        self._streams = Gauge(f"{_PREFIX}event_streams", "Streams of events that are open.", registry=self.registry)
        self._listening = Gauge(
            f"{_PREFIX}event_notifications", "1 where notifications of events arrive.", registry=self.registry
        )
        self._claims = Histogram(
            f"{_PREFIX}claim_seconds",
            "Seconds from a job's becoming ready to its claim.",
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self._lock = asyncio.Lock()
        self._looked_at = float("-inf")
        self._since: datetime | None = None

    def show_resources(self, resources: Resources) -> None:
        """Tells of what these resources count themselves."""
        self.registry.register(resources.provider_calls.registry)
        self._streams.set_function(lambda: len(resources.streams))
        self._listening.set_function(lambda: resources.job_feed.listening)

    def observe_request(self, method: str, route: str, status: int, seconds: float, content_type: str) -> None:
        """Counts a request.

        Args:
            method: of HTTP.
            route: the path's template.
            status: of the answer; 0 where there was none, since the client left.
            seconds: that it took.
            content_type: of its body.
        """
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        if (mode := _upload_mode(method, route, content_type)) is not None:
            outcome = {202: "accepted", 204: "accepted", 200: "duplicate", 0: "aborted"}.get(
                status, "failed" if status >= 500 else "refused"
            )
            self._uploads.labels(mode, outcome).inc()

    async def exposition(self, db: Executor) -> bytes:
        """All metrics in Prometheus's text format; looks at the database where the last look is some seconds ago."""
        async with self._lock:
            if time.monotonic() - self._looked_at > LOOK_SECONDS:
                self._looked_at = time.monotonic()
                try:
                    async with asyncio.timeout(LOOK_TIMEOUT):
                        await self._look(db)
                except Exception as error:  # noqa: BLE001 - a monitor must learn of it, and read the rest
                    log.warning("metrics_without_database", error=str(error) or type(error).__name__)
                    self._up.set(0)
                else:
                    self._up.set(1)
        return generate_latest(self.registry)

    async def _look(self, db: Executor) -> None:
        depths = await read_depths(db)
        happened = await read_happened(db, self._since)
        self._since = happened.until
        self._depth.clear()
        for depth in depths:
            self._depth.labels(depth.pipeline, depth.stage, depth.state).set(depth.jobs)
        self._oldest.set(max((depth.oldest_seconds for depth in depths if depth.state == "queued"), default=0.0))
        for code, count in happened.events.items():
            self._events.labels(code).inc(count)
        self._retries.inc(happened.events.get("job_failed", 0) + happened.events.get("job_reaped", 0))
        self._dead.inc(happened.events.get("job_deadlettered", 0))
        self._fenced.inc(happened.events.get("write_fenced", 0))
        for seconds in happened.claim_seconds:
            self._claims.observe(seconds)


def _upload_mode(method: str, route: str, content_type: str) -> str | None:
    if (method, route) == ("PUT", "/api/v2/upload/{document_id}/bytes"):
        return "bytes"
    if (method, route) not in UPLOAD_ROUTES:
        return None
    return "multipart" if content_type.lower().startswith("multipart/") else "json"
