"""The local embedder: WordLlama's 256-dimensional token vectors, averaged. No network, no keys, no torch.

The wheel of `wordllama` holds the weights and the tokenizer; this module reads those two files and nothing
else of it. Its Python is left alone for three reasons, each seen in 0.4.0.post1: importing it sets up the root
logger, its loader looks for the tokenizer in a folder that does not exist and then goes to the network, and
its pooling lays a batch out as one block of (texts, longest text, 256) floats, which for 64 texts with one of
1 MB among them is 19 GB.

A vector depends on its own text alone, to the last bit. The weights are 16-bit floats of at most 8.1, so that
each is a multiple of 2^-24 and a sum of fewer than 2^25 of them is exact in a 64-bit float, in whatever order
it is taken; the length comes from `math.fsum`, which rounds once. What else shares the batch, how many threads
there are and which processor it is cannot show in the result.

The model was trained so that the first 128 or 64 dimensions are vectors by themselves (Matryoshka representations:
Kusupati and others, 2022; the sizes are those that the model's authors name). Cut to these and scaled to length 1 again
they are models of their own, named `wordllama-256@128` and `wordllama-256@64`.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.embedding import MAX_BATCH, EmbeddingModel, check_texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

WORDLLAMA_256 = EmbeddingModel(name="wordllama-256", provider="local", dimensions=256)

LOCAL_DIMENSIONS = (64, 128, 256)
"""Lengths that its vectors may be cut to."""

# Where the wheel keeps them, and the tensor's name in the file.
_PACKAGE = "wordllama"
_WEIGHTS_FILE = Path("weights", "l2_supercat_256.safetensors")
_TOKENIZER_FILE = Path("tokenizers", "l2_supercat_tokenizer_config.json")
_TENSOR = "embedding.weight"

# A longer text is tokenized in pieces: the tokenizer keeps about 100 bytes a token, and a piece is done in 30 ms.
# Chunks are far below it (8,000 bytes), so that none of them is ever cut.
_PIECE_CHARS = 65_536

# Stands in for a text that says nothing, since a row of zeros has no direction and breaks the cosine.
_SILENCE = " "


@dataclass(frozen=True, slots=True)
class _Model:
    tokenizer: Tokenizer
    table: NDArray[np.float32]  # (vocabulary, dimensions)


_load_lock = threading.Lock()
_loaded: _Model | None = None


class LocalEmbedder:
    """Embeds on one thread of its own; the model is loaded once a process, at first use (about 60 MB).

    Any string is accepted. An empty one, and one of white space only, is embedded as a single space. A lone
    surrogate counts as U+FFFD. There is no limit of length: a long text is the average of all of its tokens.
    """

    def __init__(self, dimensions: int = WORDLLAMA_256.dimensions) -> None:
        """Loads nothing yet.

        Args:
            dimensions: one of `LOCAL_DIMENSIONS`.

        Raises:
            PipelineError: `INVALID_ARGUMENT` for any other length.
        """
        if dimensions not in LOCAL_DIMENSIONS:
            raise PipelineError(
                ErrorCode.INVALID_ARGUMENT,
                f"Vectors of {WORDLLAMA_256.name} may have {', '.join(map(str, LOCAL_DIMENSIONS))} dimensions, "
                f"not {dimensions}.",
                {"dimensions": dimensions, "allowed": list(LOCAL_DIMENSIONS)},
            )
        name = WORDLLAMA_256.name
        self._facts = EmbeddingModel(
            name if dimensions == WORDLLAMA_256.dimensions else f"{name}@{dimensions}", "local", dimensions
        )
        # One thread: the event loop stays free, and jobs that embed at once take turns batch by batch.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-embedder")
        self._closed = False

    @property
    def facts(self) -> EmbeddingModel:
        """The model's facts."""
        return self._facts

    @property
    def model(self) -> str:
        """The model's name."""
        return self._facts.name

    @property
    def dimensions(self) -> int:
        """The length of each vector."""
        return self._facts.dimensions

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds texts; cancelling the call stops the work at the next batch.

        Returns:
            An array of shape (len(texts), dimensions), float32, row i for text i; each row is finite and has length 1.

        Raises:
            PipelineError: `EMBED_FAILED` when the model's files are missing or damaged, or after `close`.
            TypeError: `texts` is one string, or holds something that is not a string.
        """
        check_texts(texts)
        if self._closed:
            raise PipelineError(ErrorCode.EMBED_FAILED, "The local embedder is closed; open another one.")
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(self._threads, _load)
        import numpy as np

        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        for start in range(0, len(texts), MAX_BATCH):
            if self._closed:
                raise PipelineError(ErrorCode.EMBED_FAILED, "The local embedder was closed while it worked.")
            batch = texts[start : start + MAX_BATCH]
            rows = await loop.run_in_executor(self._threads, _embed_batch, model, batch, self.dimensions)
            vectors[start : start + len(batch)] = rows
        return vectors

    async def close(self) -> None:
        """Ends the thread once its present batch is done; calls with batches still to do fail."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)


