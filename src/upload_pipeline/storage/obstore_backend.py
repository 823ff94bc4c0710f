"""Any store that obstore opens (S3, its own for directories and memory) as a place for objects.

Such a store acknowledges a write only when it is durable and makes it visible in one step, so nothing is
added here. Parts of an upload whose process died are invisible and are the bucket's to expire (a lifecycle
rule for incomplete multipart uploads).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import obstore
from obstore.exceptions import PermissionDeniedError
from obstore.store import ObjectStore as Place

from upload_pipeline.storage.backend import UrlSource
from upload_pipeline.storage.failures import missing
from upload_pipeline.storage.objects import OWN_URLS, ObjectInfo, SignedUrl
from upload_pipeline.storage.refusals import Refusal, RefusalOf, code_of, missing_bucket
from upload_pipeline.storage.s3_failures import s3_refusal

PART_BYTES = 5 * 1024 * 1024
"""Size of a part of a multipart upload: the least that S3 takes, so the least memory."""

SINGLE_PUT_BYTES = 8 * 1024 * 1024
"""Up to this size an object is one PUT, above it an upload in parts, which takes three requests at least."""

PARTS_IN_FLIGHT = 2
"""Parts on the wire at once; with the one being filled, what an upload holds in memory."""

DELETE_BATCH = 1000
"""Keys in one delete request: the limit of S3's DeleteObjects."""

LISTING_BATCH = 500
"""Entries that a listing hands over at once."""

ABORT_SECONDS = 5.0
"""How long a failed write waits for the store to forget the parts that it has."""

_NO_UPLOAD = "NoSuchUpload"


class _Aborted(Exception):  # noqa: N818 - it says that we stopped, not what went wrong
    """Tells obstore to abort an upload."""


