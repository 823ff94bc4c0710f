"""`detecting` -> `completed`: somebody looks for what the photo is to be looked at for, now or in their own time.

A model that calls back has taken the photo's message, or has not yet:

    nothing was sent since the job last failed   it is sent, under the same delivery id until there is an answer
    it was, and there is time left               Snooze; the callback ends the job by itself
    it was, and the time is over                 DETECT_TIMEOUT, so that it is sent again as the queue's retries come
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial

from upload_pipeline import ids
from upload_pipeline.database.photo_detections import DetectionTurn, await_detections, commit_detections, load_turn
from upload_pipeline.database.photos import Photo
from upload_pipeline.database.queue import ClaimedJob
from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.detection import AnswerLater, Detected, DetectionMessage, DetectionRequest
from upload_pipeline.storage.object_urls import object_url
from upload_pipeline.storage.signed_urls import Grant, open_signer
from upload_workers.detection_desk import DetectionDesk
from upload_workers.stages.photo_source import photo_of
from upload_workers.steps import Commit, Outcome, Snooze, StepContext

THUMBNAIL_LIMIT = 4 * 1024 * 1024
"""Most bytes of a thumbnail that a step holds in memory; 512 x 512 pixels are far fewer, whatever they show."""


async def photo_detect(job: ClaimedJob, context: StepContext) -> Outcome:
    """Asks, and stores what was found with the end of the job."""
    photo = await photo_of(job, context)
    desk = context.detector
    if desk is None:
        raise PipelineError(ErrorCode.INTERNAL, "This worker has nobody who looks at photos.")
    turn = await load_turn(context.db, job_id=job.job_id, photo_id=photo.photo_id)
    if desk.calls_back and turn.sent is not None and turn.sent.retry_count == job.retry_count:
        return _await_answer(turn.sent.left, turn.sent.attempt, desk)
    request = await _request(photo, turn, desk, context)
    answer = await desk.ask(job, request, waited=turn.waited)
    match answer:
        case Detected(detections):
            found = None if detections is None else [one.as_json() for one in detections]
            return Commit(partial(commit_detections, detector=desk.name, detections=found))
        case AnswerLater(seconds):
            verb = partial(
                await_detections,
                delivery_id=request.delivery_id,
                attempt=request.attempt,
                wait=timedelta(seconds=seconds),
            )
            return Commit(verb)
        case _:
            return Snooze(timedelta(seconds=answer.seconds))


def _await_answer(left: timedelta, attempt: int, desk: DetectionDesk) -> Snooze:
    if left > timedelta(0):
        return Snooze(left)
    raise PipelineError(
        ErrorCode.DETECT_TIMEOUT,
        f"The {desk.name} detector took the photo's message and did not call back in time. An answer that comes still "
        "is taken, also once the job has given up.",
        {"attempt": attempt},
    )


async def _request(photo: Photo, turn: DetectionTurn, desk: DetectionDesk, context: StepContext) -> DetectionRequest:
    sent = turn.sent

    async def thumbnail() -> bytes:
        if photo.thumbnail_key is None:
            message = f"Photo {photo.photo_id} has no thumbnail. Retry its job from stage uploaded."
            raise PipelineError(ErrorCode.OBJECT_MISSING, message)
        return await context.store.get_bytes(photo.thumbnail_key, THUMBNAIL_LIMIT)

    key = photo.shared_key or photo.raw_key
    message = DetectionMessage(
        photo.photo_id,
        object_url(context.settings.effective_storage_url, key),
        photo.detection_types,
        photo.priority,
    )
    return DetectionRequest(
        message,
        # Computed: where a message was taken and nobody could note it, it is the same one that is sent again.
        delivery_id=sent.delivery_id if sent else ids.delivery_id(photo.photo_id, turn.answered),
        attempt=sent.attempt + 1 if sent else 1,
        thumbnail=thumbnail,
        photo_url=await _photo_url(photo, key, context) if desk.calls_back else "",
    )


async def _photo_url(photo: Photo, key: str, context: StepContext) -> str:
    """A URL by which the model reads the photo for as long as it has to answer: the store's, or the service's."""
    life = timedelta(seconds=max(round(context.settings.detection_callback_seconds), 60))
    signed = await context.store.sign_get(
        key, filename=photo.file_name, media_type=photo.media_type, expires_in=min(life, timedelta(days=7))
    )
    if signed is not None:
        return signed.url
    grant = Grant(
        "GET",
        photo.photo_id,
        key,
        datetime.now(UTC) + life,
        media_type=photo.media_type,
        filename=photo.file_name,
    )
    token = open_signer(context.settings).sign(grant)
    return f"{context.settings.api_public_url.rstrip('/')}/api/v1/photos/{photo.photo_id}/bytes?token={token}"
