"""The embeddings simulator for measuring clients: it spends next to no time on the vectors.

    python -m tests.simulators.swift_embeddings --latency 0.05

Sixty-four vectors are made and written down before the first answer, and a text gets one of them by its bytes; tokens
are a quarter of a text's characters. Books, limits and faults are those of `openai_embeddings`.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
from aiohttp import web

from tests.simulators.openai_embeddings import NATIVE_DIMENSIONS, OpenAISimulator
from tests.simulators.openai_server import serve_by_name

COUNT = 64
"""Vectors that all texts share."""


class SwiftEmbeddings(OpenAISimulator):
    """As `OpenAISimulator`, but for what vectors and tokens are."""

    def count(self, text: str) -> int:
        """About as many."""
        return len(text) // 4 or 1

    def vectors(self, body: dict[str, Any], inputs: list[str], tokens: int, fault: str | None) -> web.Response:
        """Written down before, where nothing is to go wrong."""
        if fault is not None:
            return super().vectors(body, inputs, tokens, fault)
        dimensions = body.get("dimensions") or NATIVE_DIMENSIONS[body["model"]]
        written = _written(dimensions, body.get("encoding_format") == "base64")
        rows = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%s}' % (index, written[crc32(text.encode()) % COUNT])
            for index, text in enumerate(inputs)
        )
        usage = json.dumps({"prompt_tokens": tokens, "total_tokens": tokens}).encode()
        model = json.dumps(body["model"]).encode()
        answer = b'{"object":"list","model":%s,"usage":%s,"data":[%s]}' % (model, usage, rows)
        return web.Response(body=answer, content_type="application/json", headers=self.headers())


@lru_cache(maxsize=8)
def _written(dimensions: int, in_base64: bool) -> list[bytes]:
    vectors = np.random.default_rng(7).standard_normal((COUNT, dimensions))
    rows = (vectors / np.linalg.norm(vectors, axis=1)[:, None]).astype("<f4")
    if in_base64:
        return [b'"%s"' % base64.b64encode(row.tobytes()) for row in rows]
    return [json.dumps(row.tolist()).encode() for row in rows]


if __name__ == "__main__":
    serve_by_name(SwiftEmbeddings, __doc__)
