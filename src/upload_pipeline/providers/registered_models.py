"""From a model's name to its embedder: of the ones that the database has registered, and of one that is to be added.

A model whose vectors are cut shorter is named by how long they are: `wordllama-256@128`, `text-embedding-3-large@1024`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.embedding import EMBEDDERS, Embedder, EmbeddingModel, open_embedder
from upload_pipeline.providers.local_embedder import WORDLLAMA_256, LocalEmbedder
from upload_pipeline.providers.openai_embedder import NATIVE_DIMENSIONS, OpenAIEmbedder

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings


def open_model(model: EmbeddingModel, settings: Settings) -> Embedder:
    """The embedder of a registered model; keys and addresses are those of the settings.

    Raises:
        PipelineError: `SETTING_INVALID` where a setting or a package that it needs is missing, or where this version
            makes other vectors by that name.
    """
    base = model.name.removesuffix(f"@{model.dimensions}")
    embedder = _open(model.provider, base, model.dimensions, settings)
    if embedder.facts != model:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The embedding model {model.name!r} of provider {model.provider!r} with {model.dimensions} dimensions is "
            f"none that this version has: by that name it opens {embedder.facts.name!r}.",
            {"model": model.name},
        )
    return embedder


def open_named(
    name: str, settings: Settings, *, provider: str | None = None, dimensions: int | None = None
) -> Embedder:
    """The embedder of a model as a person names it, with or without the length of its vectors.

    Args:
        name: as the provider names it, or as it is registered (`…@128`).
        settings: keys and addresses.
        provider: one of `EMBEDDERS`; None where the name is a known one.
        dimensions: length of the vectors; None: as the name says, or as the model gives them.

    Raises:
        PipelineError: `INVALID_ARGUMENT` naming what is wrong; `SETTING_INVALID` where a setting or a package that it
            needs is missing.
    """
    base, at, told = name.rpartition("@")
    if at and told.isdecimal():
        if dimensions not in (None, int(told)):
            raise _invalid(f"{name!r} has vectors of {told} dimensions, and --dimensions says {dimensions}.")
        name, dimensions = base, int(told)
    if provider is None:
        provider = "local" if name == WORDLLAMA_256.name else "openai" if name in NATIVE_DIMENSIONS else None
    if provider is None:
        known = ", ".join([WORDLLAMA_256.name, *NATIVE_DIMENSIONS])
        raise _invalid(f"Nobody is known to have a model {name!r}: name its --provider. Known are {known}.")
    if provider == "openai" and dimensions is None and name not in NATIVE_DIMENSIONS:
        raise _invalid(f"How long the vectors of {name!r} are is not known: say so by --dimensions.")
    try:
        return _open(provider, name, dimensions or 0, settings)
    except PipelineError as error:
        native = NATIVE_DIMENSIONS.get(name)
        if error.details.get("setting") != "openai_dimensions" or native is None:
            raise
        # the setting has no part in it: they are those of the name or of the caller
        raise _invalid(f"{name!r} gives vectors of {native} dimensions, not {dimensions}.") from error


def other_than_set(active: EmbeddingModel, settings: Settings) -> str | None:
    """What to tell an operator whose settings name another model than the active one; None where they agree.

    The settings name the model of a new database; afterwards the registry decides.
    """
    try:
        configured = open_embedder(settings.embedder, settings).facts
    except PipelineError:
        # It has no key, say, and needs none: another one is in use. What is in use is opened, and tells what it lacks.
        if settings.embedder == active.provider:
            return None
        configured = EmbeddingModel(settings.openai_model, settings.embedder, settings.openai_dimensions)
    if configured == active:
        return None
    if configured.name == active.name:
        return (
            f"The settings give the embedding model {active.name} {configured.dimensions} dimensions, but it is "
            f"registered with {active.dimensions}: documents and queries go on with these."
        )
    return (
        f"The settings name the embedding model {configured.name}, but {active.name} is the active one: documents and "
        f"queries go on with that. `upload-pipeline models add {configured.name}` fills the other one beside it."
    )


def _open(provider: str, name: str, dimensions: int, settings: Settings) -> Embedder:
    if provider == "local":
        if name != WORDLLAMA_256.name:
            raise _invalid(f"There is no local embedding model {name!r}. There is {WORDLLAMA_256.name!r}.")
        return LocalEmbedder(dimensions or WORDLLAMA_256.dimensions)
    if provider == "openai":
        return OpenAIEmbedder(
            api_key=settings.openai_api_key.get_secret_value(),
            base_url=settings.openai_base_url,
            model=name,
            dimensions=dimensions,
            timeout=settings.openai_timeout,
        )
    raise _invalid(f"There is no provider {provider!r} of embeddings. There are: {', '.join(EMBEDDERS)}.")


def _invalid(message: str) -> PipelineError:
    return PipelineError(ErrorCode.INVALID_ARGUMENT, message)
