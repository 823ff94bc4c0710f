from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from photo_files import EXPOSURE_TAGS, IMAGE_TAGS, PLACE, exif_of, raw_exif
from PIL.ExifTags import GPS, Base

from upload_pipeline.providers.local.exif import BROKEN_EXIF, NO_EXIF, ExifFacts, read_exif
from upload_pipeline.providers.local.exif_block import exif_without_place

ASCII, SHORT, RATIONAL, UNDEFINED = 2, 3, 5, 7


def fields_of(block: bytes) -> dict[str, Any]:
    return read_exif(block).fields


def test_every_field_is_read_under_its_name() -> None:
    facts = read_exif(exif_of(place=PLACE))
    assert facts == ExifFacts(
        {
            "camera_make": "Maker",
            "camera_model": "Model 5",
            "software": "1.2",
            "lens_model": "Lens 4.25mm f/1.8",
            "focal_length_mm": 4.25,
            "focal_length_35mm": 26.0,
            "iso": 400,
            "exposure_time_s": 0.008,
            "f_number": 1.8,
            "captured_at": "2024-02-29T23:59:58.250-03:30",
            "orientation": 1,
            "flash": {"fired": True, "raw": 25},
            "gps": {"latitude": -33.856900000, "longitude": -70.650972222, "altitude_m": -12.5},
        },
        orientation=1,
        warnings=[],
    )


def test_a_photo_without_exif_gives_nothing_and_a_warning() -> None:
    for block in (None, b""):
        assert read_exif(block) == ExifFacts(warnings=[NO_EXIF])


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\x00\x00",
        b"Exif\x00\x00II",
        b"Exif\x00\x00not a header of TIFF",
        b"Exif\x00\x00MM\x00*\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08",
        exif_of()[:20],
    ],
)
def test_broken_exif_gives_nothing_and_a_warning(block: bytes) -> None:
    assert read_exif(block) == ExifFacts(warnings=[BROKEN_EXIF])


def test_what_stands_before_the_break_is_read() -> None:
    whole = exif_of(exposure={})
    fields = fields_of(whole[: whole.index(b"Model 5") + 8])
    assert (fields["camera_make"], fields["camera_model"]) == ("Maker", "Model 5")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"Canon\x00", "Canon"),
        (b"Canon\x00\x00hidden\x00", "Canon"),
        (b"  Canon\t \x00", "Canon"),
        ("Praktiflex Süd\x00".encode(), "Praktiflex Süd"),
        ("Süd\x00 ".encode("latin-1"), "Süd"),
        (b"a\x07b\x1b[31m\x00", "ab[31m"),
        (b"\xed\xa0\x80half\x00", "í\xa0half"),
        (b"x" * 5000 + b"\x00", "x" * 200),
        (b"\x00\x00\x00\x00", None),
        (b"      \x00", None),
    ],
)
def test_texts_are_cleaned(value: bytes, text: str | None) -> None:
    facts = read_exif(raw_exif([(Base.Make, ASCII, len(value), value), (Base.Orientation, SHORT, 1, b"\x00\x01")]))
    assert facts.fields.get("camera_make") == text
    assert facts.warnings == []


@pytest.mark.parametrize("number", [(1, 0), (0, 0), (0, 5)])
def test_numbers_that_are_none_are_left_out(number: tuple[int, int]) -> None:
    value = struct.pack(">LL", *number)
    facts = read_exif(
        raw_exif(
            [(Base.Make, ASCII, 4, b"Abc\x00")],
            [(Base.ExposureTime, RATIONAL, 1, value), (Base.FNumber, RATIONAL, 1, struct.pack(">LL", 28, 10))],
        )
    )
    assert facts.fields == {"camera_make": "Abc", "f_number": 2.8}
    assert [("exposure_time_s" in warning) for warning in facts.warnings] == ([] if number == (0, 5) else [True])


def test_nan_written_as_a_float_is_left_out() -> None:
    facts = read_exif(
        raw_exif([], [(Base.FNumber, 11, 1, struct.pack(">f", math.nan)), (Base.Flash, SHORT, 1, b"\x00\x00")])
    )
    assert facts.fields == {"flash": {"fired": False, "raw": 0}}
    assert "f_number" in facts.warnings[0]


@pytest.mark.parametrize(
    ("moment", "fraction", "offset", "expected"),
    [
        ("2024:02:29 12:00:00", None, None, "2024-02-29T12:00:00"),
        ("2024:02:29 12:00:00", None, "+05:45", "2024-02-29T12:00:00+05:45"),
        ("2024:02:29 12:00:00", "7", "-00:00", "2024-02-29T12:00:00.7-00:00"),
        ("2024:02:29 12:00:00", "  ", "   :  ", "2024-02-29T12:00:00"),
        ("2024:02:29 12:00:00", "a1", "+15:00", "2024-02-29T12:00:00"),
        ("2023:02:29 12:00:00", None, None, None),
        ("0000:00:00 00:00:00", None, None, None),
        ("2024-02-29 12:00:00", None, None, None),
    ],
)
def test_capture_times(moment: str, fraction: str | None, offset: str | None, expected: str | None) -> None:
    tags = {
        Base.DateTimeOriginal: moment,
        Base.SubsecTimeOriginal: fraction,
        Base.OffsetTimeOriginal: offset,
    }
    facts = read_exif(exif_of(exposure={tag: value for tag, value in tags.items() if value is not None}))
    assert facts.fields.get("captured_at") == expected
    assert bool(facts.warnings) is (expected is None)


