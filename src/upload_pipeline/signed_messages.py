"""Messages between two services that share a secret: signed with the time, so that a copy is of no use later.

    X-Upload-Pipeline-Signature: t=1795273200,v1=5f2b…

`t` is the time of signing in seconds since 1970 (UTC), `v1` the hex HMAC-SHA256 of `<t>.<body>` under the secret. While
a secret is being changed a sender may put several `v1` into one header: one that fits is enough.
"""

from __future__ import annotations

import hashlib
import hmac

from upload_pipeline.errors import ErrorCode, PipelineError

SIGNATURE_HEADER = "X-Upload-Pipeline-Signature"

TOLERANCE_SECONDS = 300.0
"""How far from the present a message's time may be, before or behind."""

_MOST_CHARS = 1000


def sign(body: bytes, secret: str, *, at: float) -> str:
    """The header's value.

    Args:
        body: as it is sent, byte for byte.
        secret: that both know.
        at: seconds since 1970.
    """
    moment = str(int(at))
    return f"t={moment},v1={_digest(moment, body, secret)}"


def check_signature(header: str | None, body: bytes, secret: str, *, now: float) -> None:
    """Refuses a message that was not signed under the secret, or not lately.

    Args:
        header: its signature header, or None.
        body: as it came, byte for byte.
        secret: that both know; where it is empty nothing is accepted.
        now: seconds since 1970.

    Raises:
        PipelineError: `UNAUTHENTICATED`.
    """
    if not header or not secret:
        raise _refused(f"The request has no {SIGNATURE_HEADER}." if secret else "No secret is set for such requests.")
    moment, given = _parts(header)
    if not any(hmac.compare_digest(one.encode(), _digest(moment, body, secret).encode()) for one in given):
        raise _refused(f"{SIGNATURE_HEADER} does not fit the body and the secret.")
    if abs(now - int(moment)) > TOLERANCE_SECONDS:
        raise _refused(
            f"The request was signed more than {TOLERANCE_SECONDS:.0f} s before or after now. Sign it anew each time "
            "that it is sent, and look at the clocks of both machines."
        )


def _parts(header: str) -> tuple[str, list[str]]:
    fields = [part.strip().partition("=") for part in header[:_MOST_CHARS].split(",")]
    moments = [value for name, _, value in fields if name == "t"]
    if len(moments) != 1 or not (moments[0].isascii() and moments[0].isdecimal() and len(moments[0]) <= 12):
        raise _refused(f"{SIGNATURE_HEADER} is not of the form t=<seconds>,v1=<hex>.")
    return moments[0], [value for name, _, value in fields if name == "v1"]


def _digest(moment: str, body: bytes, secret: str) -> str:
    return hmac.new(secret.encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()


def _refused(message: str) -> PipelineError:
    return PipelineError(ErrorCode.UNAUTHENTICATED, message)
