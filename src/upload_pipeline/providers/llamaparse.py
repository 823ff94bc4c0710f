"""LlamaParse: files are uploaded, jobs are submitted and looked at, one request each, and each answer is checked.

The official client sends and reads; it never tries again by itself. A job that is made costs money, and there is no
key that would make a second request harmless: `submit` therefore first looks for the job among those that exist.
What a failure asks for is said by its `Remedy`:

    Remedy   when                                               code
    AGAIN    no answer, a broken one, 408, 409, 5xx             PARSE_UNAVAILABLE
    WAIT     429                                                PARSE_UNAVAILABLE
    PAUSE    no credits (402); key refused (401, 403)           PARSE_QUOTA, PARSE_DENIED
    NEVER    any other 4xx; the job failed, or is gone (404)    PARSE_REJECTED, PARSE_FAILED
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers.parsing import ParsedMarkdown
from upload_pipeline.rate_headers import read_rate_limits

PROVIDER = "llamaparse"

BASE_URL = "https://api.cloud.llamaindex.ai"
"""Of the region us-east-1; the EU's is https://api.cloud.eu.llamaindex.ai. A key belongs to one of them."""

_MESSAGE_CHARS = 300
_SLOWEST_UPLOAD = 250_000  # bytes in a second; what is slower is taken to hang
_LISTED_AT_ONCE = 100


class Remedy(StrEnum):
    """What helps against a failure."""

    AGAIN = "again"
    WAIT = "wait"
    PAUSE = "pause"
    NEVER = "never"