def test_the_time_of_digitizing_stands_in_and_that_of_a_change_does_not() -> None:
    changed = {**IMAGE_TAGS, Base.DateTime: "2024:05:05 05:05:05"}
    assert "captured_at" not in fields_of(exif_of(changed, {}))
    digitized = {Base.DateTimeDigitized: "2020:01:01 00:00:00", Base.OffsetTimeDigitized: "+01:00"}
    assert fields_of(exif_of(changed, digitized))["captured_at"] == "2020-01-01T00:00:00+01:00"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_warned_of(value: int) -> None:
    facts = read_exif(exif_of({**IMAGE_TAGS, Base.Orientation: value}))
    assert (facts.orientation, "orientation" in facts.fields, len(facts.warnings)) == (1, False, 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({GPS.GPSLatitudeRef: "N", GPS.GPSLongitudeRef: "E"}, (33.8569, 70.650972222, -12.5)),
        ({GPS.GPSAltitudeRef: b"\x00"}, (-33.8569, -70.650972222, 12.5)),
        ({GPS.GPSAltitude: 0.0}, (-33.8569, -70.650972222, 0.0)),
        ({GPS.GPSAltitudeRef: b"\x03"}, (-33.8569, -70.650972222, -12.5)),
        ({GPS.GPSLatitude: (0.0, 0.0, 0.0), GPS.GPSLongitude: (0.0, 0.0, 0.0)}, (0.0, 0.0, -12.5)),
        ({GPS.GPSLatitude: (90.0, 0.0, 0.0)}, (-90.0, -70.650972222, -12.5)),
        ({GPS.GPSLatitude: (90.0, 0.0, 1.0)}, None),
        ({GPS.GPSLongitude: (180.0, 1.0, 0.0)}, None),
        ({GPS.GPSLatitudeRef: ""}, None),
        ({GPS.GPSLatitudeRef: "X"}, None),
        ({GPS.GPSLatitude: (33.0, 51.0)}, None),
    ],
)
def test_places(change: dict[int, Any], expected: tuple[float, float, float] | None) -> None:
    facts = read_exif(exif_of(place={**PLACE, **change}))
    gps = facts.fields.get("gps")
    assert (None if gps is None else tuple(gps.values())) == expected
    assert "-0.0" not in json.dumps(gps)
    assert bool(facts.warnings) is (expected is None)


def test_a_place_of_divisions_by_zero_is_left_out() -> None:
    zero = struct.pack(">LLLLLL", 0, 0, 0, 0, 0, 0)
    place = [
        (GPS.GPSLatitudeRef, ASCII, 2, b"N\x00"),
        (GPS.GPSLatitude, RATIONAL, 3, zero),
        (GPS.GPSLongitudeRef, ASCII, 2, b"E\x00"),
        (GPS.GPSLongitude, RATIONAL, 3, zero),
    ]
    facts = read_exif(raw_exif([(Base.Make, ASCII, 4, b"Abc\x00")], place=place))
    assert "gps" not in facts.fields
    assert len(facts.warnings) == 1


def test_a_directory_of_only_a_version_is_no_place_and_no_damage() -> None:
    assert read_exif(exif_of(place={GPS.GPSVersionID: b"\x02\x02\x00\x00"})).warnings == []


WHOLE = exif_of(place=PLACE)


@given(
    st.lists(st.tuples(st.integers(6, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, len(WHOLE)),
)
@example([(10, 0xFF)], 0)
def test_damage_anywhere_gives_what_json_and_postgres_can_hold(flips: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(WHOLE)
    for at, value in flips:
        damaged[at] = value
    for block in (bytes(damaged), bytes(damaged[:cut])):
        facts = read_exif(block)
        written = json.dumps(facts.fields, allow_nan=False)
        assert "\\u0000" not in written
        written.encode("utf-8")
        assert json.loads(written) == facts.fields
        assert all(warning.isprintable() for warning in facts.warnings)
        kept = exif_without_place(block[6:])
        if kept is not None:
            assert exif_without_place(kept) == kept
            assert "gps" not in fields_of(b"Exif\x00\x00" + kept)


@given(st.binary(max_size=300))
def test_any_bytes_are_read(content: bytes) -> None:
    json.dumps(read_exif(b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + content).fields, allow_nan=False)
    exif_without_place(b"MM\x00*\x00\x00\x00\x08" + content)


def test_what_is_kept_without_the_place_reads_as_before() -> None:
    kept = exif_without_place(WHOLE[6:])
    assert kept is not None
    before = read_exif(WHOLE)
    after = read_exif(b"Exif\x00\x00" + kept)
    del before.fields["gps"]
    assert after == before
    assert EXPOSURE_TAGS[Base.LensModel].encode() in kept
