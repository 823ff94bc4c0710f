"""What LlamaParse's jobs bring: pages, the failed ones among them, and errors that say what helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from upload_pipeline.errors import ErrorCode, PipelineError

PROVIDER = "llamaparse"


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
        credits: what a job that failed cost nevertheless; None where that was not told.
        gone: of a job that is no longer kept: what it brought and cost is not known.
    """

    remedy: Remedy = Remedy.AGAIN
    retry_after: float | None = None
    credits: float | None = None
    gone: bool = False


@dataclass(frozen=True, slots=True)
class FinishedParse:
    """What a job brought.

    Attributes:
        markdown: the pages, separated by U+000C; one that failed is empty, so that the others keep their numbers.
        page_count: how many they are.
        failed_pages: their numbers, from 1.
        credits: what the job cost; None where it was not told.
    """

    markdown: str
    page_count: int
    failed_pages: tuple[int, ...]
    credits: float | None


def parse_failed(parse_id: str, what: str, **details: Any) -> ParseError:
    """The error of a job that brought nothing that is taken."""
    message = f"The LlamaParse job {parse_id} {what}"
    return ParseError(
        ErrorCode.PARSE_FAILED,
        message if message.endswith(".") else message + ".",
        {"parse_id": parse_id, **details},
        remedy=Remedy.NEVER,
    )


def warnings_of(
    parse_id: str, *, page_count: int, failed_pages: Sequence[int], taken: Literal["warn", "fail"]
) -> tuple[str, ...]:
    """What a person should know of the failed pages of a job.

    Args:
        taken: whether a file some of whose pages failed is taken with a warning, or fails.

    Raises:
        ParseError: `PARSE_FAILED` where no page is good, or not all are and that is asked for.
    """
    if len(failed_pages) == page_count:
        raise parse_failed(parse_id, "brought no page", failed_pages=list(failed_pages))
    if not failed_pages:
        return ()
    told = f"LlamaParse could not read {_pages(failed_pages)} of {page_count}."
    if taken == "fail":
        remedy = "A retry with UPLOAD_PIPELINE_LLAMAPARSE_FAILED_PAGES=warn takes the others, and costs nothing."
        raise parse_failed(parse_id, f"is incomplete: {told} {remedy}", failed_pages=list(failed_pages))
    return (told,)


def finished_parse(pages: list[tuple[int, str | None]], credits_paid: float | None) -> FinishedParse:
    """The result of a job from its pages: (number, Markdown), None in the place of one that failed.

    Raises:
        ValueError: they are not numbered as pages are.
    """
    texts = dict(pages)
    numbers = range(1, max(texts, default=0) + 1)
    if len(texts) != len(pages) or min(texts, default=1) < 1 or len(numbers) > 2 * len(texts):
        raise ValueError("its pages are numbered twice, or not from 1")
    # a page that was not sent at all failed too
    failed = tuple(number for number in numbers if texts.get(number) is None)
    markdown = "\f".join((texts.get(number) or "").replace("\f", "\n") for number in numbers)
    return FinishedParse(markdown, len(numbers), failed, credits_paid)


def version_of(tier: str, version: str) -> str:
    """Names what parsed a document: the same bytes under the same name give the same pages."""
    return f"{PROVIDER}@{tier}/{version}"


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
