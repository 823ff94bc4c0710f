"""Names in the environment that look like settings and are none: a slip of the pen that would pass in silence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from upload_pipeline.settings import ENV_PREFIX, Settings


def unknown_settings() -> list[str]:
    """A sentence for each name that has our prefix and is no setting, with the nearest one that is.

    Looks where the settings are read: in the environment and in `.env`.
    """
    from dotenv import dotenv_values

    given = set(os.environ)
    if Path(".env").is_file():
        given |= dotenv_values(".env").keys()
    return explain_unknown(given)


def explain_unknown(names: Iterable[str]) -> list[str]:
    """As `unknown_settings`, of these names."""
    known = [f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields]
    found = sorted(name for name in names if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
    return [f"{name} is no setting, so it does nothing. {_instead(name.upper(), known)}" for name in found]


def _instead(name: str, known: list[str]) -> str:
    # Compared without what all have in common, which would make everything alike.
    nearest = difflib.get_close_matches(
        name.removeprefix(ENV_PREFIX), [setting.removeprefix(ENV_PREFIX) for setting in known], n=1
    )
    if nearest:
        return f"Is {ENV_PREFIX}{nearest[0]} meant?"
    return "`upload-pipeline doctor --show` lists all that there are."
