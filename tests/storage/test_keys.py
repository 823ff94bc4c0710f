from __future__ import annotations

from functools import partial
from hashlib import sha256
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage import keys

USER = UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
DOCUMENT = UUID("0e5b1a3c-52f1-5c4e-9d0a-2f5f5f3c7b11")
SHA256 = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (keys.raw_key, keys.ObjectKind.RAW, f"raw/{USER}/{DOCUMENT}"),
        (keys.parser_output_key, keys.ObjectKind.PARSER_OUTPUT, f"parsed/{USER}/{DOCUMENT}.raw.md"),
        (
            partial(keys.hosted_output_key, parse_id="pjb-1/é"),
            keys.ObjectKind.PARSER_OUTPUT,
            f"parsed/{USER}/{DOCUMENT}/{sha256('pjb-1/é'.encode()).hexdigest()}.raw.md",
        ),
        (
            partial(keys.markdown_key, sha256=SHA256),
            keys.ObjectKind.MARKDOWN,
            f"parsed/{USER}/{DOCUMENT}/{SHA256}.md",
        ),
    ],
)
def test_a_document_key_is_as_agreed_and_parses_back(make, kind, text):
    assert make(USER, DOCUMENT) == text
    assert keys.validate_key(text) == text
    assert keys.parse_key(text) == (kind, USER, DOCUMENT)
    assert not keys.is_incoming_key(text)


def test_an_incoming_key_is_valid_and_belongs_to_no_document():
    key = keys.incoming_key(DOCUMENT)
    assert keys.validate_key(key) == f"incoming/{DOCUMENT}"
    assert keys.is_incoming_key(key)
    assert keys.parse_key(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        "raw",
        f"raw/{USER}",
        f"raw/{USER}/{DOCUMENT}.md",
        f"raw/{USER}/{DOCUMENT}/x",
        f"parsed/{USER}/{DOCUMENT}",
        f"parsed/{USER}/{DOCUMENT}.md",
        f"parsed/{USER}/{DOCUMENT}.txt",
        f"parsed/{USER}/{DOCUMENT}/{SHA256}",
        f"parsed/{USER}/{DOCUMENT}/{SHA256[:63]}.md",
        f"parsed/{USER}/{DOCUMENT}/{SHA256.upper()}.md",
        f"parsed/{USER}/{DOCUMENT}.raw.md/{SHA256}.md",
        f"raw/{str(USER).upper()}/{DOCUMENT}",
        f"raw/{USER.hex}/{DOCUMENT}",
        f"raw/{{{USER}}}/{DOCUMENT}",
        f"backup/{USER}/{DOCUMENT}",
        f"/raw/{USER}/{DOCUMENT}",
    ],
)
def test_a_key_that_was_not_made_for_a_document_parses_to_nothing(key):
    assert keys.parse_key(key) is None


@pytest.mark.parametrize("key", ["incoming", "incoming/x", f"incoming/{DOCUMENT.hex}", f"incoming/{DOCUMENT}/x"])
def test_a_key_that_incoming_key_does_not_make_is_not_incoming(key):
    assert not keys.is_incoming_key(key)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("raw/../../etc/passwd", "'..'"),
        ("..", "'..'"),
        ("raw/./x", "'.'"),
        ("raw//x", "empty part"),
        ("raw/x/", "empty part"),
        ("raw/\0x", "NUL"),
        ("raw/a\nb", "control"),
        ("raw/a\x7fb", "control"),
        ("raw\\x", "backslash"),
        ("raw/é", "ASCII"),
        ("raw/\u202egnp.exe", "ASCII"),
        ("raw/\ud800", "ASCII"),
        ("raw/．．/x", "ASCII"),
        ("raw/.unfinished", "'.unfinished'"),
        (".unfinished/x", "'.unfinished'"),
        ("raw/a b", "'a b'"),
        ("raw/x#1", "'x#1'"),
        ("raw/%2e%2e", "'%2e%2e'"),
        ("raw/C:x", "'C:x'"),
        ("a/" * 511 + "abc", "1025 bytes"),
        ("raw/" + "x" * 256, "256 bytes"),
    ],
)
def test_a_key_that_could_lead_elsewhere_or_mean_two_things_is_refused(key, reason):
    with pytest.raises(PipelineError) as caught:
        keys.validate_key(key)
    assert caught.value.code is ErrorCode.INVALID_KEY
    assert reason in caught.value.message
    assert caught.value.message.isprintable()
    assert not keys.is_valid_key(key)


@pytest.mark.parametrize("key", ["a/" * 510 + "abcd", "x" * 255, "a", "0/9_-.A"])
def test_a_key_at_the_limits_is_accepted(key):
    assert keys.validate_key(key) == key


@given(st.text(alphabet="aZ0._-/\\ é\n", max_size=12))
def test_a_key_that_is_accepted_stays_below_any_root(key):
    if keys.is_valid_key(key):
        parts = key.split("/")
        assert all(part and not part.startswith(".") and part.isascii() for part in parts)


def test_a_raw_key_names_whose_upload_its_document_is():
    assert keys.uploader_of(keys.raw_key(USER, DOCUMENT)) == USER


@pytest.mark.parametrize("key", ["", "raw/x", f"parsed/{USER}/{DOCUMENT}.md", f"incoming/{DOCUMENT}"])
def test_another_key_names_nobody(key):
    with pytest.raises(PipelineError) as caught:
        keys.uploader_of(key)
    assert caught.value.code is ErrorCode.INVALID_KEY