@dataclass(frozen=True, slots=True)
class ObstoreBackend:
    """Objects in a store behind obstore; see `storage.backend.Backend` for the methods.

    Attributes:
        place: the store.
        urls: signs URLs for it; without it there are none.
        refusal_of: what is known of its errors.
    """

    place: Place
    urls: UrlSource | None = None
    refusal_of: RefusalOf = s3_refusal

    async def write(self, key: str, blocks: AsyncIterator[bytes]) -> None:
        """Sends a small object by one PUT, a larger one in parts."""
        first: list[bytes] = []
        size = 0
        async for block in blocks:
            first.append(block)
            size += len(block)
            if size > SINGLE_PUT_BYTES:
                await self._write_parts(key, first, blocks)
                return
        await obstore.put_async(self.place, key, first, use_multipart=False)

    async def _write_parts(self, key: str, first: list[bytes], rest: AsyncIterator[bytes]) -> None:
        """Uploads in parts; a failing iterator, or a cancellation, aborts the upload."""
        # obstore drives its iterator from a task of its own, which cancelling us would leave in the midst of it. So
        # the blocks are read here, handed over one at a time, and an ending of ours is told to that task as
        # an error.
        handed: asyncio.Queue[bytes | _Aborted | None] = asyncio.Queue(maxsize=1)
        upload = asyncio.create_task(self._upload(key, handed))
        size = sum(map(len, first))
        try:
            while first:
                await _hand_over(handed, first.pop(0), upload)
            async for block in rest:
                size += len(block)
                await _hand_over(handed, block, upload)
            await _hand_over(handed, None, upload)
            try:
                await asyncio.shield(upload)
            except Exception as error:
                # The answer to its completion was lost, and obstore, which asked again, was told that no such upload is
                # under way: then the object stands.
                if code_of(error) != _NO_UPLOAD or (found := await self.head(key)) is None or found.size != size:
                    raise
        except BaseException:
            while not handed.empty():
                handed.get_nowait()
            handed.put_nowait(_Aborted())
            await asyncio.wait([upload], timeout=ABORT_SECONDS)
            if not upload.done():
                upload.cancel()
            elif not upload.cancelled():
                upload.exception()  # the reason for the abort is what is raised, not its echo
            raise

    async def _upload(self, key: str, handed: asyncio.Queue[bytes | _Aborted | None]) -> None:
        await obstore.put_async(
            self.place,
            key,
            _taken(handed),
            use_multipart=True,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_IN_FLIGHT,
        )

    async def read(self, key: str, block_bytes: int) -> AsyncGenerator[bytes, None]:
        """Streams the response's body."""
        try:
            response = await obstore.get_async(self.place, key)
        except FileNotFoundError as error:
            raise _absent(error, key) from error
        async for piece in response.stream(min_chunk_size=block_bytes):
            for start in range(0, len(piece), block_bytes):
                yield piece[start : start + block_bytes]

    async def head(self, key: str) -> ObjectInfo | None:
        """Asks for the object's metadata."""
        try:
            meta = await obstore.head_async(self.place, key)
        except (FileNotFoundError, PermissionDeniedError):
            # An answer to HEAD has no body to tell a missing object from a missing bucket, or what is denied and why;
            # one to GET has.
            try:
                meta = (await obstore.get_async(self.place, key)).meta
            except FileNotFoundError as error:
                if missing_bucket(error):
                    raise
                return None
        return ObjectInfo(key, meta["size"], meta["last_modified"])

    async def move(self, source: str, target: str) -> None:
        """Copies and deletes: a crash in between leaves both, and `source` to the sweep.

        Not obstore's own move: where a store calls deleting what is missing an error, that takes a deletion which is
        sent again, as its answer was lost, for a failure.
        """
        try:
            await obstore.copy_async(self.place, source, target)
        except FileNotFoundError as error:
            raise _absent(error, source) from error
        await self.delete([source])

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes in batches; some stores call a missing key an error, and then each key is tried alone."""
        for start in range(0, len(keys), DELETE_BATCH):
            batch = list(keys[start : start + DELETE_BATCH])
            try:
                await obstore.delete_async(self.place, batch)
            except FileNotFoundError as error:
                if missing_bucket(error):
                    raise
                for key in batch:
                    await self._delete_one(key)

    async def _delete_one(self, key: str) -> None:
        try:
            await obstore.delete_async(self.place, key)
        except FileNotFoundError:
            return

    async def list(self, prefix: str) -> AsyncGenerator[ObjectInfo, None]:
        """Pages through the listing."""
        async for batch in obstore.list(self.place, prefix or None, chunk_size=LISTING_BATCH):
            for meta in batch:
                yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"])

    async def free_bytes(self) -> int | None:
        """None: such a store does not fill up."""
        return None

    async def remove_unfinished(self, older_than: datetime) -> int:
        """Nothing of ours is left behind in such a store."""
        return 0

    async def sign_put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """Binds what the store can bind; see `urls`."""
        if self.urls is None:
            return None
        return await self.urls.put(
            key,
            media_type=media_type,
            file_bytes=file_bytes,
            file_sha256=file_sha256,
            expires_in=expires_in,
            caller_token=caller_token,
        )

    async def sign_get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """Binds the name that the file is saved under."""
        if self.urls is None:
            return None
        return await self.urls.get(
            key, filename=filename, media_type=media_type, expires_in=expires_in, caller_token=caller_token
        )

    def refusal(self, error: Exception, setting: str) -> Refusal | None:
        """By the code in the server's answer."""
        return self.refusal_of(error, setting)

    async def check_urls(self) -> str:
        """The bucket does where it signs URLs."""
        return OWN_URLS if self.urls is None else await self.urls.check()

    async def close(self) -> None:
        """Closes the connections of `urls`; obstore's own go with the process."""
        if self.urls is not None:
            await self.urls.close()


def _absent(error: FileNotFoundError, key: str) -> Exception:
    """The error of a missing object; that of a missing bucket stays what it is."""
    return error if missing_bucket(error) else missing(key)


async def _hand_over(
    handed: asyncio.Queue[bytes | _Aborted | None], item: bytes | None, upload: asyncio.Task[None]
) -> None:
    """Waits until the item has a place in the queue; raises the upload's error where that ended before."""
    giving = asyncio.create_task(handed.put(item))
    try:
        await asyncio.wait({giving, upload}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        giving.cancel()
    if upload.done():
        await upload


async def _taken(handed: asyncio.Queue[bytes | _Aborted | None]) -> AsyncGenerator[bytes, None]:
    while (item := await handed.get()) is not None:
        if isinstance(item, _Aborted):
            raise item
        yield item
