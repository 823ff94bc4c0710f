"""How vectors cross to the database and back: pgvector's binary form.

A vector is its dimensions and a zero, two bytes each, and then its numbers as big-endian float32 (pgvector's
`vector_send`). One matrix is written in one pass: as many `Vector`s of a request take half as long again to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgvector import Vector
from pgvector.asyncpg import register_vector

if TYPE_CHECKING:
    import asyncpg
    import numpy as np
    import numpy.typing as npt


async def register_vectors(connection: asyncpg.Connection, *, schema: str) -> None:
    """Lets a connection take `Vector`s, arrays and `vector_rows`, and give `Vector`s.

    Raises:
        ValueError: the schema has no type `vector`.
    """
    await register_vector(connection, schema=schema)
    await connection.set_type_codec(
        "vector", schema=schema, format="binary", encoder=_on_wire, decoder=Vector.from_binary
    )


def vector_rows(matrix: npt.NDArray[np.float32]) -> list[memoryview]:
    """The rows of a matrix (n, dimensions), each as a parameter of type `vector`; together one of `vector[]`.

    They share one copy of the matrix: changing it afterwards changes nothing.
    """
    import numpy as np

    count, dimensions = matrix.shape
    wire = np.empty((count, 1 + dimensions), dtype=">f4")
    wire.view(">i4")[:, 0] = dimensions << 16
    wire[:, 1:] = matrix
    data, size = wire.reshape(-1).view(np.uint8).data, 4 * (1 + dimensions)
    return [data[start : start + size] for start in range(0, len(data), size)]


def _on_wire(value: Any) -> bytes | memoryview:
    if isinstance(value, memoryview):
        return value
    return (value if isinstance(value, Vector) else Vector(value)).to_binary()
