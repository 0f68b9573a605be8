"""Step 5: whether the caller may now. One script call (`corral.store.limits`), and what the headers say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from corral.store.budget import REASONS, Budget
from corral.store.limits import Verdict
from corral.wire.common import Decoded
from corral.wire.errors import ApiError, bad_request, jittered, overloaded

DEADLINE: Final = b"x-corral-deadline-ms"
_WORDS = ("requests per minute", "requests at the same time", "tokens per minute", "tokens per day", "tokens per month")
EMBEDS: Final = frozenset((b"/api/embed", b"/api/embeddings"))


def reserve(decoded: Decoded | None, answer_tokens: int, density: float = 1.0) -> int:
    """The tokens that a request will use at a guess: its prompt's size, and the caller's bound of the answer.

    `answer_tokens` stands for a bound that is not there, `density` is that of the key (`Key`).
    """
    if decoded is None or decoded.upstream_path == b"/api/show":
        return 0
    if decoded.upstream_path in EMBEDS:
        return max(1, int(decoded.estimate * density))
    bound = decoded.max_tokens
    return int(decoded.estimate * density) + (answer_tokens if bound is None else bound) or 1


def duration(headers: Mapping[bytes, bytes], most: float, deadline: float | None = None) -> float:
    """How long a request may take from its arrival on (seconds): `most`, or less where its caller says so.

    `deadline` is that of its key, for a caller who does not.

    Raises:
        ApiError: 400 for what is no number; 503 where that time is over already.
    """
    text = headers.get(DEADLINE)
    if text is None:
        return most if deadline is None else min(most, deadline)
    try:
        given = int(text) if text.removeprefix(b"-").isdigit() else None
    except ValueError:
        given = None  # more digits than anybody counts
    if given is None:
        raise bad_request(f"{DEADLINE.decode()} is whole milliseconds", DEADLINE.decode())
    if given <= 0:
        raise overloaded("the request's deadline is past", 0.0)
    # An integer of hundreds of digits compares with another one, but is no float.
    return most if given >= int(most * 1e3) else given / 1e3


def refusal(verdict: Verdict, budget: Budget) -> ApiError:
    """The error for a verdict that refuses: 429 with the limit's name and the time until a retry can succeed."""
    if verdict.refused == "store":
        return overloaded("the limit store is away and its policy is to deny", verdict.retry_after)
    retry = jittered(verdict.retry_after)
    number = REASONS.index(verdict.refused)
    whose = " of the tenant" if number > len(_WORDS) else ""
    message = f"rate limit reached: {budget.limit(number)} {_WORDS[(number - 1) % len(_WORDS)]}{whose}"
    return ApiError(429, "rate_limited", f"{message}; retry in {_said(retry)}", retry_after=retry)


def _said(seconds: int) -> str:
    """For a person: ``90 s``, ``12 min``, ``5 h 3 min``; never less than it is."""
    if seconds <= 120:
        return f"{seconds} s"
    hours, minutes = divmod(-(-seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def headers(verdict: Verdict, budget: Budget) -> bytes:
    """OpenAI's rate-limit headers: of requests a minute, and of what limit of tokens refuses or has the least left."""
    if verdict.refused == "store":
        return b""  # nobody knows what is left
    if not budget.metered:
        if not budget.rpm:
            return b""
        return b"%b%d\r\nx-ratelimit-reset-requests: %dms\r\n" % (
            budget.rate_header,
            verdict.remaining,
            int(verdict.reset * 1e3),
        )
    requests = tokens = b""
    if verdict.limit:
        requests = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
            b"x-ratelimit-reset-requests: %dms\r\n" % (verdict.limit, verdict.remaining, int(verdict.reset * 1e3))
        )
    if verdict.tokens_limit:
        tokens = (
            b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %dms\r\n"
            % (verdict.tokens_limit, verdict.tokens_remaining, int(verdict.tokens_reset * 1e3))
        )
    return requests + tokens
