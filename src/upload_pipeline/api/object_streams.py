"""An object of the store as the body of an answer: block by block, and begun only once its first block is there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import StreamingResponse

from upload_pipeline.storage.store import ObjectStore


async def stream_object(store: ObjectStore, key: str, headers: Mapping[str, str]) -> StreamingResponse:
    """The answer 200 with an object's bytes; memory holds a block of them, whatever the object's size.

    A store that fails later than at the first block breaks the connection off, so that no part is taken for the whole.

    Args:
        store: where it is.
        key: of the object.
        headers: of the answer, `Content-Type` among them.

    Raises:
        PipelineError: as `ObjectStore.stream` at its first block: `OBJECT_MISSING`, `STORAGE_UNAVAILABLE`,
            `STORAGE_DENIED`.
    """
    blocks = store.stream(key)
    first = await anext(blocks, b"")
    return StreamingResponse(_whole(first, blocks), headers=dict(headers))


async def _whole(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for block in rest:
            yield block
