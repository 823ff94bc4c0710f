"""A request to a hosted provider that brought nothing: what helps, and what its answer told.

Of a server that speaks as OpenAI's does, the official client's errors are read here, for whatever was asked:

    Remedy   when                                                         code
    AGAIN    no answer, a broken one, 408, 409, 5xx                       failed
    WAIT     429                                                          failed
    PAUSE    no money (429 `insufficient_quota`, 402; 429 of a limit      quota, denied
             of 0); key or model refused (401, 403, 404, 400 of a
             setting)
    SPLIT    429 of a request that is larger than a whole minute          REQUEST_OVER_BUDGET
             any other 4xx: too large, or content that is not taken       rejected

A request that is larger than a minute has the same type and code (`tokens`, `rate_limit_exceeded`) as one that came
when the minute was full, and often no header; only the message tells (as users of 2023 to 2025 quote it, it is not
documented):

    Request too large for M in organization O on tokens per min (TPM): Limit 1000000, Requested 1003160. The input …
    Rate limit reached for M in organization O on tokens per min (TPM): Limit 200000, Used 195663, Requested 7592. …
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.rate_headers import RateLimits, read_rate_limits

MESSAGE_CHARS = 300
"""Most of a provider's own words that an error repeats."""

_UNTOLD_WAIT = 2.0  # seconds, where a 429 says no time

_TOO_LARGE = re.compile(r"request[ _](?:is )?too[ _]large", re.IGNORECASE)
# With or without commas. Of `1.5M` or `20k` nothing is taken: half a number would make an ordinary wait a refusal.
_NUMBER = r"(\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?!\w|[.,]\d)"
_LIMIT_AND_REQUESTED = re.compile(rf"\blimit:? {_NUMBER}.*?\brequested:? {_NUMBER}", re.IGNORECASE | re.DOTALL)
_OF_TOKENS_IN_A_MINUTE = re.compile(r"\btokens per min|\bTPM\b", re.IGNORECASE)


class Remedy(StrEnum):
    """What helps against a failure. SPLIT: what was sent is at fault; by halves, where it has halves, it is found."""

    AGAIN = "again"
    WAIT = "wait"
    PAUSE = "pause"
    SPLIT = "split"


@dataclass
class ProviderError(PipelineError):
    """A request that brought nothing.

    Attributes:
        remedy: what to do.
        headers: of the answer, names in small letters; empty where there was none.
        answered: whether the provider answered at all.
        tokens: that were paid for nevertheless; None where nobody knows of any.
        minute: the tokens of a minute, where the request was refused for holding more and the refusal says so.
    """

    remedy: Remedy = Remedy.AGAIN
    headers: Mapping[str, str] = field(default_factory=dict)
    answered: bool = False
    tokens: int | None = None
    minute: int | None = None

    def limits(self) -> RateLimits | None:
        """What it told of limits; a 429 always tells a time."""
        told = read_rate_limits(self.headers)
        if self.remedy is Remedy.WAIT and told.retry_after is None:
            return replace(told, retry_after=_UNTOLD_WAIT)
        return told if told != RateLimits() else None


@dataclass(frozen=True, slots=True)
class Wording:
    """How failures of one kind of request are told.

    Attributes:
        who: as `The embedder`.
        content: what is not taken, as `the text`.
        failed: code of what may pass.
        look_at: settings to look at where the model is refused.
        setting_params: parameters of the request that settings decide.
        make_smaller: what makes a request smaller, as a sentence without its end.
    """

    error: type[ProviderError]
    who: str
    content: str
    failed: ErrorCode
    quota: ErrorCode
    denied: ErrorCode
    rejected: ErrorCode
    look_at: str
    setting_params: frozenset[str]
    make_smaller: str


def open_client(*, setting: str, api_key: str, base_url: str, timeout: float) -> Any:
    """An `openai.AsyncOpenAI` that never tries again by itself, so that every request is seen by whoever counts them.

    Args:
        setting: the one that asks for it, as `embedder`.
        api_key: of the account that pays.
        base_url: of the API, with its version.
        timeout: seconds that a request may take.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the setting or the missing package.
    """
    if find_spec("openai") is None:
        raise bad_setting(
            setting,
            'needs the package openai, which is not installed: install the extra "openai", as in '
            '`pip install "upload-pipeline[openai]"`',
        )
    if not api_key:
        raise bad_setting(
            "openai_api_key", f"is empty; UPLOAD_PIPELINE_{setting.upper()}=openai needs the key of an account"
        )
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise bad_setting("openai_api_key", "has characters that no key has; copy it again")
    import openai

    return openai.AsyncOpenAI(api_key=api_key, base_url=base_url, timeout=timeout, max_retries=0)


