"""What a step is: work on one job that ends in an outcome, with no knowledge of the queue.

A step is `async def step(job, context) -> Outcome`. It reads what earlier steps stored, does its work with no
transaction open, and says what is to be written; the runner writes it together with the transition. A step that
cannot do its work raises `PipelineError`: the code decides whether the job is tried again. A step may be run twice
for the same job, at the same time even, so whatever it writes itself it writes under computed names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upload_pipeline.database.queue import ClaimedJob, Executor, Lease, Transition

if TYPE_CHECKING:
    from upload_pipeline.providers.parsing import Parser
    from upload_pipeline.providers.photo_reading import PhotoReader
    from upload_pipeline.settings import Settings
    from upload_pipeline.storage.store import ObjectStore
    from upload_pipeline.storage.virus_scan import VirusScanner
    from upload_workers.detection_desk import DetectionDesk
    from upload_workers.hosted_parse import HostedParser
    from upload_workers.models_in_use import ModelsInUse


@dataclass(frozen=True, slots=True)
class StepContext:
    """What steps work with.

    Attributes:
        models: who embeds: the active model, and the one that is being filled.
        scratch: directory for temporary files of this process.
        scanner: sees bytes that reached the store by themselves; None where there is none.
        photos: reads photos; None where no step of them is run.
        hosted_parser: follows what a hosted parser has; None where there is no key for one.
        detector: asks who looks for things in photos; None where no step of them is run.
    """

    db: Executor
    store: ObjectStore
    parser: Parser
    models: ModelsInUse
    settings: Settings
    scratch: Path
    scanner: VirusScanner | None = None
    photos: PhotoReader | None = None
    hosted_parser: HostedParser | None = None
    detector: DetectionDesk | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """The step is done and has nothing to write but that: go to the next stage."""

    results: Mapping[str, Any] | None = None


Lacking = Callable[[], Awaitable[bool]]
"""Whether this worker still lacks what a job needs and another worker may have."""


@dataclass(frozen=True, slots=True)
class Snooze:
    """Not yet: look again after this delay, no retry counted.

    Attributes:
        lacking: of a job that is for other workers: while it is so, this one claims no jobs of its pool.
    """

    delay: timedelta
    lacking: Lacking | None = None


class CommitVerb(Protocol):
    """A verb of the database that writes a step's effect and moves the job on, in one transaction."""

    async def __call__(self, db: Executor, lease: Lease, *, keep: bool, ttl: timedelta) -> Transition | Snooze:
        """Writes under the lease, or finds that it is too early; `keep` and `ttl` are the runner's to say."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The step is done: write its effect by this verb, its arguments already given (`functools.partial`)."""

    verb: CommitVerb


Outcome = Advance | Commit | Snooze
Step = Callable[[ClaimedJob, StepContext], Awaitable[Outcome]]
