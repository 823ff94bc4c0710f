"""Opens a container of Azure Blob Storage, by the usual `AZURE_STORAGE_*` environment variables."""

from __future__ import annotations

import os

from obstore.exceptions import BaseError
from obstore.store import AzureStore

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage.azure_failures import azure_refusal
from upload_pipeline.storage.azure_urls import AzureUrls
from upload_pipeline.storage.http_bounds import RETRIES, client_options, plain_http
from upload_pipeline.storage.obstore_backend import ObstoreBackend
from upload_pipeline.storage_address import AzureContainer

_ENDPOINT_VARIABLES = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
# As obstore reads them: names of one and the same.
_KEY_VARIABLES = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")


def open_container(container: AzureContainer, public_endpoint: str = "") -> ObstoreBackend:
    """Opens a container; asks nothing of it yet.

    Args:
        container: which.
        public_endpoint: where others reach it by the URLs that are signed for them; empty: where this process does.

    Raises:
        PipelineError: `SETTING_INVALID` for environment variables that are missing or do not fit.
    """
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not account:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "AZURE_STORAGE_ACCOUNT_NAME is not set: it names the account that the container belongs to. "
            "AZURE_STORAGE_ACCOUNT_KEY is its key, where no identity takes its place.",
            {"setting": "AZURE_STORAGE_ACCOUNT_NAME"},
        )
    options = client_options(allow_http=plain_http(_ENDPOINT_VARIABLES, "AZURE_ALLOW_HTTP"))
    prefix = container.prefix or None
    try:
        place = AzureStore(container.name, prefix=prefix, client_options=options, retry_config=RETRIES)
        shown = place
        if public_endpoint:
            shown = AzureStore(container.name, prefix=prefix, config={"endpoint": public_endpoint.rstrip("/")})
    except (BaseError, ValueError) as error:
        # Its first line: what follows may quote the key.
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            f"The container {container.name} cannot be opened with the AZURE_* variables of the environment: {reason}.",
            {"setting": "AZURE_*"},
        ) from error
    key = next((value for name in _KEY_VARIABLES if (value := os.environ.get(name))), None)
    within = f"{container.name}/{container.prefix}" if container.prefix else container.name
    return ObstoreBackend(place, AzureUrls(shown, account, within, key) if key else None, azure_refusal)
