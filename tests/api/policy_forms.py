"""Policies as their senders send them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx
from live_service import LiveService, token
from sample_documents import make_document

INGEST = "/api/v1/policies/ingest"
PDF = make_document("pdf", 1)
SAID = {"insurer": "Acme Mutual", "product_name": "Home Plus", "launch_date": "2026-02-28"}


def manager(user: UUID, role: str = "FP_MANAGER") -> dict[str, str]:
    """The headers of a user who may send policies."""
    return {"Authorization": f"Bearer {token(user, app_metadata={'roles': [role]})}"}


async def send(
    service: LiveService, user: UUID, data: bytes = PDF, *, filename: str = "home plus.pdf", **changed: str | None
) -> httpx.Response:
    """Sends a policy; `changed` replaces what is said of it, None leaves it out."""
    said: dict[str, Any] = {name: value for name, value in {**SAID, **changed}.items() if value is not None}
    return await service.client().post(
        INGEST, files={"file": (filename, data, "application/pdf")}, data=said, headers=manager(user)
    )
