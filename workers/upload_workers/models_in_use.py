"""The embedding models that a worker works with now: the active one, and the one that is being filled.

The registry of the database says which they are. It is read at most every two seconds, so a change reaches each worker
without a restart; what a worker does by an outdated view the database refuses, and the worker looks again. Embedders
stay open once they were needed: a change may be undone, and what is under way with one ends by itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from upload_pipeline.database.embedding_models import ModelRegistry, RegisteredModel, read_registry, register_model
from upload_pipeline.errors import PipelineError
from upload_pipeline.providers.calls import MeasuredEmbedder
from upload_pipeline.providers.embedding import Embedder, EmbeddingModel, open_embedder
from upload_pipeline.providers.registered_models import open_model, other_than_set
from upload_workers.embedding_batcher import open_batcher
from upload_workers.embedding_line import PutOff
from upload_workers.resting import Rest

if TYPE_CHECKING:
    from collections.abc import Callable

    from upload_pipeline.database.queue import Executor
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.settings import Settings
    from upload_workers.embedding_batcher import EmbeddingBatcher

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
"""How old a view of the registry may be."""

NOT_HERE_SECONDS = 1.0
"""Until others may claim a job whose model this worker cannot open, as it has no key; it leaves its pool to them."""

FIRST_REST = 15.0
"""Seconds for which a worker fills a model no further once its provider fails; twice as long each further time."""

LONGEST_REST = 300.0
"""Most of these, and so about how long a filling stands still after an outage."""

AHEAD_REST = 300.0
"""Seconds for which no document of a worker is embedded ahead, after one for which the model did nothing in time."""


@dataclass(frozen=True, slots=True)
class ModelInUse:
    """A model, and who embeds with it.

    Attributes:
        batcher: embeds texts that are paid for; None where the embedder is our own.
        rest: of its filling, while its provider fails.
        rest_ahead: of embedding by it what somebody waits for. A text may be at fault: the filling finds out.
    """

    embedder: Embedder
    batcher: EmbeddingBatcher | None
    rest: Rest
    rest_ahead: Rest

    @property
    def facts(self) -> EmbeddingModel:
        """The model's facts."""
        return self.embedder.facts


class ModelsInUse:
    """One for each worker process."""

    def __init__(
        self, db: Executor, calls: ProviderCalls, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Opens nothing yet.

        Args:
            db: has the registry.
            calls: counts what is asked of providers.
            settings: of the worker.
            clock: seconds that only grow; by it providers that fail are left alone.
        """
        self._db = db
        self._calls = calls
        self._settings = settings
        self._clock = clock
        self._stopping = False
        self._opened: dict[str, ModelInUse] = {}
        self._view: ModelRegistry | None = None
        self._viewed = 0.0
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Names the first model of a new database, opens the active one, and says where the settings name another.

        Raises:
            PipelineError: the active model cannot be opened.
        """
        if (await self._registry()).active is None:
            facts = open_embedder(self._settings.embedder, self._settings).facts
            await register_model(self._db, model=facts.name, provider=facts.provider, dimensions=facts.dimensions)
            self.look_again()
        active = self._open(await self._active())
        warning = other_than_set(active.facts, self._settings)
        if warning is not None:
            log.warning("embedding_model_differs", active=active.facts.name, problem=warning)

    async def active(self) -> ModelInUse:
        """The model that searches use.

        Raises:
            PutOff: it cannot be opened here: it became the active one after this worker was started without its key.
        """
        return self._open_or_put_off(await self._active(), lambda registry: registry.active)

    async def building(self) -> tuple[ModelInUse, bool] | None:
        """The model that is being filled, and whether that is paused; None where there is none.

        Raises:
            PutOff: it cannot be opened here.
        """
        registry = await self._registry()
        if registry.building is None:
            return None
        return self._open_or_put_off(registry.building, lambda registry: registry.building), registry.paused

    def look_again(self) -> None:
        """The view is outdated: the next question is asked of the database."""
        self._view = None

    def send_no_more(self) -> None:
        """The worker stops: nothing more is sent to a provider that is paid, what is under way goes on."""
        self._stopping = True
        for model in self._opened.values():
            if model.batcher is not None:
                model.batcher.send_no_more()

    async def close(self) -> None:
        """Closes all that was opened. A second call does nothing."""
        opened = list(self._opened.values())
        self._opened.clear()
        for model in opened:
            if model.batcher is not None:
                await model.batcher.close()
            await model.embedder.close()

    async def _registry(self) -> ModelRegistry:
        async with self._reading:
            if self._view is None or time.monotonic() - self._viewed > LOOK_SECONDS:
                self._viewed = time.monotonic()
                self._view = await read_registry(self._db)
            return self._view

    async def _active(self) -> RegisteredModel:
        registry = await self._registry()
        if registry.active is None:
            raise RuntimeError("no embedding model is active; a worker names one when it starts")
        return registry.active

    def _open_or_put_off(
        self, model: RegisteredModel, needed: Callable[[ModelRegistry], RegisteredModel | None]
    ) -> ModelInUse:
        async def still_needed() -> bool:
            now = needed(await self._registry())
            return now is not None and now.model == model.model

        try:
            return self._open(model)
        except PipelineError as error:
            log.warning("model_not_here", model=model.model, error=error.message)
            raise PutOff(NOT_HERE_SECONDS, still_needed) from error

    def _open(self, model: RegisteredModel) -> ModelInUse:
        opened = self._opened.get(model.model)
        if opened is None:
            own = open_model(EmbeddingModel(model.model, model.provider, model.dimensions), self._settings)
            batcher = open_batcher(own, self._db, self._calls, self._settings)
            if batcher is not None and self._stopping:
                batcher.send_no_more()
            opened = self._opened[model.model] = ModelInUse(
                MeasuredEmbedder(own, self._calls),
                batcher,
                Rest(FIRST_REST, LONGEST_REST, self._clock),
                Rest(AHEAD_REST, AHEAD_REST, self._clock),
            )
        return opened
