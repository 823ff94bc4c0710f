"""OpenAI's embeddings, or those of any server that speaks the same: one request at a time, each answer checked.

The official client sends and reads; it never tries again by itself, so that every request is seen by whoever counts
them. What a failure asks for is said by its `Remedy` (`provider_failures`): what may pass is `EMBED_FAILED`, an empty
account `EMBED_QUOTA`, a refused key or model `EMBED_DENIED`, a text that is not taken `EMBED_REJECTED`, and what is
more than the provider takes in a whole minute `REQUEST_OVER_BUDGET`.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.embedding import MAX_BATCH, EmbeddingModel, check_texts
from upload_pipeline.providers.provider_failures import (
    MESSAGE_CHARS,
    ProviderError,
    Remedy,
    Wording,
    bad_setting,
    lower_names,
    open_client,
    refused,
    unanswered,
)
from upload_pipeline.providers.request_packing import pack
from upload_pipeline.rate_headers import read_rate_limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.settings import Settings

PROVIDER = "openai"

NATIVE_DIMENSIONS: dict[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}
"""Of the models that are known; those of the third generation can be told to give fewer."""

TRIES = 3
"""Of a request by `embed`, which somebody waits for."""
_LONGEST_WAIT = 2.0  # seconds that `embed` waits for a limit

_SHORTENED = "text-embedding-3-"
_MOST_TOKENS = 10**9  # of one request; what says more is no count


@dataclass
class EmbeddingError(ProviderError):
    """A request that brought no vectors.

    Attributes:
        broken: an answer came, and cannot be used. It is paid for.
    """

    broken: bool = False


_WORDING = Wording(
    error=EmbeddingError,
    who="The embedder",
    content="the text",
    failed=ErrorCode.EMBED_FAILED,
    quota=ErrorCode.EMBED_QUOTA,
    denied=ErrorCode.EMBED_DENIED,
    rejected=ErrorCode.EMBED_REJECTED,
    look_at="UPLOAD_PIPELINE_OPENAI_MODEL, _DIMENSIONS and _BASE_URL",
    setting_params=frozenset({"model", "dimensions", "encoding_format"}),
    make_smaller="Shorten the text (of documents: UPLOAD_PIPELINE_CHUNK_TARGET_CHARS and _CHUNK_MAX_BYTES)",
)


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """What a request brought.

    Attributes:
        vectors: row i for text i, of length 1 where it is usable.
        unusable: positions whose vector is no direction: not finite, or of length 0.
        tokens: as the provider counted them; None where it did not say.
        headers: of the answer, names in small letters.
    """

    vectors: NDArray[np.float32]
    unusable: tuple[int, ...]
    tokens: int | None
    headers: Mapping[str, str]


class OpenAIEmbedder:
    """Implements `Embedder`, and `request` for those who pack, count and repeat by themselves.

    An empty text, and one of white space only, is embedded as a single space. A lone surrogate counts as `?`.

    Attributes:
        api_key: of the account that pays.
        api_model: the model as the API, its limits and its prices name it.
    """

    def __init__(self, *, api_key: str, base_url: str, model: str, dimensions: int = 0, timeout: float = 60.0) -> None:
        """Connects to nothing yet.

        Args:
            api_key: of the account that pays.
            base_url: of the API, with its version.
            model: as the API names it.
            dimensions: of the vectors; 0 means the model's own, where it is a known one.
            timeout: seconds that a request may take.

        Raises:
            PipelineError: `SETTING_INVALID`, naming the setting or the missing package.
        """
        api_key = api_key.strip()
        client = open_client(setting="embedder", api_key=api_key, base_url=base_url, timeout=timeout)
        native = NATIVE_DIMENSIONS.get(model, 0)
        if not (native or dimensions):
            raise bad_setting("openai_dimensions", f"must say how long the vectors of {model!r} are")
        shortened = native != 0 and dimensions not in (0, native)
        if shortened and (not model.startswith(_SHORTENED) or dimensions > native):
            raise bad_setting(
                "openai_dimensions", f"is {dimensions}, but {model!r} gives vectors of {native} dimensions"
            )
        self.api_key = api_key
        self.api_model = model
        self._asked_dimensions = dimensions if shortened else None
        self._timeout = timeout
        name = f"{model}@{dimensions}" if shortened else model
        self._facts = EmbeddingModel(name, PROVIDER, dimensions or native)
        self._client = client

    @property
    def facts(self) -> EmbeddingModel:
        """The model's facts; vectors that are cut shorter have a name of their own, as `text-embedding-3-small@512`."""
        return self._facts

    @property
    def model(self) -> str:
        """The model's name."""
        return self._facts.name

    @property
    def dimensions(self) -> int:
        """The length of each vector."""
        return self._facts.dimensions

    async def request(self, texts: Sequence[str]) -> EmbeddingAnswer:
        """Sends texts once, as one request, and checks what comes back.

        Raises:
            EmbeddingError: `EMBED_FAILED`, `EMBED_QUOTA`, `EMBED_DENIED`, `EMBED_REJECTED` or `REQUEST_OVER_BUDGET`.
        """
        import openai
        from pydantic_core import from_json

        asked: dict[str, Any] = {} if self._asked_dimensions is None else {"dimensions": self._asked_dimensions}
        try:
            async with asyncio.timeout(self._timeout):
                raw = await self._client.embeddings.with_raw_response.create(
                    model=self.api_model,
                    input="",
                    encoding_format="base64",
                    # here and not as an argument, of which the client looks at each text by its declared type
                    extra_body={"input": [sendable(text) for text in texts]},
                    **asked,
                )
        except openai.APIStatusError as error:
            raise refused(error, _WORDING, api_key=self.api_key) from error
        except (openai.APIConnectionError, TimeoutError) as error:
            raise unanswered(error, _WORDING, base_url=self._client.base_url, timeout=self._timeout) from error
        headers = lower_names(raw.headers)
        tokens: int | None = None
        try:
            # not by the client's models: making one of each row takes as long as all else together
            answer = from_json(raw.content, cache_strings="keys")
            tokens = _count((answer.get("usage") or {}).get("prompt_tokens"))
            rows = [(row["index"], row["embedding"]) for row in answer["data"]]
            vectors = self._ordered(rows, len(texts))
        except (AttributeError, LookupError, TypeError, ValueError, binascii.Error) as error:
            raise EmbeddingError(
                ErrorCode.EMBED_FAILED,
                f"The embedder's answer is no list of {len(texts)} vectors of {self.dimensions} dimensions: "
                f"{str(error)[:MESSAGE_CHARS]}.",
                headers=headers,
                answered=True,
                tokens=tokens,
                broken=True,
            ) from error
        unusable = _to_unit_length(vectors)
        return EmbeddingAnswer(vectors, unusable, tokens, headers)

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds texts, part by part; a failure that may pass is tried again at once, a few times.

        Args:
            texts: any number.

        Raises:
            PipelineError: `EMBED_FAILED`, `EMBED_QUOTA`, `EMBED_DENIED`, `EMBED_REJECTED` or `REQUEST_OVER_BUDGET`.
            TypeError: `texts` is one string, or holds something that is not a string.
        """
        check_texts(texts)
        import numpy as np

        parts = [await self._embed_part(texts[start:end]) for start, end in pack(texts, most=MAX_BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), dtype=np.float32)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _embed_part(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        for tries_left in reversed(range(TRIES)):
            try:
                answer = await self.request(texts)
            except EmbeddingError as error:
                if error.remedy is Remedy.SPLIT and len(texts) > 1:
                    middle = len(texts) // 2
                    halves = [await self._embed_part(half) for half in (texts[:middle], texts[middle:])]
                    return np.concatenate(halves)
                wait = _wait_for(error, TRIES - tries_left)
                if not tries_left or error.remedy in (Remedy.PAUSE, Remedy.SPLIT) or wait > _LONGEST_WAIT:
                    raise
                await asyncio.sleep(wait)
            else:
                if not answer.unusable:
                    return answer.vectors
        raise EmbeddingError(
            ErrorCode.EMBED_FAILED, "The embedder gives a vector that has no direction.", answered=True
        )

    def _ordered(self, rows: Sequence[tuple[int, Any]], count: int) -> NDArray[np.float32]:
        import numpy as np
        from pybase64 import b64decode

        if sorted(index for index, _ in rows) != list(range(count)):
            raise ValueError(f"{len(rows)} vectors came for {count} texts, or twice for one of them")
        vectors = np.empty((count, self.dimensions), dtype=np.float32)
        for index, embedding in rows:
            # a server that knows no base64 sends a list of numbers
            row = (
                np.frombuffer(b64decode(embedding, validate=True), dtype="<f4")
                if isinstance(embedding, str)
                else np.asarray(embedding, dtype=np.float32)
            )
            if row.shape != (self.dimensions,):
                raise ValueError(f"a vector of shape {row.shape} came, not of {self.dimensions} dimensions")
            vectors[index] = row
        return vectors


def sendable(text: str) -> str:
    """A text as it is sent: what JSON can hold, and the API takes."""
    return text.encode("utf-8", "replace").decode() if text.strip() else " "


def open_openai(settings: Settings) -> OpenAIEmbedder:
    """The embedder that the settings describe.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the setting or the missing package.
    """
    return OpenAIEmbedder(
        api_key=settings.openai_api_key.get_secret_value(),
        base_url=settings.openai_base_url,
        model=settings.openai_model,
        dimensions=settings.openai_dimensions,
        timeout=settings.openai_timeout,
    )


def _count(value: object) -> int | None:
    """A number of tokens as a server told it; servers that speak the same may tell anything."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS:
        return value
    return None


def _wait_for(error: EmbeddingError, tries: int) -> float:
    told = read_rate_limits(error.headers).retry_after
    return told if told is not None else 0.2 * 2 ** (tries - 1)


def _to_unit_length(vectors: NDArray[np.float32]) -> tuple[int, ...]:
    """Scales each row in place; the positions of those that cannot be."""
    import numpy as np

    with np.errstate(over="ignore"):  # a length that is no float32 is not finite, and its row not used
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)).astype(np.float32)
    usable = np.isfinite(lengths) & (lengths > 0)
    np.divide(vectors, lengths[:, None], out=vectors, where=usable[:, None])
    return tuple(int(position) for position in np.flatnonzero(~usable))
