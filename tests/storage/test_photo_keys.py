from __future__ import annotations

from datetime import date
from uuid import UUID

import pytest

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage import keys, photo_keys
from upload_pipeline.storage.photo_keys import PhotoObject

PROJECT = UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
PHOTO = UUID("0e5b1a3c-52f1-4c4e-9d0a-2f5f5f3c7b11")
DAY = date(2026, 3, 9)
STEM = f"{PROJECT}/2026/03/09/{PHOTO}"


@pytest.mark.parametrize(("media_type", "extension"), [("image/jpeg", "jpg"), ("image/png", "png")])
def test_a_photos_keys_are_as_agreed_and_parse_back(media_type, extension):
    raw = photo_keys.photo_key(PROJECT, DAY, PHOTO, media_type)
    assert photo_keys.photo_keys(raw) == (
        f"{STEM}.{extension}",
        f"{STEM}.thumbnail.jpg",
        f"{STEM}.shared.{extension}",
    )
    for key, kind in zip(photo_keys.photo_keys(raw), PhotoObject, strict=True):
        assert keys.validate_key(key) == key
        assert photo_keys.parse_photo_key(key) == (kind, PROJECT, PHOTO)
        # and is no document's
        assert keys.parse_key(key) is None
        assert not keys.is_incoming_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        STEM,
        f"{STEM}.jpeg",
        f"{STEM}.JPG",
        f"{STEM}.gif",
        f"{STEM}.thumbnail.png",
        f"{STEM}.thumbnail.shared.jpg",
        f"{STEM}.jpg/x",
        f"{STEM}.jpg\n",
        f"x/{STEM}.jpg",
        f"/{STEM}.jpg",
        f"{PROJECT}/2026/13/09/{PHOTO}.jpg",
        f"{PROJECT}/2026/02/30/{PHOTO}.jpg",
        f"{PROJECT}/0000/01/01/{PHOTO}.jpg",
        f"{PROJECT}/٢٠٢٦/03/09/{PHOTO}.jpg",
        f"{PROJECT.hex}/2026/03/09/{PHOTO}.jpg",
        f"{str(PROJECT).upper()}/2026/03/09/{PHOTO}.jpg",
        f"raw/{PROJECT}/{PHOTO}",
    ],
)
def test_a_key_that_was_not_made_for_a_photo_parses_to_nothing(key):
    assert photo_keys.parse_photo_key(key) is None


@pytest.mark.parametrize("key", [f"{STEM}.thumbnail.jpg", f"{STEM}.shared.jpg", f"raw/{PROJECT}/{PHOTO}", "../x.jpg"])
def test_other_keys_are_made_of_a_raw_one_only(key):
    for make in (photo_keys.thumbnail_key, photo_keys.shared_key, photo_keys.photo_keys):
        with pytest.raises(PipelineError) as refused:
            make(key)
        assert refused.value.code is ErrorCode.INVALID_KEY


def test_a_type_that_no_photo_has_gets_no_key():
    with pytest.raises(KeyError):
        photo_keys.photo_key(PROJECT, DAY, PHOTO, "image/gif")
