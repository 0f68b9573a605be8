"""What limits a key or a tenant, what a gateway knows of their use, and the store's commands that count it.

A key without limits of tokens, whose tenant has none either, is counted by a shorter script and settled by its lease
alone: it pays for nothing that it does not have. All others are *metered*.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from corral.store.lua import PREFIX, combined, script, sha
from corral.store.valkey import words

__all__ = ["PREFIX", "combined", "script", "sha"]

EPOCH, GRANTS = PREFIX + b"epoch", PREFIX + b"grants"
"""There is an epoch when gateways have told a store what it last said, and it grants when they have told the rest."""
ACTIVE: Final = PREFIX + b"active"
LEASE: Final = 10.0
MINUTE: Final = 60.0
DAY: Final = 86400.0
HELD_MS: Final = 86_400_000
"""How long a reservation is known that nobody settles."""
SETTLED_MS: Final = 60_000
"""How long a settled request is known: it may be settled again, or admitted by a call that was late."""
WHOLE_MAX: Final = 3600.0
"""No rate is whole later than in so many seconds, whoever says so: one a minute at the least is a minute's."""
PAUSE_MAX: Final = 60.0
"""The longest wait for a request's end that is told (seconds)."""
WEIGHT: Final = 0.125
"""What the last request counts in the mean of how long they take."""
TENANT: Final = "t:"
"""Before a tenant's name, where the store tells it from a key."""
LIMITS: Final[tuple[str, ...]] = ("rpm", "concurrency", "tpm", "daily_tokens", "monthly_tokens")
REASONS: Final[tuple[str, ...]] = ("", *LIMITS, *(f"tenant_{limit}" for limit in LIMITS))
"""What a script's number of a limit means."""

ADMIT, CHARGE = script("admit", metered=False, tells=True), script("charge", metered=False, tells=True)
RESERVE, SETTLE = script("reserve", tells=True), script("settle", tells=True)
DECLARE, USE = script("declare"), script("use")
_ADMIT, _RESERVE, _SETTLE = sha(ADMIT), sha(RESERVE), sha(SETTLE)
ADMIT_SLOT, RESERVE_SLOT = combined(ADMIT), combined(RESERVE)
"""The same, and a slot in the same call."""
_ADMIT_SLOT, _RESERVE_SLOT = sha(ADMIT_SLOT), sha(RESERVE_SLOT)


def month_of(wall: float) -> int:
    """The month of a time in epoch seconds, in months since March of the year 0, as the scripts count them."""
    moment = time.gmtime(wall)
    return moment.tm_year * 12 + moment.tm_mon - 3


