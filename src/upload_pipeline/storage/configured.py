"""The object store that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upload_pipeline.storage.encryption import Encryption
from upload_pipeline.storage.store import ObjectStore, open_store

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings


def configured_store(settings: Settings) -> ObjectStore:
    """Opens the store of the settings; see `open_store`.

    Raises:
        PipelineError: as `open_store` does.
    """
    return open_store(
        settings.effective_storage_url,
        public_endpoint=settings.storage_public_endpoint,
        encryption=configured_encryption(settings),
        publishable_key=settings.supabase_publishable_key.get_secret_value(),
    )


def configured_encryption(settings: Settings) -> Encryption:
    """What each write is to ask of a bucket."""
    return Encryption(settings.storage_encryption, settings.storage_kms_key_id)