def _load() -> _Model:
    """Loads the model, once a process however many threads ask at the same time."""
    global _loaded
    with _load_lock:
        if _loaded is None:
            _loaded = _read_model(_package_folder())
        return _loaded


def _package_folder() -> Path:
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError(
            ErrorCode.EMBED_FAILED,
            f"The package {_PACKAGE}, which holds the local embedder's model, is not installed. "
            "Install this project's dependencies again.",
        )
    return Path(spec.submodule_search_locations[0])


def _read_model(folder: Path) -> _Model:
    """Reads tokenizer and weights from wordllama's package folder.

    Raises:
        PipelineError: `EMBED_FAILED`, naming the file that is missing or damaged.
    """
    # Texts are tokenized one by one, so threads inside the tokenizer would only make it warn at a fork.
    # An operator's own choice stands.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer((folder / _TOKENIZER_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(folder / _TOKENIZER_FILE, error) from error
    try:
        weights = load_file(folder / _WEIGHTS_FILE)[_TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(folder / _WEIGHTS_FILE, error) from error
    expected = (tokenizer.get_vocab_size(), WORDLLAMA_256.dimensions)
    if weights.shape != expected or weights.dtype != np.float16 or not np.isfinite(weights).all():
        found = f"{weights.dtype} {weights.shape} where finite float16 {expected} was expected"
        raise _damaged(folder / _WEIGHTS_FILE, ValueError(found))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return _Model(tokenizer, np.ascontiguousarray(weights, dtype=np.float32))


def _damaged(path: Path, error: Exception) -> PipelineError:
    return PipelineError(
        ErrorCode.EMBED_FAILED,
        f"The local embedder cannot read its model file {path}: {error}. Reinstall the package {_PACKAGE}.",
        {"path": str(path)},
    )


def _embed_batch(model: _Model, texts: Sequence[str], dimensions: int | None = None) -> NDArray[np.float32]:
    """Vectors of texts, shape (len(texts), dimensions); None: not cut."""
    import numpy as np

    return np.stack([_embed_text(model, text, dimensions) for text in texts])


def _embed_text(model: _Model, text: str, dimensions: int | None = None) -> NDArray[np.float32]:
    """The vector of one text: the sum of its tokens' vectors, cut, and scaled to length 1."""
    total = _token_sum(model, text if text.strip() else _SILENCE)[:dimensions]
    length = _length(total)
    if length == 0.0:  # tokens that cancel each other out exactly
        total = _token_sum(model, _SILENCE)[:dimensions]
        length = _length(total)
    return (total / length).astype("float32")


def _token_sum(model: _Model, text: str) -> NDArray[np.float64]:
    import numpy as np

    total = np.zeros(model.table.shape[1], dtype=np.float64)
    for piece in _pieces(_encodable(text)):
        (encoding,) = model.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
        # Each distinct token once, times its count: at most the whole table, however long the text.
        tokens, counts = np.unique(np.array(encoding.ids, dtype=np.int64), return_counts=True)
        total += counts.astype(np.float64) @ model.table[tokens].astype(np.float64)
    return total


def _length(vector: NDArray[np.float64]) -> float:
    return math.sqrt(math.fsum((vector * vector).tolist()))


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_CHARS):
        yield text[start : start + _PIECE_CHARS]


def _encodable(text: str) -> str:
    """The text with each lone surrogate as U+FFFD, since the tokenizer takes UTF-8 and surrogates have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
