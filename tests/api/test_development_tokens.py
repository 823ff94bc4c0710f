from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from issuer import ISSUER, USER, claims, signed

from upload_pipeline.api.development_tokens import SECRET_FILE, development_secret, development_token, is_exposed
from upload_pipeline.api.tokens import open_token_verifier
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings


async def test_a_token_of_a_home_is_good_there_and_nowhere_else(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "one")
    token = development_token(settings, USER, roles=["ADMIN"])
    async with open_token_verifier(settings) as verifier:
        known = await verifier.verify(token)
        assert (known.user_id, known.roles) == (USER, frozenset({"ADMIN"}))
        with pytest.raises(PipelineError):
            await verifier.verify(signed(claims()))
    async with open_token_verifier(load_settings(home=tmp_path / "two")) as verifier:
        with pytest.raises(PipelineError):
            await verifier.verify(token)
    secret = development_secret(tmp_path / "one").decode()
    # even a secret that was taken over into the settings signs for another issuer
    real = load_settings(home=tmp_path / "one", jwt_issuer=ISSUER, jwt_secret=secret)
    async with open_token_verifier(real) as verifier:
        with pytest.raises(PipelineError, match="iss"):
            await verifier.verify(token)


async def test_a_token_ends_with_its_lifetime(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    async with open_token_verifier(settings) as verifier:
        with pytest.raises(PipelineError, match="expired"):
            await verifier.verify(development_token(settings, USER, lifetime=-60))


def test_the_secret_is_made_once_by_whoever_comes_first_and_is_its_owners_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        secrets = set(threads.map(development_secret, [tmp_path / "home"] * 64))
    assert len(secrets) == 1
    (file,) = (tmp_path / "home").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert development_secret(tmp_path / "home") in secrets


@pytest.mark.parametrize(("mode", "content"), [(0o644, b"x" * 64), (0o620, b"x" * 64), (0o600, b""), (0o600, b"short")])
def test_a_secret_that_is_none_stops_the_start(tmp_path: Path, mode: int, content: bytes) -> None:
    path = tmp_path / SECRET_FILE
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(PipelineError, match=r"Remove it") as raised:
        development_secret(tmp_path)
    assert raised.value.code is ErrorCode.SETTING_INVALID


def test_a_home_that_cannot_be_made_is_a_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=SECRET_FILE) as raised:
        development_secret(tmp_path / "file" / "home")
    assert raised.value.code is ErrorCode.SETTING_INVALID


@pytest.mark.parametrize("given", [{"database_url": "postgresql://u@h/d"}, {"jwt_issuer": ISSUER}])
def test_where_somebody_else_signs_there_are_no_tokens_for_development(tmp_path: Path, given: dict[str, str]) -> None:
    settings = load_settings(home=tmp_path, **given)
    with pytest.raises(PipelineError, match="keys create"):
        development_token(settings, USER)
    assert not list(tmp_path.iterdir())
    assert not is_exposed(load_settings(home=tmp_path, api_host="::", **given))


@pytest.mark.parametrize(
    ("host", "exposed"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),  # noqa: S104 - what is to be told apart
        ("::", True),
        ("192.168.1.5", True),
        ("api.example.com", True),
    ],
)
def test_an_address_that_others_reach_is_told_from_one_that_they_do_not(host: str, exposed: bool) -> None:
    assert is_exposed(load_settings(api_host=host)) is exposed