@dataclass
class ParseError(PipelineError):
    """A request that brought nothing, or a job that did.

    Attributes:
        remedy: what to do.
        retry_after: seconds in which nothing more is to be sent; None where the provider told nothing.
    """

    remedy: Remedy = Remedy.AGAIN
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class FinishedParse:
    """What a job brought.

    Attributes:
        parsed: the pages; one that failed is empty, so that the others keep their numbers.
        failed_pages: their numbers, from 1.
        credits: what the job cost; None where it was not told.
    """

    parsed: ParsedMarkdown
    failed_pages: tuple[int, ...]
    credits: float | None


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
        failed_pages: Literal["warn", "fail"] = "warn",
    ) -> None:
        """Connects to nothing yet.

        Args:
            api_key: of the account that pays.
            tier: as the API names it: `fast`, `cost_effective`, `agentic` or `agentic_plus`.
            version: of the tier, a date; `latest` would change what the same bytes give.
            base_url: of the API, without a path.
            timeout: seconds that a request may take; an upload may take longer, by its size.
            failed_pages: whether a file some of whose pages failed is taken with a warning, or fails.

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
        self._timeout = timeout
        self._failed_pages = failed_pages
        self._client: Any = llama_cloud.AsyncLlamaCloud(
            api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0
        )

    @property
    def version(self) -> str:
        """Changes whenever the same bytes may give another result."""
        return f"{PROVIDER}@{self.tier}/{self.tier_version}"

    async def find_file(self, external_id: str) -> str | None:
        """The id of a file that was uploaded under our id, or None.

        Raises:
            ParseError: `PARSE_UNAVAILABLE`, `PARSE_QUOTA`, `PARSE_DENIED` or `PARSE_REJECTED`.
        """
        async with self._request("look for the file"):
            found = await self._client.files.list(external_file_id=external_id, page_size=_LISTED_AT_ONCE)
            # a server that does not know the filter lists everything
            return next((str(file.id) for file in found.items if file.external_file_id == external_id), None)

    async def upload(self, path: Path, *, name: str, media_type: str, external_id: str) -> str:
        """Uploads a file under our id, unless it is there; its id.

        Args:
            path: a local copy, which is only read.
            name: with the ending that tells the format.
            media_type: what the file is.
            external_id: the same for the same bytes, and for no others.

        Raises:
            ParseError: as `find_file`.
        """
        found = await self.find_file(external_id)
        if found is not None:
            return found
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        seconds = self._timeout + size / _SLOWEST_UPLOAD
        file = await asyncio.to_thread(path.open, "rb")
        try:
            async with self._request("upload the file", seconds):
                made = await self._client.files.create(
                    file=(name, file, media_type), purpose="parse", external_file_id=external_id, timeout=seconds
                )
                return _text(made.id)
        finally:
            file.close()

    async def find_submission(self, *, document: str, attempt: int, since: datetime) -> str | None:
        """The id of the job that was made for an attempt at a document, or None.

        A job that was cancelled is not found. Where there are several, the one that is listed last counts.

        Args:
            document: as given to `submit`.
            attempt: as given to `submit`.
            since: jobs made before it are not looked at.

        Raises:
            ParseError: as `find_file`.
        """
        wanted = {"document": document, "attempt": str(attempt)}
        found: str | None = None
        token: str | None = None
        while True:
            following = {} if token is None else {"page_token": token}
            async with self._request("look for the job"):
                page = await self._client.parsing.list(
                    created_at_on_or_after=since, page_size=_LISTED_AT_ONCE, **following
                )
                for job in page.items:
                    if wanted.items() <= (job.user_metadata or {}).items() and job.status != "CANCELLED":
                        found = _text(job.id)
                token = page.next_page_token
            if not token:
                return found

    async def submit(self, file_id: str, *, document: str, attempt: int, since: datetime) -> str:
        """Makes the job for an attempt at a document, unless there is one already; its id.

        After a failure that leaves open whether the job was made, the same call finds it.

        Args:
            file_id: of `upload`.
            document: names the document; with `attempt` it names the job.
            attempt: another number asks for another job, which costs again.
            since: a moment before the first such call.

        Raises:
            ParseError: as `find_file`.
        """
        made = await self.find_submission(document=document, attempt=attempt, since=since)
        if made is not None:
            return made
        async with self._request("submit the file"):
            job = await self._client.parsing.create(
                file_id=file_id,
                tier=self.tier,
                version=self.tier_version,
                user_metadata={"document": document, "attempt": str(attempt)},
            )
            return _text(job.id)

    async def look(self, parse_id: str) -> FinishedParse | None:
        """What a job brought; None while it is at work.

        Raises:
            ParseError: as `find_file`, and `PARSE_FAILED` where the job failed, was cancelled, is no longer kept, or
                has failed pages that are not to be taken.
        """
        async with self._request("look at the job", gone=parse_id):
            answer = await self._client.parsing.get(parse_id, expand=["markdown"])
            status = _text(answer.job.status)
            if status in ("PENDING", "RUNNING"):
                return None
            if status == "COMPLETED":
                pages = [
                    (int(page.page_number), page.markdown if page.success else None) for page in answer.markdown.pages
                ]
                usage = answer.job.usage
                return self._finished(parse_id, pages, None if usage is None else usage.credits)
            if status not in ("FAILED", "CANCELLED"):
                raise ValueError(f"no status {status!r} is known")
            said = str(answer.job.error_message or "it gives no reason")[:_MESSAGE_CHARS]
            raise self._failed(parse_id, f"ended as {status}: {said}", status=status)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _finished(
        self, parse_id: str, pages: list[tuple[int, str | None]], credits_paid: float | None
    ) -> FinishedParse:
        texts = dict(pages)
        numbers = range(1, max(texts, default=0) + 1)
        if len(texts) != len(pages) or min(texts, default=1) < 1 or len(numbers) > 2 * len(texts):
            raise ValueError("its pages are numbered twice, or not from 1")
        # a page that was not sent at all failed too
        failed = tuple(number for number in numbers if texts.get(number) is None)
        if len(failed) == len(numbers):
            raise self._failed(parse_id, "brought no page", failed_pages=list(failed))
        warnings: tuple[str, ...] = ()
        if failed:
            told = f"LlamaParse could not read {_pages(failed)} of {len(numbers)}."
            if self._failed_pages == "fail":
                raise self._failed(parse_id, f"is incomplete: {told}", failed_pages=list(failed))
            warnings = (told,)
        markdown = "\f".join((texts.get(number) or "").replace("\f", "\n") for number in numbers)
        return FinishedParse(ParsedMarkdown(markdown, len(numbers), warnings), failed, credits_paid)

    @asynccontextmanager
    async def _request(
        self, purpose: str, seconds: float | None = None, gone: str | None = None
    ) -> AsyncIterator[None]:
        """Tells every failure of what runs in the context as a `ParseError`."""
        import llama_cloud

        limit = seconds or self._timeout
        try:
            async with asyncio.timeout(limit):
                yield
        except PipelineError:
            raise
        except llama_cloud.APIStatusError as error:
            raise self._refused(error, purpose, gone) from error
        except (llama_cloud.APIConnectionError, TimeoutError) as error:
            late = isinstance(error, llama_cloud.APITimeoutError | TimeoutError)
            what = f"did not answer within {limit:g} s" if late else "cannot be reached, or closed the connection"
            raise ParseError(
                ErrorCode.PARSE_UNAVAILABLE, f"LlamaParse at {self._client.base_url} {what}, asked to {purpose}."
            ) from error
        except (llama_cloud.LlamaCloudError, AttributeError, TypeError, ValueError) as error:
            raise ParseError(
                ErrorCode.PARSE_UNAVAILABLE,
                f"LlamaParse, asked to {purpose}, gave an answer that cannot be read: {str(error)[:_MESSAGE_CHARS]}.",
            ) from error

    def _refused(self, error: Any, purpose: str, gone: str | None) -> ParseError:
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
        if status == 429 or status >= 500 or status in (408, 409):
            remedy = Remedy.WAIT if status == 429 else Remedy.AGAIN
            message = f"LlamaParse, asked to {purpose}, answers {status}: {said}"
            return ParseError(ErrorCode.PARSE_UNAVAILABLE, message, details, remedy=remedy, retry_after=wait)
        if status == 404 and gone is not None:
            return self._failed(gone, "is no longer kept by LlamaParse", status=status)
        return ParseError(
            ErrorCode.PARSE_REJECTED,
            f"LlamaParse, asked to {purpose}, refuses ({status}): {said}",
            details,
            remedy=Remedy.NEVER,
        )

    def _failed(self, parse_id: str, what: str, **details: Any) -> ParseError:
        message = f"The LlamaParse job {parse_id} {what}"
        return ParseError(
            ErrorCode.PARSE_FAILED,
            message if message.endswith(".") else message + ".",
            {"parse_id": parse_id, **details},
            remedy=Remedy.NEVER,
        )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} stands where a name was to be")
    return value


def _pages(numbers: Iterable[int]) -> str:
    """As a person writes them: `page 3`, `pages 2, 5 to 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"page {told}" if len(runs) == len(runs[0]) == 1 else f"pages {told}"
