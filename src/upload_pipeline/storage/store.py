"""The object store: bytes in and out by key, streamed, each wait bounded, each failure named."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage import failures
from upload_pipeline.storage.azure import open_container
from upload_pipeline.storage.backend import Backend
from upload_pipeline.storage.descriptors import GuardedDescriptor
from upload_pipeline.storage.encryption import AES256, Encryption
from upload_pipeline.storage.google import open_google_bucket
from upload_pipeline.storage.keys import incoming_key, validate_key
from upload_pipeline.storage.local_backend import LocalBackend
from upload_pipeline.storage.local_tree import FILE_MODE, LocalTree, make_root
from upload_pipeline.storage.measured import BLOCK_BYTES, MeasuredStream
from upload_pipeline.storage.objects import ObjectInfo, SignedUrl, StoredObject
from upload_pipeline.storage.s3 import open_bucket
from upload_pipeline.storage.supabase import open_supabase_bucket
from upload_pipeline.storage_address import (
    ALLOWED,
    AzureContainer,
    Bucket,
    Directory,
    GoogleBucket,
    SupabaseBucket,
    parse_storage_url,
)
from upload_pipeline.url_secrets import without_password

HEAD_BYTES = 65536
"""First bytes that a write gives back by default: enough to tell a file's type by its content."""

PROGRESS_SECONDS = 60.0
"""Default bound of every wait for the store, in seconds without progress."""

