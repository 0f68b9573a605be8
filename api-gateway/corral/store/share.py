"""The local share of a limit: what one of so many gateways may admit while the store is away.

What was used of the whole counts, as the store last said it, and the rest is shared out, so that all gateways together
admit no more than the limit. Times are monotonic seconds, ``wall`` is epoch seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from corral.store.budget import DAY, LIMITS, MINUTE, PREFIX, REASONS, Budget, month_end
from corral.store.sharing import Sharing
from corral.store.valkey import Valkey

CHANNEL: Final = PREFIX + b"used"
"""On it the store tells what has been used."""
REBUILD: Final = 3.0
"""So long (seconds) a store that has forgotten admits nothing at most."""


class Verdict:
    """The answer to one request; times are seconds. Plain, as a named tuple's `__new__` is not compiled.

    ``refused`` is "", one of `REASONS`, or "store"; ``remaining`` and ``reset`` are of requests a minute. The rest is
    of metered keys alone: of requests and of tokens the limit that refuses, else the one that has the least left (0:
    none).
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


def at_once(limit: int, own: int, others: int, name: str, names: list[str]) -> int:
    """How many requests this gateway may run at once without the store.

    `own` ran here when the store was lost, `others` elsewhere; what ends here may be taken again here alone, as nobody
    else hears of it. What `names`, those of all gateways, do not divide goes to the first of them. Of a limit smaller
    than their number each may run one while any is free: else a caller would be refused by most of them.
    """
    left, gateways = limit - own - others, len(names)
    if left <= 0:
        return own
    if limit < gateways:
        return max(own, 1)
    before = sum([other < name for other in names])
    return own + left // gateways + (1 if before < left % gateways else 0)


def heard(budget: Budget, now: float, reply: list[int]) -> Verdict:
    """The store's answer to a request of a metered key, and what it says of the use."""
    place = 11
    for scope in budget.scopes:
        scope.arrival = scope.said_arrival = now + reply[place] / 1e6
        scope.said(now, reply[place + 1], reply[9], reply[place + 2], reply[10], reply[place + 3])
        place += 4
    number = reply[1]
    retry = budget.scope(number).pause() if LIMITS[(number - 1) % len(LIMITS)] == "concurrency" else reply[2] / 1e6
    return Verdict(
        REASONS[number],
        reply[4],
        reply[5] / 1e6,
        retry,
        budget.limit(reply[3]),
        budget.limit(reply[6]),
        reply[7],
        reply[8] / 1e6,
    )


def told(sharing: Sharing, find: Callable[[str], Budget | None], message: bytes, now: float) -> None:
    """What the store tells all gateways as soon as the use of a scope has grown by a part of a limit (`told.lua`)."""
    *numbers, name = message.split(b" ", 7)
    scope = find(name.decode())
    if scope is not None:
        scope.told(now, numbers)
        sharing.told.add(scope.key_id)


def reached(scope: Budget, gateways: int, now: float, wall: float, tokens: int, most: int) -> list[tuple[str, float]]:
    """The limits of which this gateway's share is used up, and for how long (seconds); `most` may run at once."""
    reached: list[tuple[str, float]] = []
    if scope.concurrency and len(scope.in_flight) >= most:
        reached.append(("concurrency", scope.pause()))
    if scope.rpm:
        step = MINUTE * gateways / scope.rpm
        # A share of less than one a minute is one in as many minutes as that takes.
        over = max(scope.arrival, now) + step - now - max(MINUTE, step)
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


def nothing_known(scopes: list[Budget], store: Valkey | None, began: float) -> None:
    """Where the store was never there: take the minute before this gateway began for used up.

    It may be one that was killed after it had admitted its share, and starts again. A store that is there and knows
    nothing is new: as for it, a minute begins.
    """
    if store is None or store.connections:
        return
    for scope in scopes:
        scope.arrival = scope.arrival or began + MINUTE
        scope.tokens_arrival = scope.tokens_arrival or began + MINUTE


def back_in(store: Valkey | None, sharing: Sharing, now: float) -> float:
    """Seconds until the store may admit again: its connection is tried again then, or it was told what it forgot."""
    if store is None:
        return 0.0
    return max(0.0, ((sharing.forgot or now) + REBUILD if store.connected else store.due) - now)


def spend(scope: Budget, gateways: int, now: float, tokens: int) -> None:
    """Count a request that is admitted."""
    if scope.rpm:
        scope.arrival = max(scope.arrival, now) + MINUTE * gateways / scope.rpm
    if scope.tpm:
        scope.tokens_arrival = max(scope.tokens_arrival, now) + tokens * MINUTE * gateways / scope.tpm
    scope.day_spent += tokens
    scope.month_spent += tokens


def tokens_left(scope: Budget, gateways: int, now: float, wall: float) -> list[tuple[str, int, int, float]]:
    """Of each limit of tokens: its name, the limit, what is left of this gateway's share, seconds until it is whole."""
    found: list[tuple[str, int, int, float]] = []
    if scope.tpm:
        whole = max(0.0, scope.tokens_arrival - now)
        found.append(("tpm", scope.tpm, max(0, int((MINUTE - whole) * scope.tpm / (MINUTE * gateways))), whole))
    if scope.daily_tokens:
        left = (scope.daily_tokens - scope.day_used) // gateways - scope.day_spent
        found.append(("daily_tokens", scope.daily_tokens, max(0, left), (scope.day + 1) * DAY - wall))
    if scope.monthly_tokens:
        left = (scope.monthly_tokens - scope.month_used) // gateways - scope.month_spent
        found.append(("monthly_tokens", scope.monthly_tokens, max(0, left), month_end(scope.month) - wall))
    return found


def verdict(budget: Budget, gateways: int, now: float, wall: float, refused: str, retry: float) -> Verdict:
    """The answer to a request of a key, by what is left of this gateway's share."""
    limit, left, reset = 0, 0, 0.0
    most_tokens, rest_tokens, whole_tokens = 0, 0, 0.0
    for scope in budget.scopes:
        whose = "" if scope is budget else "tenant_"
        if scope.rpm and (refused == whose + "rpm" or not refused.endswith("rpm")):
            whole = max(0.0, scope.arrival - now)
            rest = max(0, int((MINUTE - whole) * scope.rpm / (MINUTE * gateways)))
            if not limit or rest < left:
                limit, left, reset = scope.rpm, rest, whole
        for name, most, rest, whole in tokens_left(scope, gateways, now, wall) if budget.metered else ():
            if refused != whose + name and refused.endswith(("tpm", "_tokens")):
                continue  # what refuses is told: the wait is until that lets in
            if not most_tokens or rest < rest_tokens:
                most_tokens, rest_tokens, whole_tokens = most, rest, whole
    return Verdict(refused, left, reset, retry, limit, most_tokens, rest_tokens, whole_tokens)
