"""Requests per minute and concurrency of a key: one script call a request, or the local share of the limit.

The rate is GCRA (the generic cell rate algorithm, ITU-T I.371): a burst of a minute's requests at most, refilled
evenly. Concurrency is a set of leases that die with their gateway. While the store is away each gateway admits its
share, the limit divided by the gateways that were alive when it was last seen; what it has in flight counts on, and
so does what the key has used: a gateway keeps what the store last said, and tells it to a store that came back empty.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import hiredis

from corral.store.valkey import Valkey, ValkeyDown, encode

PREFIX = b"corral:1:"
LEASE = 10.0
MINUTE = 60.0
OWED_MAX = 10_000
OWED_TIMES = 2

_SCRIPTS = files("corral.store") / "scripts"
ADMIT = (_SCRIPTS / "admit.lua").read_text()

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """The answer to one request.

    ``refused`` is "", "rpm", "concurrency" or "store"; times are seconds.
    """

    refused: str
    remaining: int
    reset: float
    retry_after: float


@dataclass(slots=True)
class Budget:
    """A key's limits (None: none) and what this gateway knows of their use.

    ``prefix`` and ``rate_header`` are the parts of a command and a head that never change, ``leaving`` the requests
    whose leases end in this turn.
    """

    key_id: str
    rpm: int | None
    concurrency: int | None
    prefix: bytes = b""
    rate_header: bytes = b""
    leaving: list[bytes] = field(default_factory=list)
    in_flight: dict[str, None] = field(default_factory=dict)
    arrival: float = 0.0

    def __post_init__(self) -> None:
        name = self.key_id.encode()
        rate, leases = PREFIX + b"rate:" + name, PREFIX + b"leases:" + name
        sha = hashlib.sha1(ADMIT.encode(), usedforsecurity=False).hexdigest().encode()
        command = encode(
            b"EVALSHA",
            sha,
            b"2",
            rate,
            leases,
            b"%d" % (self.rpm or 0),
            b"%d" % (self.concurrency or 0),
            b"%d" % (LEASE * 1e6),
        )
        self.prefix = command.replace(b"*8\r\n", b"*10\r\n", 1)
        self.rate_header = b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: " % (self.rpm or 0)

    @property
    def leases(self) -> bytes:
        """The store's key of the set of leases."""
        return PREFIX + b"leases:" + self.key_id.encode()


class Limits:
    """Admits and releases requests; ``budget`` objects are the caller's, one per key.

    ``gateways`` is how many gateways share the limits, as last seen while the store was up.
    """

    def __init__(self, store: Valkey | None, gateway: str, on_failure: str = "local") -> None:
        self.store = store
        self.gateway = gateway.encode()
        self._deny = on_failure == "deny"
        self.busy: dict[str, Budget] = {}
        self.gateways = 1
        self.local = 0
        """Requests that were admitted on the local share."""
        self.owed: dict[bytes, dict[bytes, int]] = {}
        """Leases' key → requests that do not run and may hold a lease, with how often the store is still to be told."""

    def admit(self, budget: Budget, request_id: str, now: float, done: Callable[[Verdict], None]) -> None:
        """Decide; `done` gets the verdict, at once where the store is away. `now` is monotonic seconds."""
        store = self.store
        if store is None or not store.connected:
            done(self._locally(budget, request_id, now))
            return

        def replied(reply: Any) -> None:
            if type(reply) is list:
                admitted, reason, remaining, reset, retry = reply
                budget.arrival = max(budget.arrival, now + reset / 1e6)
                if admitted:
                    self._enter(budget, request_id)
                    done(Verdict("", remaining, reset / 1e6, 0.0))
                else:
                    refused = "rpm" if reason == 1 else "concurrency"
                    done(Verdict(refused, remaining, reset / 1e6, retry / 1e6))
                return
            if isinstance(reply, hiredis.ReplyError):
                log.error("the store refused the admission script: %s", reply)
                store.reset()
            verdict = self._locally(budget, request_id, now)
            # A stalled store may run the call yet, and nobody would give the lease back. It counts for the rate too;
            # that is no more than what was sent within one time-out, and is left.
            if verdict.refused:
                self._owe(budget, [identity])
            done(verdict)

        identity = request_id.encode()
        used = b"%d" % max(0.0, (budget.arrival - now) * 1e6)
        command = b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (budget.prefix, len(identity), identity, len(used), used)
        store.call(command, replied)

    def release(self, budget: Budget, request_id: str) -> None:
        """End a request that was admitted."""
        in_flight = budget.in_flight
        if request_id not in in_flight:
            return
        del in_flight[request_id]
        if not in_flight:
            self.busy.pop(budget.key_id, None)
        store = self.store
        if not budget.concurrency or store is None:
            return
        if not store.connected:
            self._owe(budget, [request_id.encode()])
            return
        if not budget.leaving:
            store.soon(self._leave, store, budget)
        budget.leaving.append(request_id.encode())

    def give_back(self) -> None:
        """End the leases of what ended while nobody knew what the store had heard.

        It is told twice, at once when it is back and later: what a connection that was given up still held may be
        run after the first time.
        """
        store = self.store
        if store is None:
            return
        for leases, owed in list(self.owed.items()):
            self._tell(store, leases, list(owed))

    def _tell(self, store: Valkey, leases: bytes, ended: list[bytes]) -> None:
        def heard(reply: Any) -> None:
            owed = self.owed.get(leases)
            if owed is None or isinstance(reply, ValkeyDown):
                return
            for identity in ended:
                times = owed.pop(identity, 1) - 1
                if times > 0:
                    owed[identity] = times
            if not owed:
                del self.owed[leases]

        store.call(encode(b"ZREM", leases, *ended), heard)

    def _owe(self, budget: Budget, ended: list[bytes]) -> None:
        if not budget.concurrency:
            return
        owed = self.owed.setdefault(budget.leases, {})
        for identity in ended:
            # The first of a long outage are those that the store can have heard of.
            if len(owed) < OWED_MAX:
                owed[identity] = OWED_TIMES

    def _leave(self, store: Valkey, budget: Budget) -> None:
        # One command for all that ended in a turn. It is under way before a caller can ask again.
        leaving, budget.leaving = budget.leaving, []

        def heard(reply: Any) -> None:
            if isinstance(reply, ValkeyDown):
                self._owe(budget, leaving)

        store.call(encode(b"ZREM", budget.leases, *leaving), heard)

    def _enter(self, budget: Budget, request_id: str) -> None:
        budget.in_flight[request_id] = None
        self.busy[budget.key_id] = budget

    def _locally(self, budget: Budget, request_id: str, now: float) -> Verdict:
        if self._deny:
            return Verdict("store", 0, 0.0, 1.0)
        if budget.concurrency and len(budget.in_flight) >= math.ceil(budget.concurrency / self.gateways):
            return Verdict("concurrency", 0, 0.0, 1.0)
        remaining, reset = 0, 0.0
        if budget.rpm:
            interval = MINUTE * self.gateways / budget.rpm
            after = max(budget.arrival, now) + interval
            reset = after - now
            if reset > MINUTE:
                return Verdict("rpm", 0, reset - interval, reset - MINUTE)
            budget.arrival = after
            remaining = int((MINUTE - reset) / interval)
        self.local += 1
        self._enter(budget, request_id)
        return Verdict("", remaining, reset, 0.0)
