"""What the live tests take from the environment, and what they do with any bucket."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from upload_pipeline.storage.keys import incoming_key, raw_key
from upload_pipeline.storage.store import ObjectStore, open_store

MEGABYTE = 1024 * 1024


def needed(*names: str) -> list[str]:
    """The values of variables that a live test cannot do without; it is skipped, naming those that are not set."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        pytest.skip(f"asks a live provider: {', '.join(missing)} not set; docs/providers.md says how to run it")
    return [os.environ[name] for name in names]


_VARIABLES = {
    "AWS": ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "REGION", "ENDPOINT_URL"),
    "GOOGLE": ("APPLICATION_CREDENTIALS", "BASE_URL"),
    "AZURE_STORAGE": ("ACCOUNT_NAME", "ACCOUNT_KEY", "ENDPOINT"),
}


def become(monkeypatch: pytest.MonkeyPatch, prefix: str, family: str = "AWS") -> None:
    """Sets the variables of a kind of store in this process to those of one live store, and removes all others."""
    for name in [name for name in os.environ if name.startswith(f"{family}_")]:
        monkeypatch.delenv(name)
    for name in _VARIABLES[family]:
        if value := os.environ.get(f"{prefix}_{name}"):
            monkeypatch.setenv(f"{family}_{name}", value)


@asynccontextmanager
async def own_corner(url: str, **more: str) -> AsyncGenerator[ObjectStore]:
    """The store below a prefix that nobody else has; emptied at the end, whatever happened."""
    store = open_store(f"{url.rstrip('/')}/live-test-{uuid4()}", **more)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.delete([info.key async for info in store.list()])
        await store.close()


async def use_it(store: ObjectStore) -> None:
    """Writes in both ways, reads, lists, moves and deletes."""
    await store.check_writable()
    small, large, moved = incoming_key(uuid4()), raw_key(uuid4(), uuid4()), raw_key(uuid4(), uuid4())
    await store.put_bytes(small, b"small")
    stored = await store.put_stream(large, _megabytes(9))
    assert (await store.put_stream(moved, store.stream(large))).sha256 == stored.sha256
    assert {info.key: info.size async for info in store.list()} == {
        small: 5,
        large: 9 * MEGABYTE,
        moved: 9 * MEGABYTE,
    }
    await store.move(small, moved)
    assert await store.get_bytes(moved, 5) == b"small"
    assert await store.head(small) is None
    await store.delete([large, moved, small])
    assert [info async for info in store.list()] == []


async def _megabytes(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number]) * MEGABYTE
