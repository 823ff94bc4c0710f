"""Detection by a team's own model: each photo's message is sent to one URL, and the answer comes by a callback.

    POST <DETECTION_URL>
    Content-Type: application/json
    X-Upload-Pipeline-Signature: t=…,v1=…            over the body; see `signed_messages`
    X-Upload-Pipeline-Delivery: <uuid>               the same for each delivery of this message
    X-Upload-Pipeline-Attempt: 1                     which delivery this is; one that was not taken is not counted
    X-Upload-Pipeline-Callback: https://…            where the signed answer goes
    X-Upload-Pipeline-Photo: https://…               reads the photo for a while, where the store can sign

    {"photo_id":"…","s3_url":"…","detection_types":["damage"],"priority":"normal"}

Any 2xx means that the message was taken. The URL is an operator's, and no redirect from it is followed. What a failure
asks for:

    no answer, a redirect, 408, 409, 5xx       AGAIN   DETECT_UNAVAILABLE
    429                                        WAIT    DETECT_UNAVAILABLE
    401, 403, 404, 405                         PAUSE   DETECT_DENIED: the URL or the secret is not right
    any other 4xx                              SPLIT   DETECT_REJECTED: this photo
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import aiohttp

from upload_pipeline.errors import ErrorCode
from upload_pipeline.providers.detection import AnswerLater, DetectionError, DetectionRequest
from upload_pipeline.providers.provider_failures import MESSAGE_CHARS, Remedy, bad_setting, lower_names
from upload_pipeline.signed_messages import SIGNATURE_HEADER, sign

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

PROVIDER = "webhook"

DELIVERY_HEADER = "X-Upload-Pipeline-Delivery"
ATTEMPT_HEADER = "X-Upload-Pipeline-Attempt"
CALLBACK_HEADER = "X-Upload-Pipeline-Callback"
PHOTO_HEADER = "X-Upload-Pipeline-Photo"


class WebhookDetector:
    """Implements `Detector`; to be used by the tasks of one event loop.

    Attributes:
        url: where messages go.
        secret: what they are signed with.
    """

    name = PROVIDER

    def __init__(
        self,
        *,
        url: str,
        secret: str,
        public_url: str,
        timeout: float = 60.0,
        callback_seconds: float = 600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: where messages go.
            secret: what they are signed with, 32 bytes or more.
            public_url: of this service, as the model reaches it.
            timeout: seconds that a message may take to be taken.
            callback_seconds: in which the answer has to come.
            clock: seconds since 1970.

        Raises:
            PipelineError: `SETTING_INVALID`, naming the setting.
        """
        for name, value, why in (
            ("detection_url", url, "is sent each photo's message"),
            ("detection_secret", secret, "signs the messages and the callbacks"),
            ("api_public_url", public_url, "is where the model calls back"),
        ):
            if not value:
                raise bad_setting(name, f"is empty; UPLOAD_PIPELINE_DETECTOR=webhook needs it: it {why}")
        self.url = url
        self.secret = secret
        self._public_url = public_url.rstrip("/")
        self._timeout = timeout
        self._callback_seconds = callback_seconds
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def detect(self, request: DetectionRequest) -> AnswerLater:
        """Sends the message once.

        Raises:
            DetectionError: as the module says.
        """
        body = request.message.body()
        headers = {
            "Content-Type": "application/json",
            SIGNATURE_HEADER: sign(body, self.secret, at=self._clock()),
            DELIVERY_HEADER: str(request.delivery_id),
            ATTEMPT_HEADER: str(request.attempt),
            CALLBACK_HEADER: f"{self._public_url}/api/v1/photos/{request.message.photo_id}/detections",
        }
        if request.photo_url:
            headers[PHOTO_HEADER] = request.photo_url
        session = self._session = self._session or aiohttp.ClientSession()
        try:
            async with session.post(
                self.url,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=self._timeout),
            ) as answer:
                if 200 <= answer.status < 300:
                    return AnswerLater(self._callback_seconds)
                said = (await answer.content.read(MESSAGE_CHARS)).decode("utf-8", "replace")
                raise _refused(answer.status, dict(answer.headers), said)
        except TimeoutError as error:
            raise _unavailable(f"did not answer within {self._timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise _unavailable(f"cannot be reached: {type(error).__name__}") from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


def open_webhook_detector(settings: Settings) -> WebhookDetector:
    """The detector that the settings describe.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the setting.
    """
    return WebhookDetector(
        url=settings.detection_url,
        secret=settings.detection_secret.get_secret_value(),
        public_url=settings.api_public_url,
        timeout=settings.detection_timeout,
        callback_seconds=settings.detection_callback_seconds,
    )


def _unavailable(what: str) -> DetectionError:
    return DetectionError(ErrorCode.DETECT_UNAVAILABLE, f"The detector at UPLOAD_PIPELINE_DETECTION_URL {what}.")


def _refused(status: int, headers: dict[str, str], said: str) -> DetectionError:
    def failed(code: ErrorCode, message: str, remedy: Remedy) -> DetectionError:
        return DetectionError(
            code, message, {"status": status}, remedy=remedy, headers=lower_names(headers), answered=True
        )

    if status in (401, 403, 404, 405):
        return failed(
            ErrorCode.DETECT_DENIED,
            f"The detector does not take messages ({status}). Look at UPLOAD_PIPELINE_DETECTION_URL and "
            f"_DETECTION_SECRET: {said}",
            Remedy.PAUSE,
        )
    if status == 429:
        return failed(ErrorCode.DETECT_UNAVAILABLE, "The detector takes no more messages for now (429).", Remedy.WAIT)
    if status < 400 or status >= 500 or status in (408, 409):
        redirect = " Redirects are not followed: name the final URL." if status < 400 else ""
        return failed(ErrorCode.DETECT_UNAVAILABLE, f"The detector answers {status}: {said}{redirect}", Remedy.AGAIN)
    return failed(ErrorCode.DETECT_REJECTED, f"The detector refuses the photo ({status}): {said}", Remedy.SPLIT)
