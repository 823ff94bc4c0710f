"""What an embedder is, and which one a setting names.

An embedder turns texts into vectors of unit length. Chunks and queries go through the same model, and the
model's name stands beside each stored vector, so that two models never meet in one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upload_pipeline.settings import Settings

EMBEDDERS: tuple[str, ...] = ("local", "openai")
"""The names that `open_embedder` knows: what the setting `EMBEDDER` may be."""

MAX_BATCH = 256
"""Most texts that an embedder works on in one go; longer lists are taken in parts of this size."""

TRIAL_TEXT = "A text to try the model with."
"""One that no provider objects to: what fails with it is no text's fault."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """The facts of a model, as the table `embedding_models` keeps them.

    Attributes:
        name: unique name, stored with each vector; a change of weights or of method needs a new one.
        provider: who computes it: a name of `EMBEDDERS`.
        dimensions: length of each vector.
    """

    name: str
    provider: str
    dimensions: int


class Embedder(Protocol):
    """Turns texts into vectors; safe to share between the tasks of one event loop."""

    @property
    def facts(self) -> EmbeddingModel:
        """The model's facts."""

    @property
    def model(self) -> str:
        """The model's name: `facts.name`."""

    @property
    def dimensions(self) -> int:
        """The length of each vector: `facts.dimensions`."""

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds texts.

        Args:
            texts: any number of texts, in any mix of lengths.

        Returns:
            An array of shape (len(texts), dimensions), float32, row i for text i; each row is finite and has
            length 1.

        Raises:
            PipelineError: `EMBED_FAILED` when the model does not answer; the same call may succeed later.
                `EMBED_REJECTED` when it does not take a text; `EMBED_QUOTA` and `EMBED_DENIED` when it takes none.
            TypeError: `texts` is one string, or holds something that is not a string.
        """

    async def close(self) -> None:
        """Lets go of threads and connections. A second call does nothing; `embed` fails afterwards."""


def open_embedder(name: str, settings: Settings) -> Embedder:
    """Gives the embedder of a name; its model is loaded, or its server called, when it is first used.

    Args:
        name: one of `EMBEDDERS`.
        settings: how it is reached.

    Raises:
        PipelineError: `SETTING_INVALID` for any other name, and where a setting or a package that it needs is missing.
    """
    if name == "local":
        from upload_pipeline.providers.local_embedder import LocalEmbedder

        return LocalEmbedder()
    if name == "openai":
        from upload_pipeline.providers.openai_embedder import open_openai

        return open_openai(settings)
    raise PipelineError(
        ErrorCode.SETTING_INVALID,
        f"There is no embedder named {name!r}. Set EMBEDDER to one of: {', '.join(EMBEDDERS)}.",
        {"setting": "embedder", "value": name, "allowed": list(EMBEDDERS)},
    )


def check_texts(texts: Sequence[str]) -> None:
    """Refuses what would embed, but not as meant: one string is a sequence of one-letter texts.

    Raises:
        TypeError: naming what came instead.
    """
    if isinstance(texts, str):
        raise TypeError("embed takes a list of texts, not one string; pass [text].")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"embed takes texts; item {position} is {type(text).__name__}.")
