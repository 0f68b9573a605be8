"""Step 5: whether the caller may now. One script call (`corral.store.limits`), and what the headers say of it."""

from __future__ import annotations

import math
import random

from corral.store.limits import Budget, Verdict
from corral.wire.errors import ApiError

_REASONS = {
    "rpm": "requests per minute",
    "concurrency": "requests at the same time",
}


def refusal(verdict: Verdict, budget: Budget) -> ApiError:
    """The error for a verdict that refuses: 429 with the time until a retry can succeed, jittered."""
    retry = max(1, math.ceil(verdict.retry_after + random.uniform(0.0, min(1.0, verdict.retry_after))))
    if verdict.refused == "store":
        return ApiError(503, "overloaded", "the limit store is away and its policy is to deny", retry_after=retry)
    limit = budget.rpm if verdict.refused == "rpm" else budget.concurrency
    message = f"rate limit reached: {limit} {_REASONS[verdict.refused]}; retry in {retry} s"
    return ApiError(429, "rate_limited", message, retry_after=retry)


def headers(verdict: Verdict, budget: Budget) -> bytes:
    """OpenAI's rate-limit headers for the key's requests per minute."""
    if not budget.rpm:
        return b""
    return b"%b%d\r\nx-ratelimit-reset-requests: %dms\r\n" % (
        budget.rate_header,
        verdict.remaining,
        verdict.reset * 1e3,
    )
