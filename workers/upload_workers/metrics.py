"""What Prometheus reads of one worker: claims, jobs, steps, refused writes, and its calls of providers.

A worker counts its own work and no other's, so add these over the workers. What the database has for all of them, as
the depth of the queue, is told by the HTTP service.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from upload_pipeline.providers.calls import ProviderCalls

_PREFIX = "upload_pipeline_worker_"


class WorkerMetrics:
    """The metrics of one worker.

    Args:
        provider_calls: those of its calls of providers, told along.
    """

    def __init__(self, provider_calls: ProviderCalls | None = None) -> None:
        self.registry = CollectorRegistry()
        self._claims = Counter(
            f"{_PREFIX}claims",
            "Claims by outcome: jobs, empty or failed.",
            ("pool", "outcome"),
            registry=self.registry,
        )
        self._claimed = Counter(f"{_PREFIX}claimed_jobs", "Jobs that claims gave.", ("pool",), registry=self.registry)
        self._held = Gauge(f"{_PREFIX}held_jobs", "Jobs that are being led now.", registry=self.registry)
        self._left = Gauge(
            f"{_PREFIX}left_pools",
            "Pools that are left to other workers, since this one lacks what their jobs need.",
            registry=self.registry,
        )
        self._steps = Counter(
            f"{_PREFIX}steps",
            "Steps by outcome: advance, commit, snooze, an error code, lost, cancelled, timed_out or released.",
            ("pipeline", "stage", "outcome"),
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            f"{_PREFIX}step_seconds",
            "Seconds that a step took, without the write of its outcome.",
            ("pipeline", "stage"),
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )
        # to find a child by its labels takes longer than to count in it; there are as many as stages and outcomes
        self._step_counter = cache(self._steps.labels)
        self._step_timer = cache(self._step_seconds.labels)
        self._fenced = Counter(
            f"{_PREFIX}fenced_writes",
            "Writes that the database refused, since the job's lease was lost.",
            registry=self.registry,
        )
        if provider_calls is not None:
            self.registry.register(provider_calls.registry)

    def show_held(self, held: Callable[[], int]) -> None:
        """Says where to read how many jobs are being led."""
        self._held.set_function(held)

    def show_left(self, left: Callable[[], int]) -> None:
        """Says where to read how many pools are left to others."""
        self._left.set_function(left)

    def claimed(self, pool: str, jobs: int | None) -> None:
        """A claim was answered with so many jobs; None where it failed."""
        outcome = "failed" if jobs is None else "jobs" if jobs else "empty"
        self._claims.labels(pool, outcome).inc()
        if jobs:
            self._claimed.labels(pool).inc(jobs)

    def step_ended(self, pipeline: str, stage: str, outcome: str, seconds: float) -> None:
        """A step has ended."""
        self._step_counter(pipeline, stage, outcome).inc()
        self._step_timer(pipeline, stage).observe(seconds)

    def write_fenced(self) -> None:
        """A write was refused."""
        self._fenced.inc()