def month_end(month: int) -> float:
    """When a month ends, in epoch seconds."""
    following = month + 3
    return float(calendar.timegm((following // 12, following % 12 + 1, 1, 0, 0, 0)))


def reservation(beginning: bytes, request_id: str, cost: bytes) -> bytes:
    """The command that reserves tokens for a request of a metered key."""
    identity = request_id.encode()
    return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (beginning, len(identity), identity, len(cost), cost)


@dataclass(slots=True, eq=False)
class Budget:
    """The limits of a key or a tenant, and what this gateway knows of their use.

    A tenant's ``key_id`` is `TENANT` and its name. None is no limit. ``in_flight``: request → tokens the store reserved
    for it, or -1 less what was reserved here without it. ``arrival`` and ``tokens_arrival`` are when the rates are
    whole again (monotonic seconds) as seen from here; ``said_arrival``, ``window`` (tokens of the minute), ``day_used``
    and ``month_used`` are what the store last said; ``…_spent`` is what was admitted here since, without the store.
    ``own`` and ``others`` are the requests that this gateway and others ran when the store was last asked, or told of
    them; ``unanswered`` those that it is asked for, or told the end of, just now; ``lasting`` is the mean time
    (seconds) that requests hold their lease, by those that ended here.
    """

    key_id: str
    rpm: int | None = None
    concurrency: int | None = None
    tpm: int | None = None
    daily_tokens: int | None = None
    monthly_tokens: int | None = None
    tenant: Budget | None = None
    metered: bool = False
    most: int = 0
    """The least of all limits of tokens: no more is reserved for one request. 0: none."""
    prefix: bytes = b""
    """The admission's command up to what differs between requests."""
    before_slot: bytes = b""
    after_slot: bytes = b""
    parts: int = 0
    """The same where a slot is asked for too: what stands before its arguments and after them, and how many words the
    command has without those of the slot."""
    rate_header: bytes = b""
    ending: list[bytes] = field(default_factory=list)
    """The command that ends requests, up to those requests."""
    ending_words: bytes = b""
    """Those words, encoded."""
    numbered: tuple[int, ...] = ()
    """Its own limits by a script's numbers, from 1 on."""
    leaving: list[bytes] = field(default_factory=list)
    """Requests that end in this turn: id, and of a metered one tokens used and reserved."""
    in_flight: dict[str, int] = field(default_factory=dict)
    arrival: float = 0.0
    said_arrival: float = 0.0
    tokens_arrival: float = 0.0
    window: int = 0
    day: int = 0
    day_used: int = 0
    day_spent: int = 0
    month: int = 0
    month_used: int = 0
    month_spent: int = 0
    own: int = 0
    others: int = 0
    unanswered: int = 0
    lasting: float = 0.0

    def __post_init__(self) -> None:
        tokens = self.token_limits()
        self.numbered = (0, *self.limits())
        tenant = self.tenant
        if tenant is not None:
            tokens += tenant.token_limits()
        self.most = min(tokens) if tokens else 0
        self.metered = tenant is not None or bool(tokens)
        self.rate_header = b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: " % (self.rpm or 0)
        if self.metered:
            self._metered()
            self.ending_words = words(*self.ending)
            return
        numbers = (self.rpm or 0, self.concurrency or 0, LEASE * 1e6)
        arguments = [*[b"%d" % number for number in numbers], self.key_id.encode()]
        self._commands(_ADMIT, _ADMIT_SLOT, [self.rate, self.leases, GRANTS, ACTIVE], arguments, 1)
        self.ending = [b"ZREM", self.leases]
        self.ending_words = words(*self.ending)

    def _metered(self) -> None:
        scopes = self.scopes
        keys, limits, meters = [GRANTS, EPOCH, ACTIVE], [], []
        shared = [EPOCH, ACTIVE]
        for scope in scopes:
            keys += [scope.rate, scope.leases, scope.tokens]
            shared += [scope.leases, scope.tokens, scope.rate]
            tokens = [b"%d" % (limit or 0) for limit in (scope.tpm, scope.daily_tokens, scope.monthly_tokens)]
            name, rpm = scope.key_id.encode(), b"%d" % (scope.rpm or 0)
            limits += [name, rpm, b"%d" % (scope.concurrency or 0), *tokens]
            meters += [name, rpm, *tokens]
        held = PREFIX + b"request:" + self.key_id.encode() + b":"
        self._commands(_RESERVE, _RESERVE_SLOT, keys, [b"%d" % (LEASE * 1e6), b"%d" % HELD_MS, held, *limits], 2)
        self.ending = [b"EVALSHA", _SETTLE, b"%d" % len(shared), *shared, held, b"%d" % SETTLED_MS, *meters]

    def _commands(self, alone: bytes, slot: bytes, keys: list[bytes], arguments: list[bytes], more: int) -> None:
        # `more` words of a request follow.
        self.parts = 3 + len(keys) + len(arguments) + more
        self.prefix = b"*%d\r\n" % self.parts + words(b"EVALSHA", alone, b"%d" % len(keys), *keys, *arguments)
        self.before_slot = words(b"EVALSHA", slot, b"%d" % len(keys), *keys)
        self.after_slot = words(*arguments)

    @property
    def rate(self) -> bytes:
        """The store's key of the requests' rate."""
        return PREFIX + b"rate:" + self.key_id.encode()

    @property
    def leases(self) -> bytes:
        """The store's key of the set of leases."""
        return PREFIX + b"leases:" + self.key_id.encode()

    @property
    def tokens(self) -> bytes:
        """The store's key of the tokens used."""
        return PREFIX + b"tokens:" + self.key_id.encode()

    @property
    def scopes(self) -> list[Budget]:
        """The key, and its tenant if that has limits."""
        return [self] if self.tenant is None else [self, self.tenant]

    def limit(self, number: int) -> int:
        """The limit that a script calls by this number; 0 is none."""
        return self.scope(number).numbered[(number - 1) % len(LIMITS) + 1] if number else 0

    def scope(self, number: int) -> Budget:
        """Whose the limit is that a script calls by this number."""
        return self if number <= len(LIMITS) or self.tenant is None else self.tenant

    def limits(self) -> tuple[int, ...]:
        """Its own limits in the order of `LIMITS`; 0 is none."""
        return (
            self.rpm or 0,
            self.concurrency or 0,
            self.tpm or 0,
            self.daily_tokens or 0,
            self.monthly_tokens or 0,
        )

    def token_limits(self) -> list[int]:
        """Those of tokens that there are."""
        return [limit for limit in (self.tpm, self.daily_tokens, self.monthly_tokens) if limit]

    def said(self, now: float, window: int, day: int, day_used: int, month: int, month_used: int) -> None:
        """Note what the store says of the tokens."""
        self.window = window
        if self.tpm:
            self.tokens_arrival = now + MINUTE * window / self.tpm
        self.day, self.day_used, self.day_spent = day, day_used, 0
        self.month, self.month_used, self.month_spent = month, month_used, 0

    def used_by_all(self, now: float, whole: float, leases: int, own: int) -> None:
        """Note what the store says of all gateways: when the rate is whole again (seconds from `now` on), and how many
        requests run, of which this gateway has `own`."""
        self.arrival = self.said_arrival = max(self.said_arrival, now + whole)
        self.own, self.others = own, max(0, leases - own)

    def told(self, now: float, message: Sequence[bytes]) -> None:
        """Note the numbers of `told.lua`. They may be from before what was read here, or spent: less says nothing."""
        whole, leases, window, *sums = map(int, message)
        self.said_arrival = max(self.said_arrival, now + min(whole / 1e6, WHOLE_MAX))
        self.arrival = max(self.arrival, self.said_arrival)
        if leases:
            # What the store was told or asked may be in it, whether or not it has answered that.
            self.own = len(self.in_flight) + self.unanswered
            self.others = max(self.others, leases - self.own)
        if self.tpm and (arrival := now + MINUTE * window / self.tpm) > self.tokens_arrival:
            self.window, self.tokens_arrival = window, arrival
        self.recall(*sums)

    def counts(self, by: int) -> None:
        """So many calls more, or less, of the key are on their way to the store and back."""
        for scope in self.scopes:
            scope.unanswered += by

    def ended(self, took: float) -> None:
        """Note how long a request has held its lease (seconds)."""
        self.lasting += (took - self.lasting) * (WEIGHT if self.lasting else 1.0)

    def pause(self) -> float:
        """How long it takes by now until one of as many requests as may run has ended (seconds, one at least)."""
        return min(max(1.0, self.lasting / (self.concurrency or 1)), PAUSE_MAX)

    def recall(self, day: int, day_used: int, month: int, month_used: int) -> bool:
        """Note what the records say of this day and month; whether that is more than was known."""
        if day > self.day:
            self.day, self.day_used, self.day_spent = day, 0, 0
        if month > self.month:
            self.month, self.month_used, self.month_spent = month, 0, 0
        more = False
        if day == self.day and day_used > self.day_used:
            self.day_used, more = day_used, True
        if month == self.month and month_used > self.month_used:
            self.month_used, more = month_used, True
        return more

    def roll(self, wall: float) -> None:
        """Begin a new day or month, where one has begun. `wall` is epoch seconds."""
        day, month = int(wall // DAY), month_of(wall)
        if day > self.day:
            self.day, self.day_used, self.day_spent = day, 0, 0
        if month > self.month:
            self.month, self.month_used, self.month_spent = month, 0, 0

    def after(self, old: Budget | None) -> Budget:
        """What takes the place of an earlier one: that itself where the limits are the same, else this, which goes on
        with what that knows."""
        if old is None:
            return self
        if self.limits() == old.limits() and self.tenant is old.tenant:
            return old
        self.in_flight, self.arrival, self.said_arrival = old.in_flight, old.arrival, old.said_arrival
        self.tokens_arrival, self.window = old.tokens_arrival, old.window
        self.day, self.day_used, self.day_spent = old.day, old.day_used, old.day_spent
        self.month, self.month_used, self.month_spent = old.month, old.month_used, old.month_spent
        self.own, self.others, self.lasting = old.own, old.others, old.lasting
        return self


def of_tenant(entry: Mapping[str, Any]) -> Budget | None:
    """That of a tenant as the snapshot has it; None where it has no limits."""
    rpm, concurrency, tpm, daily, monthly = [entry.get(name) for name in LIMITS]
    budget = Budget(TENANT + entry["name"], rpm, concurrency, tpm, daily, monthly)
    return budget if any(budget.limits()) else None


def of_key(entry: Mapping[str, Any], defaults: Mapping[str, int | None], tenant: Budget | None) -> Budget:
    """That of a key as the snapshot has it; `defaults` are the limits of a key with none of its own."""
    limits: list[int | None] = [entry[name] if entry.get(name) is not None else defaults.get(name) for name in LIMITS]
    rpm, concurrency, tpm, daily, monthly = limits
    return Budget(entry["id"], rpm, concurrency, tpm, daily, monthly, tenant)
