"""What the object store asks of the place where the bytes lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from upload_pipeline.storage.objects import ObjectInfo, SignedUrl
from upload_pipeline.storage.refusals import Refusal


class Backend(Protocol):
    """A place for bytes. Keys are valid already; failures are `failures.STORE_FAILURES` or `PipelineError`.

    No method bounds its own time: the store cancels one that makes no progress, and a cancelled one leaves
    nothing half done under a key.
    """

    async def write(self, key: str, blocks: AsyncIterator[bytes]) -> None:
        """Stores all blocks under the key in one step, or nothing if the iterator or the place fails."""

    def read(self, key: str, block_bytes: int) -> AsyncGenerator[bytes, None]:
        """The object's bytes in blocks of at most `block_bytes`; raises `OBJECT_MISSING` at the first."""

    async def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, `None` where there is none."""

    async def move(self, source: str, target: str) -> None:
        """Gives an object another key and the present time, replacing what stands there; raises `OBJECT_MISSING`."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; missing ones are fine."""

    def list(self, prefix: str) -> AsyncGenerator[ObjectInfo, None]:
        """The objects below a prefix (empty: all), in no order, without holding them all in memory."""

    async def free_bytes(self) -> int | None:
        """Bytes that can still be written, `None` where nobody can say."""

    async def remove_unfinished(self, older_than: datetime) -> int:
        """Removes what writers that died left behind before that time; gives the number of files removed."""

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
        """A URL to store the object by one PUT, `None` where the place gives out none."""

    async def sign_get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """A URL to fetch the object by one GET, `None` where the place gives out none."""

    def refusal(self, error: Exception, setting: str) -> Refusal | None:
        """What is known of one of its failures; `setting` is the name of the one that names it."""

    async def check_urls(self) -> str:
        """Says in a clause who hands out URLs to clients; raises where that is set up and cannot work."""

    async def close(self) -> None:
        """Lets go of what is open between calls; the next call opens it again."""


class UrlSource(Protocol):
    """What makes the signed URLs of a bucket. Both methods give `None` where it signs none for this caller."""

    async def put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """As `Backend.sign_put`."""

    async def get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """As `Backend.sign_get`."""

    async def check(self) -> str:
        """As `Backend.check_urls`."""

    async def close(self) -> None:
        """As `Backend.close`."""
