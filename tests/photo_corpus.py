"""The photos of the corpus, where it is there, and what exiftool reads off a photo, where it is installed."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

EXIFTOOL = shutil.which("exiftool")
CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"


def corpus_photos() -> list[dict[str, str]]:
    manifest = CORPUS / "MANIFEST.csv"
    if not manifest.is_file():
        return []
    with manifest.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if Path(row["path"]).suffix in (".jpg", ".png")]


def by_exiftool(path: Path) -> dict[str, Any]:
    """What exiftool reads, under our names; its numbers are not rounded."""
    found = json.loads(
        subprocess.run([EXIFTOOL or "", "-j", "-n", "-G0", str(path)], capture_output=True, check=True).stdout
    )[0]
    exif = {name.removeprefix("EXIF:"): value for name, value in found.items() if name.startswith("EXIF:")}
    fields: dict[str, Any] = {
        name: exif[tag]
        for name, tag in {
            "camera_make": "Make",
            "camera_model": "Model",
            "software": "Software",
            "lens_model": "LensModel",
            "focal_length_mm": "FocalLength",
            "focal_length_35mm": "FocalLengthIn35mmFormat",
            "iso": "ISO",
            "exposure_time_s": "ExposureTime",
            "f_number": "FNumber",
            "orientation": "Orientation",
        }.items()
        if tag in exif
    }
    if "Flash" in exif:
        fields["flash"] = {"fired": bool(exif["Flash"] & 1), "raw": exif["Flash"]}
    moment = exif.get("DateTimeOriginal", exif.get("CreateDate"))
    if moment:
        fraction = f".{exif['SubSecTimeOriginal']}" if "SubSecTimeOriginal" in exif else ""
        date, _, clock = moment.partition(" ")
        fields["captured_at"] = f"{date.replace(':', '-')}T{clock}{fraction}{exif.get('OffsetTimeOriginal', '')}"
    if "Composite:GPSLatitude" in found:
        fields["gps"] = {"latitude": found["Composite:GPSLatitude"], "longitude": found["Composite:GPSLongitude"]}
        if "Composite:GPSAltitude" in found:
            fields["gps"]["altitude_m"] = found["Composite:GPSAltitude"]
    if fields:
        size = [found["File:ImageWidth"], found["File:ImageHeight"]] if "File:ImageWidth" in found else []
        fields["width"], fields["height"] = size[::-1] if fields.get("orientation", 1) > 4 else size
    return fields
