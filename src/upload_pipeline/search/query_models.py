"""Who embeds queries: the active model, whichever that is when a search begins.

The registry of the database is not asked before each search: the search's own transaction says which model is active,
and where that is another one by now, the query is embedded once more. So a change of models costs the searches of that
moment a second embedding, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from upload_pipeline.database.embedding_models import RegisteredModel, active_model
from upload_pipeline.database.failures import DATABASE_FAILURES, translate
from upload_pipeline.providers.calls import MeasuredEmbedder
from upload_pipeline.providers.embedding import Embedder, EmbeddingModel, open_embedder
from upload_pipeline.providers.registered_models import open_model, other_than_set
from upload_pipeline.search.paid_queries import PaidQueries, paid_queries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.database.queue import Executor
    from upload_pipeline.providers.calls import ProviderCalls
    from upload_pipeline.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QueryModel:
    """A model that queries can be embedded with.

    Attributes:
        paid: embeds the query in the embedder's place, where that is a hosted one.
    """

    embedder: Embedder
    paid: PaidQueries | None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.embedder.model

    async def embed(self, query: str, *, user_id: UUID) -> NDArray[np.float32]:
        """The vector of a query.

        Raises:
            PipelineError: as the embedder.
        """
        if self.paid is not None:
            return await self.paid.embed(query, user_id=user_id)
        vector: NDArray[np.float32] = (await self.embedder.embed([query]))[0]
        return vector


class QueryModels:
    """One for each process that searches."""

    def __init__(self, db: Executor, calls: ProviderCalls, settings: Settings) -> None:
        """Opens nothing yet.

        Args:
            db: as role `upload_worker`.
            calls: counts the calls of providers.
            settings: keys and addresses; and the model of a database that has none yet.
        """
        self._db = db
        self._calls = calls
        self._settings = settings
        self._opened: dict[str, QueryModel] = {}
        self._active: str | None = None
        self._of_settings: QueryModel | None = None

    async def start(self) -> None:
        """Opens the active model, and says where the settings name another.

        Raises:
            PipelineError: it cannot be opened. A database that does not answer, or lacks migrations, is told by whoever
                asks for it.
        """
        try:
            registered = await active_model(self._db)
        except DATABASE_FAILURES as error:
            log.warning("embedding_model_unknown", error=str(error) or type(error).__name__)
            registered = None
        if registered is None:
            self._configured()
            return
        self.note_active(registered)
        warning = other_than_set(self._opened[registered.model].embedder.facts, self._settings)
        if warning is not None:
            log.warning("embedding_model_differs", active=registered.model, problem=warning)

    async def current(self) -> QueryModel:
        """The model that was active when last seen.

        Raises:
            PipelineError: it cannot be opened; `DATABASE_UNAVAILABLE`, `MIGRATIONS_PENDING`.
        """
        if self._active is None:
            try:
                registered = await active_model(self._db)
            except DATABASE_FAILURES as error:
                raise translate(error, "tell the active embedding model") from error
            if registered is None:
                # Nothing was ever embedded, and nothing is found.
                return self._configured()
            self.note_active(registered)
        return self._opened[str(self._active)]

    def note_active(self, model: RegisteredModel) -> None:
        """This one is active, as a search has seen.

        Raises:
            PipelineError: it cannot be opened.
        """
        if model.model not in self._opened:
            facts = EmbeddingModel(model.model, model.provider, model.dimensions)
            self._opened[model.model] = self._wrapped(open_model(facts, self._settings))
        self._active = model.model

    async def close(self) -> None:
        """Closes all that was opened. A second call does nothing."""
        opened = [*self._opened.values(), *([self._of_settings] if self._of_settings else [])]
        self._opened.clear()
        self._active = self._of_settings = None
        for model in opened:
            await model.embedder.close()

    def _configured(self) -> QueryModel:
        if self._of_settings is None:
            self._of_settings = self._wrapped(open_embedder(self._settings.embedder, self._settings))
        return self._of_settings

    def _wrapped(self, own: Embedder) -> QueryModel:
        paid = paid_queries(own, self._db, self._calls, self._settings)
        return QueryModel(MeasuredEmbedder(own, self._calls), paid)
