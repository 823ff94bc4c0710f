"""Reading as a user: one transaction as role `authenticated` with the user's claims, guarded by row-level security."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol
from uuid import UUID


class Pool(Protocol):
    """Where connections come from: an `asyncpg.Pool` of role `upload_worker`, which may become `authenticated`."""

    def acquire(self) -> AbstractAsyncContextManager[Any]:
        """A connection, for as long as the context is open."""


# A page is walked in the order of its index. Without statistics, or for a user who is not like the others, the planner
# would rather read a whole user's rows and sort them, and that for each row of the page.
_BY_INDEX = "".join(
    f", set_config('enable_{method}', 'off', true)" for method in ("seqscan", "bitmapscan", "hashjoin", "mergejoin")
)


@asynccontextmanager
async def as_user(pool: Pool, user_id: UUID, *, readonly: bool = True, by_index: bool = False) -> AsyncGenerator[Any]:
    """A connection within a transaction in which the database itself decides what the user may see.

    The role and the claims end with the transaction, so a connection goes back as it came.

    Args:
        pool: of role `upload_worker`.
        user_id: who asks.
        readonly: False for a verb that users may call themselves.
        by_index: True for a page of a list, which then costs a page however many rows the user and the others have.

    Raises:
        asyncpg.PostgresError: as the statements in the block do; nothing is translated here.
    """
    async with pool.acquire() as connection:
        try:
            # In one round trip; asyncpg's own transaction begins in another, and each is a third of what a read costs.
            await connection.execute(f"begin read {'only' if readonly else 'write'}; {_becoming(user_id, by_index)}")
            yield connection
            await connection.execute("commit")
        except BaseException:
            if not connection.is_closed():
                await connection.execute("rollback")
            raise


async def become_user(connection: Any, user_id: UUID, *, by_index: bool = False) -> None:
    """Makes the rest of the connection's transaction the user's.

    Args:
        connection: within a transaction, as role `upload_worker`.
        user_id: who asks.
        by_index: as for `as_user`.
    """
    await connection.execute(_becoming(user_id, by_index))


def _becoming(user_id: UUID, by_index: bool) -> str:
    claims = json.dumps({"sub": str(user_id), "role": "authenticated"}).replace("'", "''")
    return (
        "select set_config('role', 'authenticated', true), "
        f"set_config('request.jwt.claims', '{claims}', true){_BY_INDEX if by_index else ''}"
    )
