"""Signatures of messages: what is accepted, and everything that is not."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from tests.simulators.detection_model import signature
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.signed_messages import TOLERANCE_SECONDS, check_signature, sign

SECRET = "a secret that two services share, 32+"
NOW = 1_795_273_200.7
BODY = '{"photo_id": "…"}'.encode()


def test_a_signature_is_what_the_documentation_says_and_others_make_the_same() -> None:
    header = sign(BODY, SECRET, at=NOW)
    digest = hmac.new(SECRET.encode(), b"1795273200." + BODY, hashlib.sha256).hexdigest()
    assert header == f"t=1795273200,v1={digest}" == signature(BODY, SECRET, at=NOW)
    check_signature(header, BODY, SECRET, now=NOW)


@pytest.mark.parametrize("drift", [-TOLERANCE_SECONDS + 1, 0, TOLERANCE_SECONDS - 1])
def test_clocks_may_differ_a_little(drift: float) -> None:
    check_signature(sign(BODY, SECRET, at=NOW + drift), BODY, SECRET, now=NOW)


def test_one_of_several_signatures_is_enough_while_a_secret_is_changed() -> None:
    moment, _, old = sign(BODY, "the secret of last year, long as well", at=NOW).partition(",")
    new = sign(BODY, SECRET, at=NOW).partition(",")[2]
    check_signature(f"{moment},{old},{new}", BODY, SECRET, now=NOW)


GOOD = sign(BODY, SECRET, at=NOW)


@pytest.mark.parametrize(
    ("header", "body", "secret", "now"),
    [
        (None, BODY, SECRET, NOW),
        ("", BODY, SECRET, NOW),
        (GOOD, BODY + b" ", SECRET, NOW),
        (GOOD, BODY, SECRET + "x", NOW),
        (GOOD, BODY, "", NOW),
        (GOOD, BODY, SECRET, NOW + TOLERANCE_SECONDS + 1),
        (GOOD, BODY, SECRET, NOW - TOLERANCE_SECONDS - 1),
        (GOOD.replace("t=1795273200", "t=1795273201"), BODY, SECRET, NOW),
        (GOOD.replace("t=1795273200", "t=1795273200,t=1795273200"), BODY, SECRET, NOW),
        (GOOD.replace("t=1795273200", "t=-1"), BODY, SECRET, NOW),
        (GOOD.replace("t=1795273200", "t=٣"), BODY, SECRET, NOW),
        (GOOD.replace("t=1795273200", "t=" + "9" * 5000), BODY, SECRET, NOW),
        (GOOD.replace("v1=", "v0="), BODY, SECRET, NOW),
        ("t=1795273200", BODY, SECRET, NOW),
        ("t=1795273200,v1=ü", BODY, SECRET, NOW),
        ("nonsense", BODY, SECRET, NOW),
    ],
)
def test_everything_else_is_refused(header: str | None, body: bytes, secret: str, now: float) -> None:
    with pytest.raises(PipelineError) as caught:
        check_signature(header, body, secret, now=now)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    assert SECRET not in caught.value.message
