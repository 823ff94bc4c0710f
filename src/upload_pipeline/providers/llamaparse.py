"""LlamaParse: files are uploaded, jobs are submitted and looked at, one request each, and each answer is checked.

The official client sends and reads; it never tries again by itself. A job that is made costs money, and there is no
key that would make a second request harmless: who submits looks by `find_submission` first, wherever an earlier call
may have made the job. What a failure asks for is said by its `Remedy`:

    Remedy   when                                               code
    AGAIN    no answer, a broken one, 408, 409, 5xx; the        PARSE_UNAVAILABLE
             uploaded file is gone (404)
    WAIT     429                                                PARSE_UNAVAILABLE
    PAUSE    no credits (402); key refused (401, 403); no       PARSE_QUOTA, PARSE_DENIED
             such list (404)
    NEVER    any other 4xx; the job failed, or is gone (404)    PARSE_REJECTED, PARSE_FAILED
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.llamaparse_results import (
    PROVIDER,
    FinishedParse,
    ParseError,
    Remedy,
    finished_parse,
    parse_failed,
)
from upload_pipeline.rate_headers import read_rate_limits

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

BASE_URL = "https://api.cloud.llamaindex.ai"
"""Of the region us-east-1; the EU's is https://api.cloud.eu.llamaindex.ai. A key belongs to one of them."""

TIER_VERSIONS: Mapping[str, str] = {
    "fast": "2026-06-15",
    "cost_effective": "2026-09-28",
    "agentic": "2026-10-16",
    "agentic_plus": "2026-09-28",
}
"""The tiers, and the version of each that is asked for where no other is named (`GET /api/v2/parse/versions`)."""

PAGE_CREDITS: Mapping[str, int] = {"fast": 1, "cost_effective": 3, "agentic": 10, "agentic_plus": 45}
"""What a page costs by each tier."""

WEBHOOK_PATH = "/api/v2/webhooks/llamaparse"
"""Where the HTTP service is told of jobs."""

WEBHOOK_EVENTS = ("parse.success", "parse.partial_success", "parse.error", "parse.cancelled")
"""What ends a job."""

Turn = Callable[[str, float], AbstractAsyncContextManager[None]]
"""Entered around each request with its operation (`find`, `upload`, `list`, `submit`, `poll`) and the seconds that it
may take: waits for the budget, and sees the `ParseError`."""

_MESSAGE_CHARS = 300
_SLOWEST_UPLOAD = 250_000  # bytes in a second; what is slower is taken to hang
_LISTED_AT_ONCE = 100
_MOST_CREDITS = 10**9  # of one job; what says more is no count
_FILE_LIFE_LEFT = timedelta(minutes=10)  # that a file found there must have, to be submitted in time


