"""OpenAI's embeddings, or a compatible server's: some 30 tokens, far below a thousandth of a cent."""

from __future__ import annotations

import os

import numpy as np
from live_keys import needed

from upload_pipeline.providers.openai_embedder import OpenAIEmbedder
from upload_pipeline.settings import Settings

TEXTS = ["The roof was struck by hail.", "Hail hit the roof.", "Überschwemmung im Keller \N{WATER WAVE}"]


async def test_openai() -> None:
    (key,) = needed("OPENAI_API_KEY")
    base_url = os.environ.get("OPENAI_BASE_URL") or Settings.model_fields["openai_base_url"].default
    model = os.environ.get("LIVE_OPENAI_MODEL") or Settings.model_fields["openai_model"].default
    embedder = OpenAIEmbedder(api_key=key, base_url=base_url, model=model)
    try:
        answer = await embedder.request(TEXTS)
        again = await embedder.embed(TEXTS[:1])
    finally:
        await embedder.close()
    assert answer.vectors.shape == (len(TEXTS), embedder.dimensions)
    assert answer.unusable == ()
    assert answer.tokens is None or answer.tokens > 0
    np.testing.assert_allclose(np.linalg.norm(answer.vectors, axis=1), 1.0, rtol=1e-3)
    np.testing.assert_allclose(again[0], answer.vectors[0], atol=1e-2)