def bad_setting(name: str, problem: str) -> PipelineError:
    """The error of a setting that cannot work."""
    return PipelineError(ErrorCode.SETTING_INVALID, f"UPLOAD_PIPELINE_{name.upper()} {problem}.", {"setting": name})


def unanswered(error: Exception, wording: Wording, *, base_url: object, timeout: float) -> ProviderError:
    """What it means that no answer came.

    Args:
        error: `openai.APIConnectionError` or `TimeoutError`.
    """
    import openai

    late = isinstance(error, openai.APITimeoutError | TimeoutError)
    what = f"did not answer within {timeout:g} s" if late else "cannot be reached"
    return wording.error(wording.failed, f"{wording.who} at {base_url} {what}.")


def refused(error: Any, wording: Wording, *, api_key: str) -> ProviderError:
    """What a status that is no success means.

    Args:
        error: `openai.APIStatusError`.
        api_key: is not repeated.
    """
    status: int = error.status_code
    headers = lower_names(error.response.headers)
    said = str(error.message).replace(api_key, "***")[:MESSAGE_CHARS]
    details = {"status": status, "type": error.type, "code": error.code, "request_id": error.request_id}

    def failed(code: ErrorCode, message: str, remedy: Remedy) -> ProviderError:
        return wording.error(code, message, details, remedy=remedy, headers=headers, answered=True)

    who = wording.who
    if status == 402 or "insufficient_quota" in (error.code, error.type):
        owner = who[0].lower() + who[1:]
        message = f"The account of {owner}'s key has no money left ({status}). Look at its plan and billing."
        return failed(wording.quota, message, Remedy.PAUSE)
    if status in (401, 403):
        # the provider's own words name parts of the key
        message = f"{who} refuses the key ({status}). Set UPLOAD_PIPELINE_OPENAI_API_KEY to one that is valid."
        return failed(wording.denied, message, Remedy.PAUSE)
    # a server that speaks alike may say more of it than a name
    param = error.param if isinstance(error.param, str) else ""
    if status == 404 or (status == 400 and param in wording.setting_params):
        message = f"{who} has no such model, or not like this ({status}): {said}. Look at {wording.look_at}."
        return failed(wording.denied, message, Remedy.PAUSE)
    if status == 429 and (large := _larger_than_a_minute(error)):
        if large.limit == 0:
            message = f"{who}'s account may use nothing of this model ({status}): {said}. Look at its plan and billing."
            return failed(wording.quota, message, Remedy.PAUSE)
        return _over_minute(large, failed, wording, said)
    if status == 429:
        return failed(wording.failed, f"{who}'s rate limit is reached: {said}", Remedy.WAIT)
    if status >= 500 or status in (408, 409):
        return failed(wording.failed, f"{who} failed ({status}): {said}", Remedy.AGAIN)
    return failed(wording.rejected, f"{who} does not take {wording.content} ({status}): {said}", Remedy.SPLIT)


@dataclass(frozen=True, slots=True)
class _Large:
    """Of a request that no minute holds: what one holds and what was asked for, where that is told.

    Attributes:
        of_tokens: in a minute; else of something else, or it is not told.
    """

    limit: int | None
    requested: int | None
    of_tokens: bool


def _larger_than_a_minute(error: Any) -> _Large | None:
    """What a 429 tells of a request that will never be taken as it is; None of one that came too early."""
    message = str(error.message)
    told = _LIMIT_AND_REQUESTED.search(message)
    limit, requested = (_number(told[1]), _number(told[2])) if told else (None, None)
    if limit is not None and requested is not None and requested > limit:
        return _Large(limit, requested, _OF_TOKENS_IN_A_MINUTE.search(message) is not None)
    if any(_TOO_LARGE.search(str(words)) for words in (message, error.type, error.code)):
        return _Large(None, None, of_tokens=False)
    return None


def _number(told: str) -> int:
    return int(told.replace(",", ""))


def _over_minute(
    large: _Large, failed: Callable[[ErrorCode, str, Remedy], ProviderError], wording: Wording, said: str
) -> ProviderError:
    who = wording.who
    what = f"{who} does not take a request that is larger than its rate limit"
    if large.of_tokens:
        what = f"{who} takes {large.limit} tokens in a minute, and one request asked for {large.requested}"
    error = failed(
        ErrorCode.REQUEST_OVER_BUDGET,
        f"{what} (429): {said.rstrip('. ')}. {wording.make_smaller}, or ask the provider for a higher limit.",
        Remedy.SPLIT,
    )
    # what is more than a whole minute was not counted in one
    error.tokens = 0
    error.minute = large.limit if large.of_tokens else None
    return error


def lower_names(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with their names in small letters."""
    return {name.lower(): value for name, value in headers.items()}
