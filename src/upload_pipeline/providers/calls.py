"""Calls of providers, counted and timed: wrappers around a parser, an embedder and a reader of photos, for Prometheus.

A provider knows nothing of it, so each that is added is measured like the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram

from upload_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.providers.embedding import Embedder, EmbeddingModel
    from upload_pipeline.providers.parsing import ParsedMarkdown, Parser
    from upload_pipeline.providers.photo_reading import PhotoFacts, PhotoReader

_PREFIX = "upload_pipeline_provider_"


class ProviderCalls:
    """The metrics of one process's calls."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            f"{_PREFIX}calls",
            "Calls of parsers, embedders and readers of photos by outcome: ok, an error code, cancelled, or crashed.",
            ("provider", "operation", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}seconds",
            "Seconds that a call took, whatever its outcome.",
            ("provider", "operation"),
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )
        self._units = Counter(
            f"{_PREFIX}units",
            "What was worked on by calls that succeeded: pages, or documents where there are none; texts; photos.",
            ("provider", "operation", "unit"),
            registry=self.registry,
        )

        self._cached = Counter(
            f"{_PREFIX}cached",
            "What needed no call, since it was paid for before: texts.",
            ("provider", "operation"),
            registry=self.registry,
        )

    @contextmanager
    def measured(self, provider: str, operation: str) -> Iterator[None]:
        """Counts and times what runs in the context."""
        began = time.perf_counter()
        outcome = "crashed"
        try:
            yield
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except PipelineError as error:
            outcome = error.code.value
            raise
        finally:
            self._seconds.labels(provider, operation).observe(time.perf_counter() - began)
            self._calls.labels(provider, operation, outcome).inc()

    def worked(self, provider: str, operation: str, unit: str, count: int) -> None:
        """Counts what a call has worked on."""
        self._units.labels(provider, operation, unit).inc(count)

    def spared(self, provider: str, operation: str, count: int) -> None:
        """Counts what needed no call."""
        self._cached.labels(provider, operation).inc(count)


@dataclass(frozen=True, slots=True)
class MeasuredParser:
    """A parser whose calls are measured."""

    parser: Parser
    calls: ProviderCalls

    @property
    def name(self) -> str:
        """As the parser's."""
        return self.parser.name

    @property
    def version(self) -> str:
        """As the parser's."""
        return self.parser.version

    async def parse(self, path: Path, media_type: str) -> ParsedMarkdown:
        """As the parser's."""
        with self.calls.measured(self.name, "parse"):
            parsed = await self.parser.parse(path, media_type)
        if parsed.page_count is None:
            self.calls.worked(self.name, "parse", "documents", 1)
        else:
            self.calls.worked(self.name, "parse", "pages", parsed.page_count)
        return parsed

    async def inspect(self, path: Path, media_type: str) -> None:
        """As the parser's."""
        with self.calls.measured(self.name, "inspect"):
            await self.parser.inspect(path, media_type)
        self.calls.worked(self.name, "inspect", "documents", 1)


@dataclass(frozen=True, slots=True)
class MeasuredPhotoReader:
    """A reader of photos whose calls are measured."""

    reader: PhotoReader
    calls: ProviderCalls

    @property
    def name(self) -> str:
        """As the reader's."""
        return self.reader.name

    async def read(self, path: Path, media_type: str) -> PhotoFacts:
        """As the reader's."""
        with self.calls.measured(self.name, "read_photo"):
            facts = await self.reader.read(path, media_type)
        self.calls.worked(self.name, "read_photo", "photos", 1)
        return facts

    async def write_without_place(self, path: Path, media_type: str, target: Path) -> None:
        """As the reader's."""
        with self.calls.measured(self.name, "drop_place"):
            await self.reader.write_without_place(path, media_type, target)
        self.calls.worked(self.name, "drop_place", "photos", 1)


@dataclass(frozen=True, slots=True)
class MeasuredEmbedder:
    """An embedder whose calls are measured."""

    embedder: Embedder
    calls: ProviderCalls

    @property
    def facts(self) -> EmbeddingModel:
        """As the embedder's."""
        return self.embedder.facts

    @property
    def model(self) -> str:
        """As the embedder's."""
        return self.embedder.model

    @property
    def dimensions(self) -> int:
        """As the embedder's."""
        return self.embedder.dimensions

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the embedder's."""
        provider = self.facts.provider
        with self.calls.measured(provider, "embed"):
            vectors = await self.embedder.embed(texts)
        self.calls.worked(provider, "embed", "texts", len(texts))
        return vectors

    async def close(self) -> None:
        """As the embedder's."""
        await self.embedder.close()
