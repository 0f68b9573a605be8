"""Step 6: who gets a slot, where and when. The store decides for all gateways (`corral.store.slots`), or this one does.

A request asks for its slot in the call that asks its limits (step 5). It gets a node, or waits for one with a ticket;
then its turn is told. While the store is away, it asks for a slot of this gateway's share (`local.py`); while nobody
leads, gateways say to the store where a model may be used. The slot is given back when the attempt is over, and each
further attempt asks anew, at the head of those who wait.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

from corral.fleet.dispatch import Affinity, beginnings
from corral.fleet.node import Node, canonical_name
from corral.fleet.pools import counted
from corral.fleet.slots import ABORTED_MAX, cool_down
from corral.fleet.tickets import (
    EMBED_KIND,
    HEAD,
    LATE,
    LONG,
    LONG_KIND,
    NEVER,
    PICKY,
    SHORT_KIND,
    estimate,
    head,
    wait_bound,
)
from corral.gateway.admit import EMBEDS
from corral.gateway.avoid import avoided, unfit
from corral.gateway.decode import SHOW, may_go_on
from corral.gateway.local import Local, stand_in
from corral.gateway.recover import LOST, SHUN, Failure, shun
from corral.store.slots import Answer, Slots, Wanted
from corral.wire.errors import ApiError, jittered

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

_PLACE: Final = b"X-Corral-Queue-Position: "
_AVOIDED = (LATE, NEVER)
PREFILL_US: Final = 400
DECODE_US: Final = 20_000
"""What a token of a prompt and one of an answer take at a guess (us): it is for the order of those who wait."""
COST_MAX: Final = 600_000_000
BOUNCES_MAX: Final = 8
BYTES_MAX: Final = 256 << 20
"""Of the bodies of those who wait: who would exceed it is refused, unless it had a turn or has waited (`HEAD`)."""
LEARN: Final = 0.1
SECONDS: Final = 4.0
RETRY_MAX: Final = 60.0
DRAIN: Final = 2.1
"""The longest of four requests that run takes so many times as long as they take on average (1 + 1/2 + 1/3 + 1/4)."""
DRAIN_MAX: Final = 4.0
"""Times `queue.wait`: no answer that once took long has everybody wait for longer."""


class Queue:
    """Slots and tickets of a gateway. ``waiting`` is who waits, by what it asked for, ``bytes`` what they have sent."""

    def __init__(self, gateway: Gateway, name: str, length: int, wait: float) -> None:
        self._gateway = gateway
        self._wait = wait
        self.slots = Slots(gateway.store, name, length)
        self.local = Local(self.slots, name, length)
        self.slots.on_back = self._to_store
        self.affinity = Affinity()
        self.waiting: dict[str, Exchange] = {}
        self.full = self.overdue = self.bytes = 0
        self._troubled: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._ages: dict[str, float] = {}

    # -- for an exchange

    def want(self, exchange: Exchange) -> Wanted | None:
        """What a request asks for; None where it needs no slot, or no node that is ready holds its model."""
        decoded = exchange.decoded
        if decoded is None or decoded.upstream_path == SHOW:
            return None
        pool = self._gateway.snapshot.pool(exchange.tenant)
        name = canonical_name(decoded.model)
        if name not in pool.ready:
            return None
        first = not exchange.asked
        kept = pool.others
        if not first or self._troubled or self._gateway.health.canaries or self._gateway.snapshot.on_cpu:
            kept += avoided(self._gateway, exchange, pool, name, self._troubled, monotonic())
        if exchange.resumption is not None:
            # Its requests are small, and go to one path or another.
            kind = SHORT_KIND
        elif decoded.upstream_path in EMBEDS:
            kind = EMBED_KIND
        else:
            kind = LONG_KIND if decoded.estimate > LONG else SHORT_KIND
        words = kept
        if kind != EMBED_KIND and exchange.resumption is None and len(pool.nodes) > 1:
            if first:
                exchange.beginnings = beginnings(exchange.tenant, name, decoded.body)
            if exchange.beginnings:
                words = self.affinity.preferred(exchange.beginnings) + kept
        if kept:
            kind += PICKY
        id = exchange.record_id
        if not first:
            id = f"{id}~{exchange.asked}"
            turn = not exchange.fresh and (exchange.attempts or exchange.bounced)
            words = (HEAD if turn else _since(exchange, monotonic()), *words)
        exchange.asked += 1
        bound = decoded.max_tokens
        answer = 0 if kind % PICKY == EMBED_KIND else self._gateway.answer_tokens if bound is None else bound
        cost = min(COST_MAX, decoded.reads * PREFILL_US + answer * DECODE_US + 1000)
        key = exchange.key
        batch, weight = (False, 1.0) if key is None else (key.batch, key.weight)
        return Wanted(id, counted(name, pool.group), kind, exchange.key_id or "-", cost, weight, batch, words)

    def go(self, exchange: Exchange, now: float) -> None:
        """Go on with a request as far as its answer lets it: to its node, into the queue, or to a refusal."""
        wanted, answer = exchange.wanted, exchange.answer
        assert wanted is not None
        if answer is None and not self.slots.missed:
            self.slots.ask(wanted, exchange.slot_heard)  # it could not be, in the call of the limits
            return
        if answer is None or answer.away:
            answer = self._locally(exchange, wanted, now)
        if answer.node:
            self._leave_queue(exchange, wanted)
            if self.local.active:
                self.local.hold(wanted, now)
            node = self._gateway.snapshot.pool(exchange.tenant).nodes.get(answer.node)
            if node is None or unfit(node, wanted, now):
                self._bounce(exchange, answer.node, now)
            else:
                if exchange.beginnings:
                    self.affinity.note(exchange.beginnings, node.name)
                if exchange.suspect:
                    self._gateway.crashing.begin(exchange, node, now)
                else:
                    exchange.begin(node, now)
        elif answer.full:
            exchange.give_up(self.refused(exchange, answer), "overloaded")
        elif exchange.waiting:
            return
        elif self.bytes + _size(exchange) > BYTES_MAX and head(wanted.preferred) is None:
            exchange.give_up(self.refused(exchange, answer), "overloaded")
        else:
            exchange.waiting = True
            exchange.waiting_bytes = _size(exchange)
            self.bytes += exchange.waiting_bytes
            self.waiting[wanted.id] = exchange
            self._gateway.running.add(exchange)
            if not exchange.wait_until:
                if not exchange.queued_at:
                    self._told(exchange, answer.position, answer.slots, answer.load)
                exchange.queued_at = now
                exchange.wait_until = now + self._bound(exchange, answer)

    def again(self, exchange: Exchange, now: float) -> None:
        """Ask for the slot of a further attempt."""
        self.leave(exchange)
        if not may_go_on(exchange):
            return
        exchange.nodeless_since = exchange.nodeless_since or now
        wanted = exchange.wanted = self.want(exchange)
        if wanted is None:
            exchange.unslotted(now)
            return
        self.go(exchange, now)

    def leave(self, exchange: Exchange, cool: float = 0.0) -> None:
        """Give back what a request holds, a slot after so many seconds or a ticket; nothing where it holds none."""
        exchange.runner = None
        wanted = exchange.wanted
        if wanted is None:
            return
        exchange.wanted = exchange.answer = None
        self._leave_queue(exchange, wanted)
        if cool > 0.0 and wanted.node:
            self._gateway.loop.call_later(cool, self.end, wanted.id)
        else:
            self.end(wanted.id)

    def let_go(self, exchange: Exchange) -> None:
        """Give back what a request holds that was aborted: its slot, and its key's place, once its node has let go."""
        cool, wanted = self.cooling(exchange), exchange.wanted
        if wanted is not None and wanted.node:
            exchange.cool = monotonic() + cool
        self.leave(exchange, cool)

    def end(self, id: str) -> None:
        """Give back what was asked for under an id."""
        self.slots.end(id)
        if self.local.active:
            self.local.end(id, monotonic())

    def cooling(self, exchange: Exchange) -> float:
        """For how long a slot stays taken whose request is aborted now (seconds)."""
        decoded = exchange.decoded
        if decoded is None or exchange.first_token:
            return cool_down(True, 0.0, 0.0)
        rate = self._gateway.health.rates(decoded).of(exchange.model)
        began = exchange.deadline - self._gateway.first_token
        left = decoded.reads - (monotonic() - began) * rate
        return cool_down(False, max(0.0, left), rate) if decoded.reads else ABORTED_MAX

    def read(self, exchange: Exchange, now: float) -> None:
        """A request's first token is there."""
        wanted = exchange.wanted
        if wanted is not None and wanted.reads:
            self.slots.read(wanted.id)
            if self.local.active:
                self.local.read(wanted.id, now)

    def shun(self, node: Node, failure: Failure, model: str, now: float) -> None:
        """A node has failed a request: for a moment it is used only where no other has the model (`recover.shun`)."""
        shun(node, failure, model, now)
        missing = failure is Failure.MISSING
        if not missing and node.name not in self._troubled:
            self.affinity.forget(node.name)
        until = now + (LOST if missing else SHUN)
        self._troubled[node.name] = max(until, self._troubled.get(node.name, 0.0))

    def note(self, model: str, seconds: float) -> None:
        """A request of a model has taken a slot for so long."""
        model = canonical_name(model)
        known = self._seconds.get(model)
        self._seconds[model] = seconds if known is None else known + LEARN * (seconds - known)

    def too_late(self, exchange: Exchange) -> ApiError:
        """The error for a request that has waited for as long as it may."""
        self.overdue += 1
        answer = exchange.answer
        at = answer.position if answer is not None else 1
        slots = answer.slots if answer is not None else 1
        seconds = self._estimate(exchange, at, slots)
        waited = monotonic() - exchange.queued_at
        return self._overloaded(f"no slot for '{exchange.model}' within {waited:.0f} s", seconds)

    def refused(self, exchange: Exchange, answer: Answer) -> ApiError:
        """The error for a request that may not even wait."""
        self.full += 1
        self._told(exchange, answer.position + 1, answer.slots, answer.load)
        seconds = self._estimate(exchange, answer.position, max(1, answer.slots))
        return self._overloaded(f"{answer.position} requests wait for '{exchange.model}' already", seconds)

    def seconds(self, model: str) -> float:
        """For how long a request of a model takes a slot, at a guess: as those took that have ended, or as those have
        taken on average that run, who may be longer ones."""
        model = canonical_name(model)
        return max(self._seconds.get(model, SECONDS), self._ages.get(model, 0.0))

    # -- for the gateway

    def sweep(self, now: float) -> None:
        """Look after who waits. Each half second."""
        self._troubled = {name: until for name, until in self._troubled.items() if until > now}
        slots, local = self.slots, self.local
        local.names = self._gateway.limits.sharing.names
        if slots.counts and not slots.led and slots.waiting:
            stand_in(slots, self._gateway.snapshot)
        if slots.missed and (slots.waiting or slots.early):
            self._to_local(now)
        if local.active:
            local.look(self._gateway.snapshot, now)
        self._ages = self._running(now) if self.waiting else {}
        for exchange in list(self.waiting.values()):
            try:
                self._look_after(exchange, now)
            except Exception:
                exchange.broken()

    # -- within

    def _running(self, now: float) -> dict[str, float]:
        """For how long those that run have, on average, by model (seconds)."""
        found: dict[str, list[float]] = {}
        for exchange in self._gateway.running:
            if not exchange.waiting:
                name = canonical_name(exchange.model)
                found.setdefault(name, []).append(now - exchange.arrived - exchange.queued(now) / 1e3)
        return {model: sum(ages) / len(ages) for model, ages in found.items()}

    def _look_after(self, exchange: Exchange, now: float) -> None:
        """See whether one that waits may still have what it waits for, and what it is kept from by now."""
        wanted, snapshot = exchange.wanted, self._gateway.snapshot
        if wanted is None or not may_go_on(exchange):
            return
        pool, name = snapshot.pool(exchange.tenant), canonical_name(exchange.model)
        if name not in pool.held:
            self.leave(exchange)
            exchange.unslotted(now)
        elif counted(name, pool.group) != wanted.model:
            self.again(exchange, now)
        elif wanted.kind >= PICKY:
            others = tuple([word for word in wanted.preferred if word[0] not in _AVOIDED])
            words = others + pool.others + avoided(self._gateway, exchange, pool, name, self._troubled, now)
            if words != wanted.preferred:
                wanted.preferred = words  # the store hears it when it is asked again
                self.local.prefer(wanted, now)

    def _to_local(self, now: float) -> None:
        """The store is away: its tickets wait here from now on."""
        slots, local = self.slots, self.local
        if not local.active:
            local.names = self._gateway.limits.sharing.names
            local.begin(now)
        for id in (*slots.waiting, *slots.early):
            exchange = self.waiting.get(id)
            if exchange is not None and exchange.wanted is not None:
                slots.end(id)
                self._move(exchange.wanted, now)
                exchange.slot_heard(Answer(away=True))

    def _to_store(self) -> None:
        """The store is back: who waits here is asked for there, once that has heard of what runs."""
        if self.local.active:
            now = monotonic()
            for one in self.local.end_all():
                self._move(one.wanted, now)
                self.slots.ask(one.wanted, one.heard)

    def _move(self, wanted: Wanted, now: float) -> None:
        """Have one that waits, and moves to the other queue, keep its place by how long it has waited."""
        words, exchange = wanted.preferred, self.waiting.get(wanted.id)
        if HEAD not in words and exchange is not None:
            wanted.preferred = (_since(exchange, now), *[word for word in words if word[0] != HEAD])

    def _leave_queue(self, exchange: Exchange, wanted: Wanted) -> None:
        if exchange.waiting:
            exchange.waiting = False
            self.bytes -= exchange.waiting_bytes
            self.waiting.pop(wanted.id, None)

    def _locally(self, exchange: Exchange, wanted: Wanted, now: float) -> Answer:
        if not self.local.active:
            self._to_local(now)  # who waits already comes first
        snapshot = self._gateway.snapshot
        pool, name = snapshot.pool(exchange.tenant), canonical_name(exchange.model)
        answer = self.local.ask(wanted, exchange.slot_heard, snapshot, pool, name, now)
        exchange.answer = answer
        return answer

    def _bounce(self, exchange: Exchange, name: str, now: float) -> None:
        exchange.bounced += (name,)
        if len(exchange.bounced) > BOUNCES_MAX:
            self.leave(exchange)
            exchange.give_up(self._overloaded(f"no node that holds '{exchange.model}' is ready", 1.0), "overloaded")
        else:
            self.again(exchange, now)

    def _bound(self, exchange: Exchange, answer: Answer) -> float:
        if exchange.resumption is not None:
            return self._gateway.between_tokens
        placed = answer.slots > 0
        drain = 0.0 if placed else self._drain(exchange.tenant)
        return wait_bound(self._wait, answer.load, drain, placed)

    def _drain(self, tenant: str) -> float:
        """How long it may take until one of a tenant's nodes runs nothing (seconds)."""
        nodes = self._gateway.snapshot.pool(tenant).nodes.values()
        taking = [self._seconds.get(name, SECONDS) for node in nodes for name in node.resident]
        return min(DRAIN * max(taking, default=0.0), DRAIN_MAX * self._wait)

    def _estimate(self, exchange: Exchange, position: int, slots: int, load: float = 0.0) -> float:
        return estimate(position, slots, self.seconds(exchange.model), load)

    def _told(self, exchange: Exchange, position: int, slots: int, load: float) -> None:
        """Have its answer say which place it had when it came, and for how long it was to wait then at a guess."""
        if exchange.own_headers.find(_PLACE) >= 0:
            return  # of a further batch, or of one that is refused after all
        wait = self._estimate(exchange, position, slots, load)
        lines = b"%b%d\r\nX-Corral-Queue-Estimate-Ms: %d\r\n"
        exchange.own_headers += lines % (_PLACE, position, int(wait * 1e3))

    def _overloaded(self, message: str, seconds: float) -> ApiError:
        retry = jittered(min(RETRY_MAX, max(1.0, seconds)))
        return ApiError(503, "overloaded", f"{message}; retry in {retry} s", retry_after=retry)


def _size(exchange: Exchange) -> int:
    """Bytes that are held for one that waits: what its caller sent, and what a node is to get."""
    decoded = exchange.decoded
    return len(exchange.body) + (len(decoded.body) if decoded is not None else 0)


def _since(exchange: Exchange, now: float) -> str:
    """The word for one that has waited already."""
    return f"{HEAD}{max(0, int((now - (exchange.queued_at or now)) * 1e6))}"
