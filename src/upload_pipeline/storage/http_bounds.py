"""How a store behind HTTP is spoken to: how long each wait may last, what is tried again, when TLS may be missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

CONNECT_SECONDS = 5
"""Bound of one attempt to connect."""

ANSWER_SECONDS = 30
"""Bound of the wait for an answer, a part's upload included, and then for each piece of its body."""

RETRY_SECONDS = 50
"""When no further attempt is begun: below the store's own bound, so that it is the failure that is told."""

RETRY_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the second, the third and the fourth attempt."""

RETRIES: RetryConfig = {
    "max_retries": len(RETRY_PAUSES),
    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    "backoff": {
        "init_backoff": timedelta(seconds=RETRY_PAUSES[0]),
        "max_backoff": timedelta(seconds=RETRY_PAUSES[-1]),
        "base": 2,
    },
}
"""The same for obstore, which draws each pause at random up to about these."""

_WHOLE_REQUEST = timedelta(days=1)
"""A download lasts as long as its reader takes; what stalls is ended by `ANSWER_SECONDS`."""

_YES = frozenset({"1", "true", "yes", "on", "y", "t"})


def client_options(*, allow_http: bool) -> ClientConfig:
    """The bounds for obstore.

    Args:
        allow_http: whether to speak without TLS where the address says so.
    """
    return {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=ANSWER_SECONDS),
        "timeout": _WHOLE_REQUEST,
    }


def plain_http(variables: tuple[str, ...], wish: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the endpoint is spoken to without TLS, which only this machine or an explicit wish allows.

    Args:
        variables: that name the endpoint; the first that is set wins. None of them set: TLS.
        wish: the variable that allows it for other machines.
        environment: where they stand.

    Raises:
        PipelineError: `SETTING_INVALID` for an endpoint that is none, or has no TLS though nobody wished that.
    """
    for name in variables:
        endpoint = environment.get(name, "")
        if endpoint:
            break
    else:
        return False
    parts = urlsplit(endpoint)
    if parts.scheme == "https" and parts.hostname:
        return False
    allowed = is_loopback(parts.hostname or "") or environment.get(wish, "").lower() in _YES
    if parts.scheme == "http" and parts.hostname and allowed:
        return True
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    raise PipelineError(
        ErrorCode.SETTING_INVALID,
        f"{name}={shown!r} is not allowed: it must be https:// and a host. http:// is for this machine "
        f"(127.0.0.1, localhost), or anywhere with {wish}=true, which sends files in the clear.",
        {"setting": name, "value": shown, "allowed": ["https://<host>[:<port>]", "http://127.0.0.1[:<port>]"]},
    )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
