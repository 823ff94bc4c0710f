"""Photos as the members of their organisation see them: announced, looked at, said to be there, let go of."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import APIRouter, Path, Query, Request

from upload_pipeline.api.cursors import decode_cursor, encode_cursor
from upload_pipeline.api.error_bodies import documented_errors
from upload_pipeline.api.photo_bodies import (
    PHOTO,
    Photo,
    PhotoPage,
    PhotoStatusRequest,
    PhotoSummary,
    PhotoUpload,
    PhotoUploadRequest,
)
from upload_pipeline.api.photo_urls import photo_url, sign_photo_target, thumbnail_url
from upload_pipeline.api.principals import CurrentPrincipal
from upload_pipeline.api.public_urls import public_url
from upload_pipeline.api.request_context import CorrelationId
from upload_pipeline.api.resources import AppResources, Resources
from upload_pipeline.database import member_photos
from upload_pipeline.database.as_user import as_user
from upload_pipeline.database.member_photos import MemberPhoto
from upload_pipeline.database.photo_deletion import delete_photo
from upload_pipeline.database.photos import DeletedPhoto
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake import photos as intake
from upload_pipeline.intake.photos import PhotoTerms, may_not, no_such_photo, no_such_project
from upload_pipeline.stages import PhotoStatus
from upload_pipeline.storage.object_urls import object_url
from upload_pipeline.storage.photo_objects import remove_photo_objects

router = APIRouter(prefix="/api/v1/photos", tags=["photos"])

MAX_PAGE = 100

PhotoId = Annotated[UUID, Path(description="Of a photo of an organisation that you are in.", examples=[PHOTO])]


@router.post(
    "/upload-url",
    summary="Announce a photo, and get a URL to send it to",
    responses=documented_errors(400, 401, 403, 404, 413, 415, 429, 507),
)
async def create_photo_upload(
    request: Request,
    wanted: PhotoUploadRequest,
    principal: CurrentPrincipal,
    resources: AppResources,
    correlation_id: CorrelationId,
) -> PhotoUpload:
    """JPEG or PNG, told by name and type, and once it has come by its content. Each call makes another photo.

    The URL is for a quarter of an hour, and for that type and length. What never comes is forgotten after a while.
    """
    settings = resources.settings
    announced = intake.check_announcement(
        project_id=wanted.project_id,
        file_name=wanted.file_name,
        media_type=wanted.mime_type,
        file_bytes=wanted.file_size,
        detection_types=wanted.detection_types,
        priority=wanted.priority,
        terms=PhotoTerms(settings.min_photo_bytes, settings.max_photo_bytes, settings.detection_types),
    )
    await _require_project(resources, principal.user_id, announced.project_id)
    photo_id = uuid4()
    raw_key = intake.new_photo_key(announced, photo_id)
    # before there is a row: what the store refuses leaves nothing
    target = await intake.with_store(
        lambda: sign_photo_target(request, resources, principal, announced, photo_id=photo_id, raw_key=raw_key)
    )
    reserved = await intake.reserve_photo(
        resources.intake,
        announced,
        photo_id=photo_id,
        raw_key=raw_key,
        user_id=principal.user_id,
        window=timedelta(seconds=settings.upload_url_seconds + settings.upload_finish_seconds),
        correlation_id=correlation_id,
    )
    return PhotoUpload(
        upload_id=reserved.job_id,
        photo_id=photo_id,
        upload_url=target.url,
        s3_url=object_url(settings.effective_storage_url, raw_key),
        expires_in_seconds=target.seconds,
        headers=target.headers,
        status_url=public_url(request, settings, f"{router.prefix}/{photo_id}"),
    )


@router.get("", summary="Your organisations' photos, newest first", responses=documented_errors(400, 401, 404, 429))
async def list_photos(
    request: Request,
    principal: CurrentPrincipal,
    resources: AppResources,
    project_id: Annotated[UUID | None, Query(description="Only photos of this project.")] = None,
    status: Annotated[PhotoStatus | None, Query(description="Only photos of this status.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most photos of the page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
) -> PhotoPage:
    """Page by page: pass `next_cursor` as `cursor` until it is null. Photos that come meanwhile shift no page."""
    before = decode_cursor(cursor) if cursor is not None else None
    async with as_user(resources.db, principal.user_id, by_index=True) as connection:
        if project_id is not None and not await member_photos.has_project(connection, project_id):
            raise no_such_project(project_id)
        # One more than asked for tells whether there are more.
        found = await member_photos.list_photos(
            connection, project_id=project_id, status=status, limit=limit + 1, before=before
        )
    page = found[:limit]
    more = encode_cursor(page[-1].created_at, page[-1].photo_id) if len(found) > limit else None
    return PhotoPage(items=[await _summary(request, resources, photo) for photo in page], next_cursor=more)


@router.get("/{photo_id}", summary="A photo", responses=documented_errors(400, 401, 404, 429))
async def read_photo(
    request: Request, photo_id: PhotoId, principal: CurrentPrincipal, resources: AppResources
) -> Photo:
    """What is known of it, and how it came to its status."""
    return await _whole(request, resources, await _seen_photo(resources, principal.user_id, photo_id))


@router.patch(
    "/{photo_id}/status",
    summary="Say that a photo's bytes are there",
    responses=documented_errors(400, 401, 403, 404, 409, 429),
)
async def change_photo_status(
    request: Request,
    photo_id: PhotoId,
    wanted: PhotoStatusRequest,
    principal: CurrentPrincipal,
    resources: AppResources,
) -> Photo:
    """`uploaded` has its job look at them now rather than at its next look. Saying it twice is saying it once.

    409 `OBJECT_MISSING` while the bytes are not there, and nothing changes. 409 `INVALID_STATE`, with the status that
    there is, for any status that the photo cannot be given: the others are for the service to reach.
    """
    photo = await _seen_photo(resources, principal.user_id, photo_id)
    if photo.role == "viewer":
        raise may_not("say that photos are there")
    if (
        wanted.status is PhotoStatus.UPLOADED
        and photo.uploaded_at is None
        and await resources.store.head(photo.raw_key) is None
    ):
        raise PipelineError(
            ErrorCode.OBJECT_MISSING,
            f"The bytes of {photo.file_name!r} are not there. Send them to the upload_url, or announce the photo again "
            "for another one.",
            {"photo_id": str(photo_id), "status": photo.status},
        )
    try:
        await intake.announce_status(resources.intake, photo_id=photo_id, status=wanted.status)
    except PipelineError as error:
        if error.code is ErrorCode.INVALID_STATE:
            now = await _seen_photo(resources, principal.user_id, photo_id)
            raise _forbidden_jump(now, wanted.status) from error
        raise
    return await _whole(request, resources, await _seen_photo(resources, principal.user_id, photo_id))


@router.delete(
    "/{photo_id}",
    summary="Delete a photo",
    status_code=204,
    responses=documented_errors(400, 401, 403, 404, 429),
)
async def remove_photo(
    photo_id: PhotoId, principal: CurrentPrincipal, resources: AppResources, correlation_id: CorrelationId
) -> None:
    """Its bytes, its thumbnail, what is known of it, its job; a job at work is stopped. There is no way back.

    Your own, or anybody's as an owner or admin. Safe to repeat: what was begun and broke off (503) is ended by the next
    call, or else by the workers within some minutes, and nothing shows the photo meanwhile. Once it is gone: 404.
    """
    async with as_user(resources.db, principal.user_id) as connection:
        photo = await member_photos.find_photo(connection, photo_id)
    if photo is None:
        if not await member_photos.is_being_deleted(resources.db, photo_id, principal.user_id):
            raise no_such_photo(photo_id)
    elif photo.role not in ("owner", "admin") and (photo.role != "member" or photo.user_id != principal.user_id):
        raise may_not("delete this photo")

    async def remove_objects(deleted: DeletedPhoto) -> None:
        await remove_photo_objects(resources.store, deleted.raw_key)

    await delete_photo(resources.db, photo_id, remove_objects, correlation_id=correlation_id)


async def _require_project(resources: Resources, user_id: UUID, project_id: UUID) -> None:
    async with as_user(resources.db, user_id) as connection:
        if not await member_photos.has_project(connection, project_id):
            raise no_such_project(project_id)


async def _seen_photo(resources: Resources, user_id: UUID, photo_id: UUID) -> MemberPhoto:
    async with as_user(resources.db, user_id) as connection:
        photo = await member_photos.find_photo(connection, photo_id)
    if photo is None:
        raise no_such_photo(photo_id)
    return photo


def _forbidden_jump(photo: MemberPhoto, wanted: PhotoStatus) -> PipelineError:
    advice = (
        "Retry its job, or delete it and announce it again."
        if photo.status == PhotoStatus.FAILED
        else f"Only {PhotoStatus.UPLOADED!r} can be said of a photo, while it is {PhotoStatus.PENDING_UPLOAD!r}."
    )
    return PipelineError(
        ErrorCode.INVALID_STATE,
        f"Photo {photo.photo_id} is {photo.status!r} and cannot be said to be {wanted!r}. {advice}",
        {"photo_id": str(photo.photo_id), "status": photo.status, "wanted": wanted, "job_id": str(photo.job_id)},
    )


async def _summary(request: Request, resources: Resources, photo: MemberPhoto) -> PhotoSummary:
    return PhotoSummary.model_validate(
        {
            "id": photo.photo_id,
            "project_id": photo.project_id,
            "s3_url": object_url(resources.settings.effective_storage_url, photo.shared_key or photo.raw_key),
            "thumbnail_url": await thumbnail_url(request, resources, photo),
            "status": photo.status,
            "file_name": photo.file_name,
            "mime_type": photo.media_type,
            "file_size": photo.file_bytes,
            "width": photo.width,
            "height": photo.height,
            "error": photo.error,
            "created_at": photo.created_at,
            "uploaded_at": photo.uploaded_at,
        }
    )


async def _whole(request: Request, resources: Resources, photo: MemberPhoto) -> Photo:
    summary = await _summary(request, resources, photo)
    return Photo.model_validate(
        {
            **summary.model_dump(),
            "job_id": photo.job_id,
            "download_url": await photo_url(request, resources, photo),
            "exif_data": photo.exif,
            "warnings": photo.warnings,
            "detection_types": photo.detection_types,
            "priority": photo.priority,
            "detections": photo.detections,
            "detector": photo.detector,
            "status_history": photo.history,
        }
    )