class LlamaParse:
    """The files and parse API, by one key, tier and version."""

    def __init__(
        self,
        *,
        api_key: str,
        tier: str,
        version: str,
        base_url: str = BASE_URL,
        timeout: float = 60.0,
        webhook_url: str = "",
        webhook_secret: str = "",
        turn: Turn = lambda operation, seconds: nullcontext(),
    ) -> None:
        """Connects to nothing yet.

        Args:
            api_key: of the account that pays.
            tier: as the API names it: `fast`, `cost_effective`, `agentic` or `agentic_plus`.
            version: of the tier, a date; `latest` would change what the same bytes give.
            base_url: of the API, without a path.
            timeout: seconds that a request may take; an upload may take longer, by its size.
            webhook_url: is told of the end of each job that is made; empty: nobody is.
            webhook_secret: signs what it is told.
            turn: what each request waits for.

        Raises:
            PipelineError: `SETTING_INVALID`, naming what is wrong or the missing package.
        """
        if find_spec("llama_cloud") is None:
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                "LlamaParse needs the package llama-cloud, which is not installed: install the extra "
                '"llamaparse", as in `pip install "upload-pipeline[llamaparse]"`.',
                {"extra": "llamaparse"},
            )
        api_key = api_key.strip()
        if not (api_key and api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise PipelineError(ErrorCode.SETTING_INVALID, "LlamaParse needs the key of an account; this is none.")
        import llama_cloud

        self.api_key = api_key
        self.tier = tier
        self.tier_version = version
        self.timeout = timeout
        self.turn = turn
        self._webhook: dict[str, Any] | None = None
        if webhook_url:
            self._webhook = {
                "webhook_url": webhook_url,
                "webhook_events": list(WEBHOOK_EVENTS),
                "webhook_output_format": "json",
                "webhook_signing_secret": webhook_secret,
            }
        self._client: Any = llama_cloud.AsyncLlamaCloud(
            api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0
        )
        # The client loads its parts when they are first named, for seconds: not in the time of a request.
        _ = self._client.files, self._client.parsing

    @property
    def told(self) -> bool:
        """Whether somebody is told of the end of jobs."""
        return self._webhook is not None

    async def find_file(self, external_id: str) -> str | None:
        """The id of a file that was uploaded under our id, or None.

        Raises:
            ParseError: `PARSE_UNAVAILABLE`, `PARSE_QUOTA`, `PARSE_DENIED` or `PARSE_REJECTED`.
        """
        soon = datetime.now(UTC) + _FILE_LIFE_LEFT
        async with self._request("find", "look for the file"):
            found = await self._client.files.list(external_file_id=external_id, page_size=_LISTED_AT_ONCE)
            for file in found.items:
                # a server that does not know the filter lists everything
                if file.external_file_id == external_id and (file.expires_at is None or _utc(file.expires_at) > soon):
                    return _text(file.id)
        return None

    async def upload(self, path: Path, *, name: str, media_type: str, external_id: str) -> str:
        """Uploads a file under our id; its id. Each call makes another file, which costs nothing.

        Args:
            path: a local copy, which is only read.
            name: with the ending that tells the format.
            media_type: what the file is.
            external_id: the same for the same bytes, and for no others.

        Raises:
            ParseError: as `find_file`.
        """
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        seconds = self.timeout + size / _SLOWEST_UPLOAD
        file = await asyncio.to_thread(path.open, "rb")
        try:
            async with self._request("upload", "upload the file", seconds):
                made = await self._client.files.create(
                    file=(name, file, media_type), purpose="parse", external_file_id=external_id, timeout=seconds
                )
                return _text(made.id)
        finally:
            file.close()

    async def find_submission(self, submission: str, *, since: datetime, before: datetime) -> str | None:
        """The id of the job that was made for a submission, or None.

        A job that was cancelled is not found. Where there are several, the one that is listed last counts.

        Args:
            submission: as given to `submit`.
            since: jobs made before it are not looked at.
            before: nor those made after this.

        Raises:
            ParseError: as `find_file`.
        """
        found: str | None = None
        token: str | None = None
        while True:
            following = {} if token is None else {"page_token": token}
            async with self._request("list", "look for the job"):
                page = await self._client.parsing.list(
                    created_at_on_or_after=since,
                    created_at_on_or_before=before,
                    page_size=_LISTED_AT_ONCE,
                    **following,
                )
                for job in page.items:
                    if (job.user_metadata or {}).get("submission") == submission and job.status != "CANCELLED":
                        found = _text(job.id)
                token = page.next_page_token
            if not token:
                return found

    async def submit(
        self,
        file_id: str,
        *,
        document: str,
        submission: str,
        announce: Callable[[float], Awaitable[None]] | None = None,
    ) -> str:
        """Makes a job; its id. Each call makes another one, which costs again.

        After a failure that is not `NEVER`, `WAIT` or `PAUSE` it is open whether the job was made.

        Args:
            file_id: of `upload`.
            document: names the document, for people.
            submission: names the job, for `find_submission`.
            announce: told, at the last moment before the request is sent, in how many seconds from then it will be
                over. What it raises is raised, and nothing is sent.

        Raises:
            ParseError: as `find_file`.
        """
        webhook = {} if self._webhook is None else {"webhook_configurations": [self._webhook]}
        async with self.turn("submit", self.timeout):
            deadline = asyncio.get_running_loop().time() + self.timeout
            if announce is not None:
                await announce(self.timeout)
            async with self._told("submit", "submit the file", deadline):
                job = await self._client.parsing.create(
                    file_id=file_id,
                    tier=self.tier,
                    version=self.tier_version,
                    user_metadata={"document": document, "submission": submission},
                    **webhook,
                )
                # flat by the client's types; one guide of LlamaParse shows it within `job`
                within = getattr(job, "job", None)
                return _text(within.get("id") if isinstance(within, dict) else job.id)

    async def look(self, parse_id: str) -> FinishedParse | None:
        """What a job brought; None while it is at work.

        Raises:
            ParseError: as `find_file`, and `PARSE_FAILED` where the job failed, was cancelled, or is no longer kept.
        """
        try:
            return await self._look(parse_id)
        except ParseError as error:
            if error.gone:
                # Or is it another server's address? Then this fails, and the job is not taken for lost and paid again.
                async with self._request("list", "look for any job"):
                    await self._client.parsing.list(page_size=1)
            raise

    async def _look(self, parse_id: str) -> FinishedParse | None:
        async with self._request("poll", "look at the job", gone=parse_id):
            answer = await self._client.parsing.get(parse_id, expand=["markdown", "usage"])
            status = _text(answer.job.status)
            if status in ("PENDING", "RUNNING"):
                return None
            if status == "COMPLETED":
                pages = [
                    (int(page.page_number), page.markdown if page.success else None) for page in answer.markdown.pages
                ]
                return finished_parse(pages, _credits(answer.job.usage))
            if status not in ("FAILED", "CANCELLED"):
                raise ValueError(f"no status {status!r} is known")
            said = str(answer.job.error_message or "it gives no reason")[:_MESSAGE_CHARS]
            failed = parse_failed(parse_id, f"ended as {status}: {said}", status=status)
            failed.credits = _credits(answer.job.usage)
            raise failed

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    @asynccontextmanager
    async def _request(
        self, operation: str, purpose: str, seconds: float | None = None, gone: str | None = None
    ) -> AsyncIterator[None]:
        """A request in its turn."""
        limit = seconds or self.timeout
        async with (
            self.turn(operation, limit),
            self._told(operation, purpose, asyncio.get_running_loop().time() + limit, gone),
        ):
            yield

    @asynccontextmanager
    async def _told(
        self, operation: str, purpose: str, deadline: float, gone: str | None = None
    ) -> AsyncIterator[None]:
        """Tells every failure of what runs in the context as a `ParseError`. The deadline is by the loop's clock."""
        import llama_cloud

        limit = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout_at(deadline):
                # A deadline that is over before anything was sent is noticed here.
                await asyncio.sleep(0)
                yield
        except PipelineError:
            raise
        except llama_cloud.APIStatusError as error:
            raise self._refused(error, operation, purpose, gone) from error
        except (llama_cloud.APIConnectionError, TimeoutError) as error:
            late = isinstance(error, llama_cloud.APITimeoutError | TimeoutError)
            what = f"did not answer within {limit:.3g} s" if late else "cannot be reached, or closed the connection"
            raise ParseError(
                ErrorCode.PARSE_UNAVAILABLE, f"LlamaParse at {self._client.base_url} {what}, asked to {purpose}."
            ) from error
        except (llama_cloud.LlamaCloudError, AttributeError, TypeError, ValueError) as error:
            raise ParseError(
                ErrorCode.PARSE_UNAVAILABLE,
                f"LlamaParse, asked to {purpose}, gave an answer that cannot be read: {str(error)[:_MESSAGE_CHARS]}.",
            ) from error

    def _refused(self, error: Any, operation: str, purpose: str, gone: str | None) -> ParseError:
        """What a status that is no success means."""
        status: int = error.status_code
        said = str(error.message).replace(self.api_key, "***")[:_MESSAGE_CHARS]
        wait = read_rate_limits(error.response.headers).retry_after
        details = {"status": status}
        if status == 402:
            return ParseError(
                ErrorCode.PARSE_QUOTA,
                f"The account of the LlamaParse key has no credits left ({status}). Look at its plan and billing.",
                details,
                remedy=Remedy.PAUSE,
                retry_after=wait,
            )
        if status in (401, 403):
            # the provider's own words may name parts of the key
            return ParseError(
                ErrorCode.PARSE_DENIED,
                f"LlamaParse refuses the key ({status}). Look at whether it is valid, and of this region.",
                details,
                remedy=Remedy.PAUSE,
            )
        if status == 404 and operation in ("find", "list"):
            # a list that has nothing is empty: there is none at this address
            return ParseError(
                ErrorCode.PARSE_DENIED,
                f"What answers at {self._client.base_url} is not LlamaParse ({status}). Look at "
                "UPLOAD_PIPELINE_LLAMAPARSE_BASE_URL.",
                details,
                remedy=Remedy.PAUSE,
            )
        # 404 at the submission: the file's time was over, and it is uploaded anew
        if status == 429 or status >= 500 or status in (408, 409) or (status == 404 and operation == "submit"):
            remedy = Remedy.WAIT if status == 429 else Remedy.AGAIN
            message = f"LlamaParse, asked to {purpose}, answers {status}: {said}"
            return ParseError(ErrorCode.PARSE_UNAVAILABLE, message, details, remedy=remedy, retry_after=wait)
        if status == 404 and gone is not None:
            failed = parse_failed(gone, "is no longer kept by LlamaParse", status=status)
            failed.gone = True
            return failed
        return ParseError(
            ErrorCode.PARSE_REJECTED,
            f"LlamaParse, asked to {purpose}, refuses ({status}): {said}",
            details,
            remedy=Remedy.NEVER,
        )


def open_llamaparse(settings: Settings) -> LlamaParse | None:
    """The client that the settings describe; None where they name neither the parser nor a key.

    A worker whose parser is another one by now needs it too, to go on with what was submitted before.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the setting or the missing package.
    """
    key = settings.llamaparse_api_key.get_secret_value()
    if settings.parser != PROVIDER and not key:
        return None
    if not key:
        raise PipelineError(
            ErrorCode.SETTING_INVALID,
            "UPLOAD_PIPELINE_PARSER=llamaparse needs the key of the account that pays: set "
            "UPLOAD_PIPELINE_LLAMAPARSE_API_KEY.",
            {"setting": "llamaparse_api_key"},
        )
    secret = settings.llamaparse_webhook_secret.get_secret_value()
    public = settings.api_public_url.rstrip("/")
    return LlamaParse(
        api_key=key,
        tier=settings.llamaparse_tier,
        version=settings.llamaparse_version or TIER_VERSIONS[settings.llamaparse_tier],
        base_url=settings.llamaparse_base_url,
        timeout=settings.llamaparse_timeout,
        webhook_url=public + WEBHOOK_PATH if public and secret else "",
        webhook_secret=secret,
    )


def _credits(usage: Any) -> float | None:
    """What a job says that it cost; what is no such number counts as not told, and does not lose the result."""
    told = getattr(usage, "credits", None)
    if isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told < _MOST_CREDITS:
        return told
    return None


def _utc(told: datetime) -> datetime:
    """A time that the API tells, which need not name its zone."""
    return told if told.tzinfo else told.replace(tzinfo=UTC)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} stands where a name was to be")
    return value
