"""The local share of a limit: what one of so many gateways may admit while the store is away.

Times are monotonic seconds, ``wall`` is epoch seconds.
"""

from __future__ import annotations

import math

from corral.store.budget import DAY, MINUTE, Budget, month_end


class Verdict:
    """The answer to one request; times are seconds. Plain, as a named tuple's `__new__` is not compiled.

    ``refused`` is "", one of `REASONS`, or "store"; ``remaining`` and ``reset`` are of requests a minute. The rest is
    of metered keys alone: the limits that have the least left, of requests and of tokens (0: none).
    """

    __slots__ = (
        "limit",
        "refused",
        "remaining",
        "reset",
        "retry_after",
        "tokens_limit",
        "tokens_remaining",
        "tokens_reset",
    )

    def __init__(
        self,
        refused: str,
        remaining: int,
        reset: float,
        retry_after: float,
        limit: int = 0,
        tokens_limit: int = 0,
        tokens_remaining: int = 0,
        tokens_reset: float = 0.0,
    ) -> None:
        self.refused = refused
        self.remaining = remaining
        self.reset = reset
        self.retry_after = retry_after
        self.limit = limit
        self.tokens_limit = tokens_limit
        self.tokens_remaining = tokens_remaining
        self.tokens_reset = tokens_reset


def reached(scope: Budget, gateways: int, now: float, wall: float, tokens: int) -> list[tuple[str, float]]:
    """The limits of which this gateway's share is used up, and for how long (seconds)."""
    reached: list[tuple[str, float]] = []
    if scope.concurrency and len(scope.in_flight) >= math.ceil(scope.concurrency / gateways):
        reached.append(("concurrency", 1.0))
    if scope.rpm:
        over = max(scope.arrival, now) + MINUTE * gateways / scope.rpm - now - MINUTE
        if over > 0:
            reached.append(("rpm", over))
    if not tokens:
        return reached
    if scope.tpm:
        over = max(scope.tokens_arrival, now) + tokens * MINUTE * gateways / scope.tpm - now - MINUTE
        if over > 0:
            reached.append(("tpm", over))
    if scope.daily_tokens and scope.day_used + (scope.day_spent + tokens) * gateways > scope.daily_tokens:
        reached.append(("daily_tokens", (scope.day + 1) * DAY - wall))
    if scope.monthly_tokens and scope.month_used + (scope.month_spent + tokens) * gateways > scope.monthly_tokens:
        reached.append(("monthly_tokens", month_end(scope.month) - wall))
    return reached


def spend(scope: Budget, gateways: int, now: float, tokens: int) -> None:
    """Count a request that is admitted."""
    if scope.rpm:
        scope.arrival = max(scope.arrival, now) + MINUTE * gateways / scope.rpm
    if scope.tpm:
        scope.tokens_arrival = max(scope.tokens_arrival, now) + tokens * MINUTE * gateways / scope.tpm
    scope.day_spent += tokens
    scope.month_spent += tokens


def tokens_left(scope: Budget, gateways: int, now: float, wall: float) -> list[tuple[int, int, float]]:
    """Of each limit of tokens: the limit, what is left of this gateway's share, seconds until it is whole."""
    found: list[tuple[int, int, float]] = []
    if scope.tpm:
        whole = max(0.0, scope.tokens_arrival - now)
        found.append((scope.tpm, max(0, int((MINUTE - whole) * scope.tpm / (MINUTE * gateways))), whole))
    if scope.daily_tokens:
        left = (scope.daily_tokens - scope.day_used) // gateways - scope.day_spent
        found.append((scope.daily_tokens, max(0, left), (scope.day + 1) * DAY - wall))
    if scope.monthly_tokens:
        left = (scope.monthly_tokens - scope.month_used) // gateways - scope.month_spent
        found.append((scope.monthly_tokens, max(0, left), month_end(scope.month) - wall))
    return found


def verdict(budget: Budget, gateways: int, now: float, wall: float, refused: str, retry: float) -> Verdict:
    """The answer to a request of a key, by what is left of this gateway's share."""
    limit, left, reset = 0, 0, 0.0
    most_tokens, rest_tokens, whole_tokens = 0, 0, 0.0
    for scope in budget.scopes:
        if scope.rpm:
            whole = max(0.0, scope.arrival - now)
            rest = max(0, int((MINUTE - whole) * scope.rpm / (MINUTE * gateways)))
            if not limit or rest < left:
                limit, left, reset = scope.rpm, rest, whole
        for most, rest, whole in tokens_left(scope, gateways, now, wall) if budget.metered else ():
            if not most_tokens or rest < rest_tokens:
                most_tokens, rest_tokens, whole_tokens = most, rest, whole
    return Verdict(refused, left, reset, retry, limit, most_tokens, rest_tokens, whole_tokens)
