from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import jwt
import pytest
from attacks import ATTACKS
from issuer import (
    ISSUER,
    SECRET,
    USER,
    JwksServer,
    claims,
    ec_key,
    forged,
    jwk,
    jwks_server,
    public_pem,
    rsa_key,
    signed,
)

from upload_pipeline.api.tokens import KnownUser, TokenVerifier, open_token_verifier
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings


@pytest.fixture
async def published() -> AsyncIterator[JwksServer]:
    async with jwks_server() as server:
        yield server


@pytest.fixture
async def verifier(published: JwksServer, tmp_path: Path) -> AsyncIterator[TokenVerifier]:
    settings = load_settings(home=tmp_path, jwt_issuer=ISSUER, jwt_jwks_url=published.url)
    async with open_token_verifier(settings) as opened:
        yield opened


@pytest.fixture
async def by_secret(tmp_path: Path) -> AsyncIterator[TokenVerifier]:
    async with open_token_verifier(load_settings(home=tmp_path, jwt_issuer=ISSUER, jwt_secret=SECRET)) as opened:
        yield opened


async def refusal(verifier: TokenVerifier, token: str) -> PipelineError:
    with pytest.raises(PipelineError) as raised:
        await verifier.verify(token)
    return raised.value


async def test_a_good_token_names_the_user_and_the_roles_that_only_the_issuer_writes(verifier: TokenVerifier) -> None:
    good = claims()
    known = KnownUser(USER, frozenset({"ADMIN"}), good["exp"])
    assert await verifier.verify(signed(good)) == known
    assert await verifier.verify(signed(good, rsa_key(), algorithm="RS256", kid="rsa")) == known


@pytest.mark.parametrize(
    "metadata", [None, [], "ADMIN", {"roles": None}, {"roles": "ADMIN"}, {"roles": {"ADMIN": 1}}, {"roles": [1, None]}]
)
async def test_app_metadata_of_another_form_gives_no_roles(verifier: TokenVerifier, metadata: object) -> None:
    assert (await verifier.verify(signed(claims(app_metadata=metadata)))).roles == frozenset()


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_is_no_good_token_is_refused(verifier: TokenVerifier, attack: str) -> None:
    error = await refusal(verifier, ATTACKS[attack]())
    assert error.code is ErrorCode.UNAUTHENTICATED


async def test_clocks_may_differ_by_the_leeway_and_no_more(verifier: TokenVerifier) -> None:
    await verifier.verify(signed(claims(exp=int(time.time()) - 5)))
    assert "expired" in (await refusal(verifier, signed(claims(exp=int(time.time()) - 12)))).message
    with pytest.raises(PipelineError, match="JWT_LEEWAY"):
        load_settings(jwt_leeway=31)


async def test_a_shared_secret_counts_where_it_is_configured_and_public_keys_then_do_not(
    by_secret: TokenVerifier,
) -> None:
    good = jwt.encode(claims(), SECRET, algorithm="HS256")
    assert (await by_secret.verify(good)).user_id == USER
    for token in (
        signed(claims()),
        signed(claims(), rsa_key(), algorithm="RS256", kid="rsa"),
        jwt.encode(claims(), SECRET, algorithm="HS512"),
        jwt.encode(claims(), SECRET + "x", algorithm="HS256"),
        forged({"alg": "none"}, claims()),
        forged({"alg": "HS256"}, claims(), public_pem()),
        jwt.encode(claims(role="service_role"), SECRET, algorithm="HS256"),
    ):
        assert (await refusal(by_secret, token)).code is ErrorCode.UNAUTHENTICATED


async def test_a_symmetric_or_short_key_in_the_published_list_counts_for_nothing(
    verifier: TokenVerifier, published: JwksServer
) -> None:
    secret = jwt.utils.base64url_encode(SECRET.encode()).decode()
    published.keys = [
        {"kty": "oct", "k": secret, "kid": "oct", "alg": "HS256"},
        {"kty": "oct", "k": secret, "kid": "ec"},
        jwk(rsa_key(1024), "short"),
        jwk(ec_key(), "encryption", use="enc"),
        {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA", "kid": "broken"},
        {"kty": "EC", "kid": ["ec"]},
        "text",  # type: ignore[list-item]
        jwk(ec_key(), "good"),
    ]
    assert (await verifier.verify(signed(claims(), kid="good"))).user_id == USER
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        short = signed(claims(), rsa_key(1024), algorithm="RS256", kid="short")
    for token in (
        signed(claims(), SECRET, algorithm="HS256", kid="oct"),
        signed(claims(), SECRET, algorithm="HS256", kid="ec"),
        short,
        signed(claims(), kid="encryption"),
    ):
        assert (await refusal(verifier, token)).code is ErrorCode.UNAUTHENTICATED


async def test_a_storm_of_unknown_keys_does_not_reach_the_issuer(
    verifier: TokenVerifier, published: JwksServer
) -> None:
    await verifier.verify(signed(claims()))
    assert published.asked == 1
    tokens = [signed(claims(), ec_key(1), kid=f"unknown-{number}") for number in range(200)]
    await asyncio.gather(*(refusal(verifier, token) for token in tokens))
    assert published.asked == 1
    await verifier.verify(signed(claims()))


async def test_many_first_requests_share_one_fetch(verifier: TokenVerifier, published: JwksServer) -> None:
    await asyncio.gather(*(verifier.verify(signed(claims())) for _ in range(50)))
    assert published.asked == 1


async def test_an_issuer_that_does_not_answer_is_no_fault_of_the_token(
    verifier: TokenVerifier, published: JwksServer
) -> None:
    published.status = 500
    errors = await asyncio.gather(*(refusal(verifier, signed(claims())) for _ in range(20)))
    assert {error.code for error in errors} == {ErrorCode.ISSUER_UNAVAILABLE}
    assert published.asked == 1


async def test_without_an_issuer_and_beside_a_database_of_ones_own_no_token_is_good(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, database_url="postgresql://u@h/d")
    async with open_token_verifier(settings) as none:
        for token in (signed(claims()), jwt.encode(claims(), SECRET, algorithm="HS256"), forged({"alg": "none"}, {})):
            assert (await refusal(none, token)).code is ErrorCode.UNAUTHENTICATED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"jwt_secret": SECRET}, "jwt_issuer"),
        ({"jwt_secret": "short", "jwt_issuer": ISSUER}, "32 bytes"),
        ({"jwt_secret": SECRET, "jwt_issuer": ISSUER, "jwt_jwks_url": "https://x.test/keys"}, "exclude"),
    ],
)
def test_settings_of_two_ways_or_of_none_stop_the_start(given: dict[str, str], named: str) -> None:
    with pytest.raises(PipelineError, match=named) as raised:
        load_settings(**given)
    assert raised.value.code is ErrorCode.SETTING_INVALID
    assert SECRET not in raised.value.message
