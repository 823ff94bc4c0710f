"""Which pages a request may come from where the browser adds the credentials, and not the page.

A browser sends its cookies along whoever's page asks. `SameSite=Lax` keeps most of that away; that a write names the
page it comes from, and that this is one of ours, does the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from fastapi import Request

    from upload_pipeline.settings import Settings

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OUR_SITE = frozenset({"same-origin", "same-site", "none"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def cookies_over_tls_only(settings: Settings) -> bool:
    """Whether browsers may send the session's cookie over TLS only."""
    if settings.session_cookie_secure != "auto":
        return settings.session_cookie_secure == "always"
    return settings.api_host not in _LOOPBACK or settings.api_public_url.startswith("https:")


def require_same_site(request: Request, settings: Settings) -> None:
    """Lets a request pass that reads, and one that writes and comes from a page of ours.

    Raises:
        PipelineError: `FORBIDDEN`, saying which pages may.
    """
    if request.method in _SAFE_METHODS or _of_ours(request.headers.get("Origin"), request, settings):
        return
    raise PipelineError(
        ErrorCode.FORBIDDEN,
        "A session changes things only for pages of this service: the header Origin must be the service's own, or one "
        "that its operator names in UPLOAD_PIPELINE_CORS_ORIGINS.",
    )


def is_browser_of_ours(request: Request, settings: Settings) -> bool:
    """Whether a browser sends this for a page of ours, or because its user has typed the address.

    Browsers say so by `Origin`, with each write, or by `Sec-Fetch-Site`; what sends neither is taken for a program.
    """
    origin = request.headers.get("Origin")
    if origin is not None:
        return _of_ours(origin, request, settings)
    return request.method in _SAFE_METHODS and request.headers.get("Sec-Fetch-Site") in _OUR_SITE


def _of_ours(origin: str | None, request: Request, settings: Settings) -> bool:
    if origin is None:
        return False
    if origin in settings.cors_origins and origin != "*":
        return True
    try:
        page = urlsplit(origin.lower())
        own = urlsplit(settings.api_public_url.lower())
    except ValueError:
        return False
    if page.scheme not in _DEFAULT_PORTS or not page.netloc:
        return False
    if (
        own.netloc
        and page.scheme == own.scheme
        and _address(page.scheme, page.netloc) == _address(own.scheme, own.netloc)
    ):
        return True
    # Where the cookie needs TLS, a page without it is somebody on the way.
    if page.scheme == "http" and cookies_over_tls_only(settings):
        return False
    # The Host is one of the trusted ones. Behind a proxy the scheme is not known here.
    host = request.headers.get("Host", "").lower()
    return bool(host) and _address(page.scheme, page.netloc) == _address(page.scheme, host)


def _address(scheme: str, netloc: str) -> str:
    return netloc.removesuffix(_DEFAULT_PORTS[scheme]) if scheme in _DEFAULT_PORTS else netloc
