"""URLs as they may be shown: without what is secret in them."""

from __future__ import annotations

import re

_AUTHORITY = re.compile(r"(?<=://)([^/?#]*)@")
_SECRET_WORDS = re.compile(r"(?i)([?&](?:password|sslpassword|[a-z_]*(?:secret|token|key)[a-z_]*)=)[^&#]*")
HIDDEN = "***"


def without_password(url: str) -> str:
    """A URL with what may be secret in it replaced: the password before `@`, and such parameters as `password=`."""

    def hide(match: re.Match[str]) -> str:
        user, colon, _ = match[1].partition(":")
        return f"{user}{colon}{HIDDEN if colon else ''}@"

    return _SECRET_WORDS.sub(rf"\g<1>{HIDDEN}", _AUTHORITY.sub(hide, url))