DELETE_BATCH = 100
"""Keys removed within one bound; at a slow disk's 100 ms a sync that is 10 s."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Objects by key, wherever they lie; open one with `open_store`.

    Every method raises `PipelineError`: `INVALID_KEY` for a key that `storage.keys.validate_key` refuses,
    `STORAGE_DENIED` where permission is missing, `STORAGE_UNAVAILABLE` where the store fails or nothing moves
    for `progress_seconds`; further codes stand with the method.

    Attributes:
        backend: where the bytes lie.
        progress_seconds: bound of each wait, in seconds without progress.
    """

    backend: Backend
    progress_seconds: float = PROGRESS_SECONDS

    async def put_stream(
        self,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        max_bytes: int | None = None,
        head_bytes: int = HEAD_BYTES,
    ) -> StoredObject:
        """Stores what the iterator gives under the key, replacing what stood there, in one step at the end.

        When it returns, the object is durable. When the iterator raises, or the limit is passed, or the store
        fails, or the task is cancelled, the key is as it was (a cancellation in the last instant may come too
        late: then the whole object stands). What the iterator raises comes out unchanged.

        Args:
            key: where to.
            chunks: byte strings of any size; memory is bounded by the largest and a few blocks of 256 KiB.
            max_bytes: limit of the whole, or `None`.
            head_bytes: how many of the first bytes to give back.

        Raises:
            PipelineError: `FILE_TOO_LARGE`, and as the class says.
        """
        validate_key(key)
        action = f"write {key}"
        stream: MeasuredStream | None = None
        try:
            async with asyncio.timeout(self.progress_seconds) as limit:
                stream = MeasuredStream(
                    key,
                    chunks,
                    max_bytes=max_bytes,
                    head_bytes=head_bytes,
                    on_progress=partial(_extend, limit, self.progress_seconds),
                )
                async with aclosing(stream.blocks()) as blocks:
                    await self.backend.write(key, blocks)
                return stream.result()
        except TimeoutError as error:
            if stream is not None and stream.failure is not None:
                raise stream.failure from None
            if stream is not None and stream.waiting:
                raise failures.unavailable(
                    action,
                    f"the sender gave no bytes for {self.progress_seconds:g} s",
                    "Send the file again.",
                    key,
                ) from error
            raise failures.stalled(action, self.progress_seconds, key) from error
        except Exception as error:
            # obstore wraps what its iterator raised in an error of its own.
            if stream is not None and stream.failure is not None:
                raise stream.failure from None
            if isinstance(error, failures.STORE_FAILURES):
                raise self._named(error, action, key) from error
            raise

    async def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """Stores bytes that are in memory already; otherwise as `put_stream`."""
        return await self.put_stream(key, _once(data), head_bytes=0)

    async def put_file(self, key: str, path: Path, *, max_bytes: int | None = None) -> StoredObject:
        """Stores a local file, read block by block; otherwise as `put_stream`.

        Raises:
            OSError: the local file cannot be read.
            PipelineError: as `put_stream` does.
        """
        return await self.put_stream(key, _file_blocks(path), max_bytes=max_bytes)

    async def stream(self, key: str, chunk_bytes: int = BLOCK_BYTES) -> AsyncGenerator[bytes, None]:
        """The object's bytes in chunks of at most `chunk_bytes`, none of them empty.

        Raises:
            PipelineError: `OBJECT_MISSING` at the first chunk, and as the class says.
        """
        validate_key(key)
        action = f"read {key}"
        async with aclosing(self.backend.read(key, chunk_bytes)) as blocks:
            while True:
                block = await self._bounded(anext(blocks, b""), action, key)
                if not block:
                    return
                yield block

    async def get_bytes(self, key: str, max_bytes: int) -> bytes:
        """The whole object.

        Raises:
            PipelineError: `OBJECT_MISSING`; `FILE_TOO_LARGE` where it has more than `max_bytes`, of which no
                more than one block is read in excess; and as the class says.
        """
        data = bytearray()
        async with aclosing(self.stream(key)) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > max_bytes:
                    raise PipelineError(
                        ErrorCode.FILE_TOO_LARGE,
                        f"The object {key} is larger than the {max_bytes} bytes that may be read at once.",
                        {"max_bytes": max_bytes, "key": key},
                    )
        return bytes(data)

    async def get_text(self, key: str, max_bytes: int) -> str:
        """The whole object as UTF-8 text; line ends stay as they are.

        Raises:
            PipelineError: `CORRUPT_FILE` where it is not UTF-8, and as `get_bytes` does.
        """
        data = await self.get_bytes(key, max_bytes)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PipelineError(
                ErrorCode.CORRUPT_FILE,
                f"The object {key} is not UTF-8 text (byte {error.start}). Delete it and let the document be "
                "processed again.",
                {"key": key, "offset": error.start},
            ) from error

    async def download(self, key: str, path: Path) -> StoredObject:
        """Copies the object to a local file; a failure leaves no part of it.

        The file is made for the owner only; one that is there is overwritten.

        Raises:
            PipelineError: `OBJECT_MISSING`; `STORAGE_DENIED` or `STORAGE_UNAVAILABLE` also where the local
                file cannot be written; and as the class says.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        target = GuardedDescriptor(lambda: os.open(path, flags, FILE_MODE))
        source = MeasuredStream(key, self.stream(key), max_bytes=None, head_bytes=HEAD_BYTES, on_progress=lambda: None)
        try:
            async with aclosing(source.blocks()) as blocks:
                async for block in blocks:
                    await asyncio.to_thread(target.open)
                    await asyncio.to_thread(target.write, block)
            await asyncio.to_thread(target.open)  # an empty object is an empty file
        except BaseException as error:
            await asyncio.shield(asyncio.to_thread(_discard, target, path))
            if isinstance(error, OSError):
                raise failures.translate(error, f"copy {key} to {path}", key) from error
            raise
        await asyncio.to_thread(target.close)
        return source.result()

    async def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or `None` where there is none."""
        return await self._bounded(self.backend.head(validate_key(key)), f"look at {key}", key)

    async def move(self, source: str, target: str) -> None:
        """Gives an object another key, replacing what stands at `target`; one step in the local store.

        Its time is then that of the move.

        Raises:
            PipelineError: `OBJECT_MISSING` where `source` is not there (also at a second call), and as the
                class says.
        """
        validate_key(source)
        validate_key(target)
        if source == target:
            # A store that copies and deletes would delete the only copy.
            if await self.head(source) is None:
                raise failures.missing(source)
            return
        await self._bounded(self.backend.move(source, target), f"move {source} to {target}", source)

    async def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; missing ones are fine, so it is safe to repeat.

        All keys are checked before any is removed; `progress_seconds` bounds each `DELETE_BATCH` of them.
        """
        checked = [validate_key(key) for key in keys]
        for start in range(0, len(checked), DELETE_BATCH):
            batch = checked[start : start + DELETE_BATCH]
            await self._bounded(self.backend.delete(batch), f"delete {batch[0]}", batch[0])

    async def list(self, prefix: str = "") -> AsyncGenerator[ObjectInfo, None]:
        """The objects below a prefix of whole parts (`raw`, `raw/<user>`; empty: all), in no order.

        What is written or removed meanwhile may or may not be in it. Memory does not grow with the listing.
        """
        if prefix:
            validate_key(prefix)
        action = f"list {prefix or 'all objects'}"
        async with aclosing(self.backend.list(prefix)) as entries:
            while True:
                entry = await self._bounded(anext(entries, None), action, prefix)
                if entry is None:
                    return
                yield entry

    async def remove_unfinished(self, older_than: datetime) -> int:
        """Removes what writers that died left behind, last written before that time.

        Args:
            older_than: with time zone; longer ago than `progress_seconds`, or writes that are alive are
                broken off.

        Returns:
            How many there were.
        """
        return await self._bounded(self.backend.remove_unfinished(older_than), "remove unfinished writes")

    async def sign_put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None = None,
        expires_in: timedelta,
        caller_token: str | None = None,
    ) -> SignedUrl | None:
        """A URL by which somebody else stores the object with one PUT, and nothing else.

        How much of it is bound is the store's: S3 refuses a body of another length or type, or other bytes than those
        of the sha256, Google one of another length or type, Supabase nothing. So what arrives by a URL has to be
        looked at in any case. Until it expires, a URL of S3 with a sha256 may be used again, and then replaces what
        stands under the key by the same bytes. All others are refused while anything stands there.

        Args:
            key: where to.
            media_type: the `Content-Type` that the request must send.
            file_bytes: the length that its body must have.
            file_sha256: of its body, 64 hexadecimal digits; `None` leaves the content open.
            expires_in: from now; whole seconds, at most seven days. A PUT that began in time may end later.
            caller_token: the access token of whoever is to have the URL, for stores that ask their own policies
                about it; `None` where there is none.

        Returns:
            The URL, when it ends and the headers to send, or `None` where the store cannot sign: then the service
            takes the bytes itself.

        Raises:
            PipelineError: `STORAGE_DENIED` also where the store's policies refuse the caller.
        """
        validate_key(key)
        signing = self.backend.sign_put(
            key,
            media_type=media_type,
            file_bytes=file_bytes,
            file_sha256=file_sha256,
            expires_in=expires_in,
            caller_token=caller_token,
        )
        return await self._bounded(signing, f"sign a URL for {key}", key)

    async def sign_get(
        self,
        key: str,
        *,
        filename: str,
        media_type: str | None = None,
        expires_in: timedelta,
        caller_token: str | None = None,
    ) -> SignedUrl | None:
        """A URL by which somebody else fetches the object; a browser saves it and never shows it in place.

        Args:
            key: of the object, which for most stores need not be there yet.
            filename: what it is saved as; any characters.
            media_type: the `Content-Type` of the answer; `None` leaves it to the store.
            expires_in: from now; whole seconds, at most seven days.
            caller_token: as for `sign_put`.

        Returns:
            The URL, or `None` where the store cannot sign: then the service sends the bytes itself.

        Raises:
            PipelineError: `OBJECT_MISSING` where the store looks and finds none that the caller may read.
        """
        validate_key(key)
        signing = self.backend.sign_get(
            key, filename=filename, media_type=media_type, expires_in=expires_in, caller_token=caller_token
        )
        return await self._bounded(signing, f"sign a URL for {key}", key)

    async def require_room(self, *, floor: int, expected: int = 0) -> None:
        """Sees that bytes may still be written.

        Args:
            floor: bytes that must stay free beside what is to come.
            expected: bytes that are to come, as far as that is known.

        Raises:
            PipelineError: `INSUFFICIENT_STORAGE`, and as the class says.
        """
        free = await self._bounded(self.backend.free_bytes(), "look how much room there is")
        if free is not None and free - expected < floor:
            raise failures.no_room(
                f"write {expected} bytes",
                f"{free} bytes are free, and {floor} must stay so",
                f"where {failures.STORAGE_SETTING} points",
            )

    async def check_writable(self) -> None:
        """Writes, reads back and deletes a small object.

        Raises:
            PipelineError: `STORAGE_DENIED` or `STORAGE_UNAVAILABLE`, with the remedy.
        """
        # Should this process die, the sweep takes the probe for an upload that never ended.
        key = incoming_key(uuid4())
        probe = b"upload-pipeline probe"
        await self.put_bytes(key, probe)
        try:
            if await self.get_bytes(key, len(probe)) != probe:
                raise failures.unavailable(
                    "read back what was written",
                    "the bytes differ",
                    "Check the disk or the service behind it.",
                    key,
                )
        finally:
            await self.delete([key])

    async def time(self) -> datetime:
        """The present time by the clock that stamps the objects: not this machine's, and it may be ahead or behind.

        Raises:
            PipelineError: as the class says.
        """
        key = incoming_key(uuid4())
        await self.put_bytes(key, b"what time is it")
        try:
            probe = await self.head(key)
        finally:
            await self.delete([key])
        if probe is None:
            raise failures.unavailable(
                "look at what was written", "it is not there", "Check the service behind it.", key
            )
        return probe.modified_at

    def _named(self, error: Exception, action: str, key: str) -> PipelineError:
        refusal = self.backend.refusal(error, failures.STORAGE_SETTING)
        return failures.translate(error, action, key, refusal)

    async def check_urls(self) -> str:
        """Says in a clause who hands out URLs to clients.

        Raises:
            PipelineError: URLs are set up and cannot work, with the remedy.
        """
        return await self._bounded(self.backend.check_urls(), "sign URLs")

    async def close(self) -> None:
        """Lets go of what is open between calls; the next call opens it again."""
        await self.backend.close()

    async def _bounded(self, work: Awaitable[R], action: str, key: str = "") -> R:
        try:
            async with asyncio.timeout(self.progress_seconds):
                return await work
        except TimeoutError as error:
            raise failures.stalled(action, self.progress_seconds, key) from error
        except failures.STORE_FAILURES as error:
            raise self._named(error, action, key) from error


def open_store(
    url: str,
    *,
    public_endpoint: str = "",
    encryption: Encryption = AES256,
    publishable_key: str = "",
    progress_seconds: float = PROGRESS_SECONDS,
) -> ObjectStore:
    """Opens the store that a URL names.

    Args:
        url: as `storage_address.parse_storage_url` takes it. A directory is made, with permissions for the owner
            only, where it is missing; a bucket is not, and is not asked for anything yet.
        public_endpoint: of a bucket, where clients reach it by signed URLs; empty: where this process does.
        encryption: asked of a bucket with each write.
        publishable_key: of a Supabase project; empty: it signs no URLs.
        progress_seconds: see `ObjectStore`.

    Raises:
        PipelineError: `SETTING_INVALID` naming the setting, the value and what is allowed; `STORAGE_DENIED`
            or `STORAGE_UNAVAILABLE` where the directory cannot be made.
    """
    try:
        address = parse_storage_url(url)
    except ValueError as error:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"{failures.STORAGE_SETTING}={without_password(url)!r} is not allowed: {error}.",
            {"setting": failures.STORAGE_SETTING, "value": without_password(url), "allowed": list(ALLOWED)},
        ) from error
    match address:
        case Bucket():
            backend: Backend = open_bucket(address, public_endpoint, encryption)
        case SupabaseBucket():
            backend = open_supabase_bucket(address, public_endpoint=public_endpoint, publishable_key=publishable_key)
        case GoogleBucket():
            backend = open_google_bucket(address, public_endpoint)
        case AzureContainer():
            backend = open_container(address, public_endpoint)
        case Directory(root):
            backend = _open_directory(root)
    return ObjectStore(backend, progress_seconds)


def _open_directory(root: Path) -> LocalBackend:
    try:
        make_root(root)
    except OSError as error:
        raise failures.translate(error, f"make the directory {root}") from error
    return LocalBackend(LocalTree(root))


def _extend(limit: asyncio.Timeout, seconds: float) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time() + seconds)


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _file_blocks(path: Path) -> AsyncGenerator[bytes, None]:
    source = GuardedDescriptor(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        await asyncio.to_thread(source.open)
        while block := await asyncio.to_thread(source.read, BLOCK_BYTES):
            yield block
    finally:
        await asyncio.shield(asyncio.to_thread(source.close))


def _discard(target: GuardedDescriptor, path: Path) -> None:
    if target.close():
        path.unlink(missing_ok=True)
