"""Vectors on their way to the database: what arrives is what was sent, bit by bit."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import numpy as np
import pytest
from pgvector import Vector

from tests.conftest import Database
from upload_pipeline.database.connection import VECTOR_SCHEMA
from upload_pipeline.database.vector_wire import register_vectors, vector_rows


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database.admin_url)
    await register_vectors(connection, schema=VECTOR_SCHEMA)
    yield connection
    await connection.close()


@pytest.mark.parametrize("dimensions", [1, 2, 1536, 16000])
async def test_the_rows_of_a_matrix_arrive_in_order_and_bit_by_bit(
    connection: asyncpg.Connection, dimensions: int
) -> None:
    matrix = np.random.default_rng(dimensions).standard_normal((3, dimensions)).astype(np.float32)
    matrix[0, 0] = np.float32(1e-45)  # the smallest there is
    rows = await connection.fetch(
        "select v from unnest($1::extensions.vector[]) with ordinality u (v, n) order by n", vector_rows(matrix)
    )
    assert [row["v"] for row in rows] == [Vector(row) for row in matrix]


async def test_no_row_is_an_empty_array(connection: asyncpg.Connection) -> None:
    rows = vector_rows(np.empty((0, 4), dtype=np.float32))
    assert await connection.fetchval("select cardinality($1::extensions.vector[])", rows) == 0


async def test_rows_of_any_layout_and_width_are_written_as_float32(connection: asyncpg.Connection) -> None:
    matrix = np.arange(6, dtype=np.float64).reshape(2, 3).T
    sent = await connection.fetchval("select $1::extensions.vector[]", vector_rows(matrix))  # type: ignore[arg-type]
    assert sent == [Vector([0, 3]), Vector([1, 4]), Vector([2, 5])]


async def test_what_is_done_to_the_matrix_later_changes_nothing(connection: asyncpg.Connection) -> None:
    matrix = np.ones((1, 2), dtype=np.float32)
    rows = vector_rows(matrix)
    matrix[:] = 5
    assert await connection.fetchval("select $1::extensions.vector[]", rows) == [Vector([1, 1])]


async def test_a_single_vector_or_array_is_taken_as_before(connection: asyncpg.Connection) -> None:
    for value in (Vector([1, 2]), np.array([1, 2], dtype=np.float32), [1.0, 2.0]):
        assert await connection.fetchval("select $1::extensions.vector", value) == Vector([1, 2])


async def test_a_number_that_is_none_is_refused_by_the_database(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.DataError, match="NaN not allowed"):
        await connection.fetchval(
            "select $1::extensions.vector[]", vector_rows(np.full((1, 2), np.nan, dtype=np.float32))
        )
