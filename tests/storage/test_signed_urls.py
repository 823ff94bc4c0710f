from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings
from upload_pipeline.storage.keys import raw_key
from upload_pipeline.storage.signed_urls import MAX_TOKEN_CHARS, SECRET_FILE, Grant, UrlSigner, open_signer

NOW = datetime(2030, 5, 1, 12, 0, 0, tzinfo=UTC)
SIGNER = UrlSigner(b"a secret of these tests, long enough")
DOCUMENT = UUID("6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11")
PUT = Grant(
    "PUT",
    DOCUMENT,
    raw_key(UUID(int=7), DOCUMENT),
    NOW + timedelta(minutes=15),
    file_bytes=1234,
    media_type="application/pdf",
    file_sha256="ab" * 32,
)

grants = st.builds(
    Grant,
    method=st.sampled_from(["PUT", "GET"]),
    document_id=st.uuids(),
    key=st.builds(raw_key, st.uuids(), st.uuids()),
    expires_at=st.integers(1, 100_000).map(lambda seconds: NOW + timedelta(seconds=seconds)),
    file_bytes=st.none() | st.integers(0, 2**62),
    media_type=st.none() | st.just("text/plain"),
    file_sha256=st.none() | st.just("0f" * 32),
    filename=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=255),
)


def refusal(token: str, *, method: str = "PUT", now: datetime = NOW, signer: UrlSigner = SIGNER) -> ErrorCode:
    with pytest.raises(PipelineError) as raised:
        signer.verify(token, method=method, now=now)
    return raised.value.code


@given(grants)
def test_what_was_granted_comes_back_whole(grant: Grant) -> None:
    token = SIGNER.sign(grant)
    assert SIGNER.verify(token, method=grant.method, now=NOW) == grant
    assert len(token) <= MAX_TOKEN_CHARS
    assert not set(token) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@given(grants, st.data())
def test_any_changed_character_is_refused(grant: Grant, data: st.DataObject) -> None:
    token = SIGNER.sign(grant)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters().filter(lambda character: character != token[at]))
    assert refusal(token[:at] + other + token[at + 1 :], method=grant.method) is ErrorCode.SIGNED_URL_INVALID


def test_each_character_changed_by_one_bit_is_refused() -> None:
    # The last one of a base64 text has bits that decode to nothing: they count as the others do.
    token = SIGNER.sign(PUT)
    for at, character in enumerate(token):
        for bit in range(7):
            changed = token[:at] + chr(ord(character) ^ 1 << bit) + token[at + 1 :]
            assert refusal(changed) is ErrorCode.SIGNED_URL_INVALID


@given(st.text(max_size=200))
def test_what_is_no_token_is_refused(token: str) -> None:
    assert refusal(token) is ErrorCode.SIGNED_URL_INVALID


def test_cut_and_prolonged_tokens_are_refused() -> None:
    token = SIGNER.sign(PUT)
    for other in ("", ".", token[:-1], token[1:], token + "A", token + "=", token + ".", "." + token, token + "\ud800"):
        assert refusal(other) is ErrorCode.SIGNED_URL_INVALID
    assert refusal(token + "A" * MAX_TOKEN_CHARS) is ErrorCode.SIGNED_URL_INVALID


def test_parts_of_two_good_tokens_make_no_third() -> None:
    one, other = SIGNER.sign(PUT), SIGNER.sign(Grant("PUT", uuid4(), PUT.key, PUT.expires_at))
    assert refusal(f"{one.partition('.')[0]}.{other.partition('.')[2]}") is ErrorCode.SIGNED_URL_INVALID


def test_a_token_is_for_one_method() -> None:
    token = SIGNER.sign(PUT)
    for method in ("GET", "POST", "DELETE", "put", ""):
        assert refusal(token, method=method) is ErrorCode.SIGNED_URL_INVALID


def test_a_token_ends_at_its_moment() -> None:
    token = SIGNER.sign(PUT)
    last = PUT.expires_at - timedelta(microseconds=1)
    assert SIGNER.verify(token, method="PUT", now=last) == PUT
    assert refusal(token, now=PUT.expires_at) is ErrorCode.SIGNED_URL_EXPIRED
    assert refusal(token, now=PUT.expires_at + timedelta(days=9)) is ErrorCode.SIGNED_URL_EXPIRED
    # a changed token is not told that it would have been too late
    assert refusal(token[:-1] + "-", now=PUT.expires_at) is ErrorCode.SIGNED_URL_INVALID


def test_another_secret_signs_other_tokens() -> None:
    assert refusal(SIGNER.sign(PUT), signer=UrlSigner(b"another secret of these tests, as long")) is (
        ErrorCode.SIGNED_URL_INVALID
    )
    assert "secret" not in repr(SIGNER)


def test_a_key_that_leads_elsewhere_is_not_signed() -> None:
    with pytest.raises(PipelineError) as raised:
        SIGNER.sign(Grant("GET", DOCUMENT, "raw/../signing-secret", PUT.expires_at))
    assert raised.value.code is ErrorCode.INVALID_KEY


def test_processes_of_one_home_take_each_others_tokens_and_others_do_not(tmp_path: Path) -> None:
    one, same = (open_signer(load_settings(home=tmp_path / "one")) for _ in range(2))
    assert same.verify(one.sign(PUT), method="PUT", now=NOW) == PUT
    assert stat.S_IMODE((tmp_path / "one" / SECRET_FILE).stat().st_mode) == 0o600
    assert refusal(one.sign(PUT), signer=open_signer(load_settings(home=tmp_path / "two"))) is (
        ErrorCode.SIGNED_URL_INVALID
    )


def test_processes_on_several_machines_share_a_secret_by_the_setting(tmp_path: Path) -> None:
    secret = "the same on all machines, 32 bytes or more"
    one, other = (open_signer(load_settings(home=tmp_path / name, signing_secret=secret)) for name in ("one", "other"))
    assert other.verify(one.sign(PUT), method="PUT", now=NOW) == PUT
    assert not list(tmp_path.iterdir())


def test_a_secret_that_is_too_short_stops_the_start() -> None:
    with pytest.raises(PipelineError, match="32 bytes") as raised:
        load_settings(signing_secret="x" * 31)
    assert raised.value.code is ErrorCode.SETTING_INVALID
    assert "xxx" not in str(raised.value)
