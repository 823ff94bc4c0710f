"""The settings as they may be shown: without passwords."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr

from upload_pipeline.settings import ENV_PREFIX, Settings
from upload_pipeline.url_secrets import HIDDEN, without_password


def effective_settings(settings: Settings) -> list[tuple[str, Any, bool]]:
    """Each setting as (variable, value as JSON has it, whether it was given), with defaults filled in."""
    rows: list[tuple[str, Any, bool]] = []
    for field in type(settings).model_fields:
        value = getattr(settings, field)
        if field == "storage_url":
            value = settings.effective_storage_url
        if isinstance(value, SecretStr):
            value = value.get_secret_value() if field.endswith("_url") or not value else HIDDEN
        if isinstance(value, str):
            value = without_password(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif not isinstance(value, int | float | bool | dict):
            value = str(value)
        rows.append((f"{ENV_PREFIX}{field.upper()}", value, field in settings.model_fields_set))
    return rows
