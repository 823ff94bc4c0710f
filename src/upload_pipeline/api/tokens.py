"""Users' tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import UUID

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import Settings


class TokenVerifier(Protocol):
    """Tells users by their tokens."""

    async def verify(self, token: str) -> tuple[UUID, frozenset[str]]:
        """The user and the application roles.

        Raises:
            PipelineError: `UNAUTHENTICATED`.
        """


class _NoTokens:
    async def verify(self, token: str) -> tuple[UUID, frozenset[str]]:
        raise PipelineError(ErrorCode.UNAUTHENTICATED, "This service takes no tokens.")


@asynccontextmanager
async def open_token_verifier(settings: Settings) -> AsyncGenerator[TokenVerifier]:
    """The verifier that the settings describe."""
    yield _NoTokens()
