"""Limits of a key and its tenant: one script call a request, or the local share of each limit.

Requests a minute are GCRA (the generic cell rate algorithm, ITU-T I.371): a burst of a minute's requests at most,
refilled evenly. Concurrency is a set of leases that die with their gateway. Tokens are reserved by an estimate and
settled by their count when the request ends: a sliding window for those of a minute, sums for day and month (UTC).
While the store is away each gateway admits its share: what was left of the limit, by what each had in flight and the
key had used, divided by the gateways that were alive when it was last seen (`corral.store.share`). A store that came
back empty says so (REBUILD) and admits nothing before the gateways have told it what it last said
(`corral.store.leases`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import hiredis

from corral.store import share
from corral.store.budget import ACTIVE, CHARGE, EPOCH, LIMITS, MINUTE, REASONS, Budget, reservation, sha
from corral.store.share import Verdict
from corral.store.sharing import Sharing
from corral.store.slots import Heard, Slots, Wanted
from corral.store.valkey import Valkey, ValkeyDown, encode, words

__all__ = ["Limits", "Verdict"]

OWED_MAX = 10_000
OWED_TIMES: Final = 2
TOLD_AT_ONCE: Final = 500
CONCURRENCY: Final = REASONS.index("concurrency")
_CHARGE: Final = sha(CHARGE)

log = logging.getLogger(__name__)


class Limits:
    """Admits and releases requests; ``budget`` objects are the caller's, one per key.

    ``sharing`` are the gateways that share them, ``denied`` the limits (`LIMITS`) whose requests are refused while the
    store is away; the others are shared out.
    """

    def __init__(self, store: Valkey | None, gateway: str, denied: Iterable[str] = ()) -> None:
        self.store = store
        self.gateway = gateway.encode()
        self._denied = [LIMITS.index(name) for name in denied]
        self.busy: dict[str, Budget] = {}
        self.slots: Slots | None = None
        """What asks for a slot in the same call."""
        self.sharing = Sharing(gateway)
        self._kept: dict[str, int] | None = None
        """While the store is away: requests that ran here when it was lost, by the budget's name."""
        self.local = 0
        """Requests that were admitted on the local share."""
        self.owed: dict[Budget, dict[bytes, tuple[int, list[bytes]]]] = {}
        """Requests that ended without the store's hearing of it: how often it is still to be told, and what."""
        self._beyond: dict[Budget, tuple[int, int]] = {}
        """Of what was too much for `owed`: tokens, and requests."""
        self._sums = 0
        self._unsaid: dict[Budget, int] = {}
        """Requests of keys that are not metered which the store is still to count."""
        self._unadopted: dict[Budget, None] = {}
        """Metered keys with requests that run and were admitted without the store."""
        self.on_lost: Callable[[], None] = lambda: None
        self.on_moved: Callable[[], None] = lambda: None
        """Called when the store says that it has lost what it knew, and when another server has taken its place."""
        self.budgets: Callable[[], Iterable[Budget]] = self.busy.values
        """All budgets, and ``find`` one by its name: for what the store is asked and told of them."""
        self.find: Callable[[str], Budget | None] = self.busy.get

    def admit(
        self,
        budget: Budget,
        request_id: str,
        now: float,
        done: Callable[[Verdict], None],
        tokens: int = 0,
        wanted: Wanted | None = None,
        heard: Heard | None = None,
    ) -> None:
        """Decide; `done` gets the verdict, at once where the store is away.

        `now` is monotonic seconds, `tokens` what a request of a metered key will use at a guess. `wanted` is asked for
        in the same call, where ``slots`` are usable: before the verdict, `heard` gets what the store says of it, if it
        was asked and did not refuse the request.
        """
        store = self.store
        if self.slots is None or not self.slots.usable:
            wanted = None
        if budget.metered:
            self._reserve(budget, request_id, now, done, min(tokens, budget.most), wanted, heard)
            return
        if store is None or not store.connected:
            done(self._uncounted(budget, request_id, now))
            return
        if self._unsaid and budget in self._unsaid:
            self._charge(store, budget, self._unsaid[budget])

        def replied(reply: Any) -> None:
            budget.counts(-1)
            if wanted is not None and heard is not None:
                reply = self._apart(reply, wanted, heard)
            if type(reply) is list:
                admitted, reason, remaining, reset, retry = reply
                budget.arrival = budget.said_arrival = max(budget.said_arrival, now + reset / 1e6)
                if admitted:
                    self._enter(budget, request_id, 0)
                    done(Verdict("", remaining, reset / 1e6, 0.0))
                else:
                    after = budget.pause() if reason == CONCURRENCY else retry / 1e6
                    done(Verdict(REASONS[reason], remaining, reset / 1e6, after))
            else:
                done(self._unheard(budget, request_id, now, 0, reply))

        identity = request_id.encode()
        budget.counts(1)
        store.call(b"%b$%d\r\n%b\r\n" % (self._beginning(budget, wanted), len(identity), identity), replied)

    def release(self, budget: Budget, request_id: str, used: int = 0, took: float = 0.0) -> None:
        """End a request that was admitted; `used` is the tokens of prompt and answer, `took` seconds."""
        store = self.store
        if store is not None and not store.connected and self._kept is None:
            self._kept = self._own()
        in_flight = budget.in_flight
        reserved = in_flight.get(request_id)
        if reserved is None:
            return
        del in_flight[request_id]
        if not in_flight:
            self.busy.pop(budget.key_id, None)
        if took:
            for scope in budget.scopes:
                scope.ended(took)
        if budget.metered:
            ended = self._ended(budget, request_id, reserved, used)
        elif budget.concurrency:
            ended = [request_id.encode()]
        else:
            return
        if store is None:
            return
        if not store.connected:
            self._owe(budget, ended)
            return
        if not budget.leaving:
            store.soon(self._leave, store, budget)
        budget.leaving += ended
        budget.counts(1)

    def give_back(self) -> None:
        """Tell of what was admitted, and of what ended, while nobody knew what the store had heard.

        Ends are told twice, at once when it is back and later: what a connection that was given up still held may be
        run after the first time.
        """
        store = self.store
        if store is None:
            return
        for budget, count in list(self._unsaid.items()):
            self._charge(store, budget, count)
        for budget in list(self._unadopted):
            self._adopt(store, budget)
        for budget, (tokens, requests) in list(self._beyond.items()):
            del self._beyond[budget]
            self._sums += 1
            name = b"%b-sum-%d-%d" % (self.gateway, int(time.time()), self._sums)
            self.owed.setdefault(budget, {})[name] = (OWED_TIMES, [b"%d" % tokens, b"-%d" % requests])
        for budget, owed in list(self.owed.items()):
            names = list(owed)
            for first in range(0, len(names), TOLD_AT_ONCE):
                self._tell(store, budget, owed, names[first : first + TOLD_AT_ONCE])

    def owes(self) -> bool:
        """Whether the store is still to hear of requests that ended."""
        return bool(self.owed or self._beyond)

    # -- with the store

    def _beginning(self, budget: Budget, wanted: Wanted | None) -> bytes:
        """The command that admits a request, up to its id."""
        slots = self.slots
        if wanted is None or slots is None:
            return budget.prefix
        count, asking = slots.together(wanted)
        return b"*%d\r\n%b%b%b" % (budget.parts + count, budget.before_slot, asking, budget.after_slot)

    def _apart(self, reply: Any, wanted: Wanted, heard: Heard) -> Any:
        """The limits' answer, of one that has the slot's beside it; that is handed over."""
        slots = self.slots
        assert slots is not None
        if type(reply) is not list:
            slots.answered(wanted, heard, reply)
            return reply
        if len(reply) > 1:
            slots.answered(wanted, heard, reply[1])
        else:
            slots.forget(wanted)
        return reply[0]

    def _reserve(
        self,
        budget: Budget,
        request_id: str,
        now: float,
        done: Callable[[Verdict], None],
        tokens: int,
        wanted: Wanted | None = None,
        heard: Heard | None = None,
    ) -> None:
        store = self.store
        if store is None or not store.connected:
            done(self._locally(budget, request_id, now, tokens))
            return
        if self._unadopted and budget in self._unadopted:
            self._adopt(store, budget)

        def replied(reply: Any) -> None:
            budget.counts(-1)
            if wanted is not None and heard is not None:
                reply = self._apart(reply, wanted, heard)
            if type(reply) is list:
                verdict = share.heard(budget, now, reply)
                if reply[0]:
                    self._enter(budget, request_id, tokens)
                done(verdict)
            else:
                done(self._unheard(budget, request_id, now, tokens, reply))

        budget.counts(1)
        store.call(reservation(self._beginning(budget, wanted), request_id, b"%d" % tokens), replied)

    def _unheard(self, budget: Budget, request_id: str, now: float, tokens: int, reply: Any) -> Verdict:
        # No verdict of the store's: decide without it.
        if reply == 0:
            self.sharing.forgot = self.sharing.forgot or now
            self.on_lost()
            if not budget.metered:
                return self._uncounted(budget, request_id, now)
            return self._locally(budget, request_id, now, tokens)
        if isinstance(reply, hiredis.ReplyError):
            self._refused_by_store(reply)
        verdict = self._locally(budget, request_id, now, tokens)
        # A stalled store may run the call yet, and nobody would give the lease back. If the key is not metered, nobody
        # knows whether it counted for the rate; that is no more than what was sent within one time-out, and is left.
        if verdict.refused:
            identity = request_id.encode()
            self._owe(budget, [identity, b"0", b"-1"] if budget.metered else [identity])
        return verdict

    def _uncounted(self, budget: Budget, request_id: str, now: float) -> Verdict:
        verdict = self._locally(budget, request_id, now, 0)
        if budget.rpm and not verdict.refused:
            self._unsaid[budget] = self._unsaid.get(budget, 0) + 1
        return verdict

    def _charge(self, store: Valkey, budget: Budget, count: int) -> None:
        def heard(reply: Any) -> None:
            if reply != 1:
                self._unsaid[budget] = self._unsaid.get(budget, 0) + count

        del self._unsaid[budget]
        told = budget.rate, EPOCH, ACTIVE, b"%d" % (budget.rpm or 0), b"%d" % count, budget.key_id.encode()
        store.call(encode(b"EVALSHA", _CHARGE, b"3", *told), heard)

    def _adopt(self, store: Valkey, budget: Budget) -> None:
        # What runs and was admitted without the store is counted as if it had been asked.
        def call(request_id: str, reserved: int) -> None:
            def heard(reply: Any) -> None:
                if request_id not in budget.in_flight:
                    return
                if type(reply) is list:
                    budget.in_flight[request_id] = reserved
                else:
                    self._unadopted[budget] = None

            store.call(reservation(budget.prefix, request_id, b"-%d" % reserved), heard)

        del self._unadopted[budget]
        for request_id, reserved in list(budget.in_flight.items()):
            if reserved < 0:
                call(request_id, -1 - reserved)

    def _refused_by_store(self, error: hiredis.ReplyError) -> None:
        log.error("the store refused the admission script: %s", error)
        if self.store is not None:
            self.store.reset()

    def _tell(
        self, store: Valkey, budget: Budget, owed: dict[bytes, tuple[int, list[bytes]]], names: list[bytes]
    ) -> None:
        def heard(reply: Any) -> None:
            if isinstance(reply, Exception) or (budget.metered and reply == 0):
                return
            for name in names:
                left, what = owed.pop(name, (0, []))
                if left > 1:
                    owed[name] = (left - 1, what)
            if not owed:
                self.owed.pop(budget, None)

        told: list[bytes] = []
        for name in names:
            told += [name, *owed[name][1]]
        store.call(encode(*budget.ending, *told), heard)

    def _owe(self, budget: Budget, ended: list[bytes]) -> None:
        if not budget.metered and not budget.concurrency:
            return
        owed = self.owed.setdefault(budget, {})
        step = 3 if budget.metered else 1
        for first in range(0, len(ended), step):
            # The first of a long outage are those that the store can have heard of.
            if len(owed) < OWED_MAX:
                owed[ended[first]] = (OWED_TIMES, ended[first + 1 : first + step])
            elif step == 3:
                tokens, requests = self._beyond.get(budget, (0, 0))
                # Heard or not: that it was a request counts for a minute only, and this outage is longer.
                self._beyond[budget] = tokens + int(ended[first + 1]), requests + 1

    def _leave(self, store: Valkey, budget: Budget) -> None:
        # One command for all that ended in a turn. It is under way before a caller can ask again.
        leaving, budget.leaving = budget.leaving, []

        def heard(reply: Any) -> None:
            budget.counts(-len(leaving) // (3 if budget.metered else 1))
            if isinstance(reply, ValkeyDown):
                self._owe(budget, leaving)
            elif budget.metered and reply != 1:
                self._owe(budget, leaving)
                if isinstance(reply, hiredis.ReplyError):
                    self._refused_by_store(reply)
                else:
                    self.on_lost()

        count = len(budget.ending) + len(leaving)
        store.call(b"*%d\r\n%b%b" % (count, budget.ending_words, words(*leaving)), heard)

    def _enter(self, budget: Budget, request_id: str, reserved: int) -> None:
        budget.in_flight[request_id] = reserved
        if reserved < 0:
            self._unadopted[budget] = None
        self.busy[budget.key_id] = budget
        tenant = budget.tenant
        if tenant is not None:
            tenant.in_flight[request_id] = reserved
            self.busy[tenant.key_id] = tenant

    def _ended(self, budget: Budget, request_id: str, reserved: int, used: int) -> list[bytes]:
        tenant = budget.tenant
        if tenant is not None:
            tenant.in_flight.pop(request_id, None)
            if not tenant.in_flight:
                self.busy.pop(tenant.key_id, None)
        if reserved < 0:
            more = used + 1 + reserved
            for scope in budget.scopes:
                scope.day_spent = max(0, scope.day_spent + more)
                scope.month_spent = max(0, scope.month_spent + more)
                if scope.tpm and more > 0:
                    scope.tokens_arrival += more * MINUTE * self.sharing.count / scope.tpm
        return [request_id.encode(), b"%d" % used, b"%d" % max(-1, reserved)]

    # -- without it

    def _own(self) -> dict[str, int]:
        return {name: len(scope.in_flight) for name, scope in self.busy.items()}

    def back(self) -> None:
        """The store knows of all that runs here, and has said what others use."""
        self._kept, self.sharing.forgot = None, 0.0

    def _at_once(self, scope: Budget) -> int:
        if self._kept is None:
            self._kept = self._own()
        # What came since the store was asked came elsewhere too, and what ended may run elsewhere by now.
        kept = min(self._kept.get(scope.key_id, 0), scope.own)
        return share.at_once(scope.concurrency or 0, kept, scope.others, self.gateway.decode(), self.sharing.names)

    def _locally(self, budget: Budget, request_id: str, now: float, tokens: int) -> Verdict:
        wall = time.time() if budget.metered else 0.0
        scopes, gateways = budget.scopes, self.sharing.count
        share.nothing_known(scopes, self.store, self.sharing.began)
        if self._denied and any([scope.limits()[limit] for scope in scopes for limit in self._denied]):
            return Verdict("store", 0, 0.0, share.back_in(self.store, self.sharing, now))
        refused, retry = "", 0.0
        for scope in scopes:
            if budget.metered:
                scope.roll(wall)
            for limit, wait in share.reached(scope, gateways, now, wall, tokens, self._at_once(scope)):
                if not refused or wait > retry:
                    refused, retry = limit if scope is budget else f"tenant_{limit}", wait
        if not refused:
            self.local += 1
            for scope in scopes:
                share.spend(scope, gateways, now, tokens)
            self._enter(budget, request_id, -1 - tokens if budget.metered else 0)
        return share.verdict(budget, gateways, now, wall, refused, retry)
