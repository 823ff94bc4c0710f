"""Bodies of the routes of photos."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from upload_pipeline.errors import ErrorCode
from upload_pipeline.stages import PhotoStatus

PHOTO = "0d5f9f5e-3f0b-4c8e-9a6b-1f2f7c1d2e3a"
PROJECT = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
_JOB = "6f1d6a3e-3b1c-4a53-9f44-9d3d0a2c7a11"
_S3_URL = f"s3://claims-photos/{PROJECT}/2026/11/21/{PHOTO}.jpg"

_SUMMARY: dict[str, Any] = {
    "id": PHOTO,
    "project_id": PROJECT,
    "s3_url": _S3_URL,
    "thumbnail_url": f"https://api.example.com/api/v1/photos/{PHOTO}/bytes?token=eyJtIjoi…",
    "status": "completed",
    "file_name": "roof.jpg",
    "mime_type": "image/jpeg",
    "file_size": 2483112,
    "width": 4032,
    "height": 3024,
    "error": None,
    "created_at": "2026-11-21T09:00:00.000000Z",
    "uploaded_at": "2026-11-21T09:00:07.500000Z",
}

PHOTO_EXAMPLE: dict[str, Any] = {
    **_SUMMARY,
    "job_id": _JOB,
    "download_url": f"https://api.example.com/api/v1/photos/{PHOTO}/bytes?token=eyJtIjoi…",
    "exif_data": {
        "camera_make": "Canon",
        "camera_model": "EOS R6",
        "captured_at": "2026-11-20T15:04:05+01:00",
        "orientation": 1,
        "gps": {"latitude": 47.3769, "longitude": 8.5417, "altitude_m": 408.0},
        "exposure_time_s": 0.008,
        "iso": 400,
    },
    "warnings": [],
    "detection_types": ["damage"],
    "priority": "normal",
    "detections": None,
    "detector": "none",
    "status_history": [
        {"status": "pending_upload", "at": "2026-11-21T09:00:00.000000Z"},
        {"status": "uploaded", "at": "2026-11-21T09:00:07.500000Z"},
        {"status": "processing", "at": "2026-11-21T09:00:07.900000Z"},
        {"status": "completed", "at": "2026-11-21T09:00:08.400000Z"},
    ],
}


class PhotoUploadRequest(BaseModel):
    """A photo that is announced; its bytes are sent afterwards, to the URL of the answer."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "project_id": PROJECT,
                    "file_name": "roof.jpg",
                    "file_size": 2483112,
                    "mime_type": "image/jpeg",
                    "detection_types": ["damage"],
                    "priority": "normal",
                }
            ]
        },
    )

    project_id: UUID = Field(description="Of a project of an organisation that you are in.")
    file_name: str = Field(min_length=1, max_length=1000, description="For people; ends in .jpg, .jpeg or .png.")
    file_size: int = Field(ge=1, le=2**53, description="The exact size in bytes: 1 KB to 50 MB.")
    mime_type: str = Field(
        min_length=1, max_length=200, description="`image/jpeg` or `image/png`, as the name says; the bytes decide."
    )
    detection_types: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field(
        default_factory=list, max_length=20, description="What is to be looked for: `damage`, `material`."
    )
    priority: Literal["low", "normal", "high"] = Field(
        default="normal", description="Which of your own photos is first, where several wait."
    )


class PhotoUpload(BaseModel):
    """Where a photo's bytes are sent, by one PUT."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "upload_id": _JOB,
                    "photo_id": PHOTO,
                    "upload_url": f"https://api.example.com/api/v1/photos/{PHOTO}/bytes?token=eyJtIjoi…",
                    "s3_url": _S3_URL,
                    "expires_in_seconds": 900,
                    "headers": {"Content-Type": "image/jpeg"},
                    "status_url": f"https://api.example.com/api/v1/photos/{PHOTO}",
                }
            ]
        }
    )

    upload_id: UUID = Field(description="Of this upload: the id of the job that waits for the bytes.")
    photo_id: UUID
    upload_url: str = Field(description="A permission to send just these bytes; it belongs in no log.")
    s3_url: str = Field(description="What the photo's object is called in its store; not a permission.")
    expires_in_seconds: int = Field(description="The PUT must begin before.")
    headers: dict[str, str] = Field(description="Headers that the PUT must have.")
    status_url: str = Field(description="Where the photo tells how far it is.")


class PhotoError(BaseModel):
    """Why a photo has failed."""

    model_config = ConfigDict(from_attributes=True)

    code: ErrorCode | str = Field(description="Of the closed list of error codes.")
    message: str = Field(description="For a person: what is wrong and what to do.")
    details: dict[str, Any] = Field(description="Facts for a machine.")


class PhotoStatusChange(BaseModel):
    """What a photo's status became, and when."""

    model_config = ConfigDict(from_attributes=True)

    status: PhotoStatus
    at: datetime


class PhotoSummary(BaseModel):
    """A photo as a list shows it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_SUMMARY]})

    id: UUID
    project_id: UUID
    s3_url: str = Field(description="What its object is called in its store; not a permission.")
    thumbnail_url: str | None = Field(description="A small JPEG of it, for some minutes; null before there is one.")
    status: PhotoStatus
    file_name: str
    mime_type: str
    file_size: int = Field(description="In bytes.")
    width: int | None = Field(description="In pixels, as displayed; null before it was looked at.")
    height: int | None
    error: PhotoError | None = Field(description="Why it has failed; null where it has not.")
    created_at: datetime = Field(description="When it was announced.")
    uploaded_at: datetime | None = Field(description="When its bytes were seen first.")


class Photo(PhotoSummary):
    """A photo with all that is known of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [PHOTO_EXAMPLE]})

    job_id: UUID | None = Field(description="Its job, for who has uploaded it.")
    download_url: str | None = Field(
        description="Its bytes, for some minutes; without the place where it was taken, where its project has it so. "
        "Null before it was looked at."
    )
    exif_data: dict[str, Any] = Field(description="What its EXIF says; `{}` where it has none that can be read.")
    warnings: list[str] = Field(description="What is odd about it and was no reason to refuse it.")
    detection_types: list[str]
    priority: Literal["low", "normal", "high"]
    detections: Any = Field(description="What was found in it; null where nothing was looked for, or not yet.")
    detector: str | None = Field(description="Who has looked; null before anybody has.")
    status_history: list[PhotoStatusChange] = Field(description="Oldest first.")


class PhotoPage(BaseModel):
    """Photos, newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [_SUMMARY], "next_cursor": None}]})

    items: list[PhotoSummary]
    next_cursor: str | None = Field(description="The parameter `cursor` of the next page; null at the end.")


class PhotoStatusRequest(BaseModel):
    """What a photo's status is now."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"status": "uploaded"}]})

    status: PhotoStatus = Field(description="`uploaded`: the bytes are there. The others are for the service to reach.")
