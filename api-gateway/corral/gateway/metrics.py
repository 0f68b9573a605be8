"""What a gateway counts: plain numbers, cheap enough for the token path. `corral.gateway.exposition` shows them.

A model is a label only if a node holds it or the catalogue names it, so that no caller can invent one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.fleet.node import canonical_name
from corral.store.budget import REASONS as LIMIT_REASONS
from corral.wire.decode import DECODERS

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.records import Settled
    from corral.gateway.recover import Failure
    from corral.gateway.snapshot import Snapshot

DURATION: Final[tuple[float, ...]] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
BETWEEN: Final[tuple[float, ...]] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
QUEUE = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
RATE = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 400.0)

REASONS: Final = {400: "bad_request", 401: "unauthorized", 404: "not_found", 413: "too_large", 431: "too_large"}
"""Refusals that their status explains; of a 429 or 503 the exchange knows more."""
EVERY_REASON = (
    *("unauthorized", "not_found", "bad_request", "too_large", "store", "no_node", "recording", "crashing"),
    *LIMIT_REASONS[1:],
    "other",
)
ANSWERED: Final = frozenset(("ok", "upstream_error", "timeout", "client_gone", "cancelled"))
RETRIED = ("connect", "reset", "down", "crash", "node", "timeout", "nonsense", "missing")
CONTINUATIONS = ("ok", "failed", "client_gone", "cancelled", "no_node", "ineligible")
"""What became of answers that their node left after the first token."""
WHOLE: Final = frozenset(("/api/embed", "/api/embeddings", "/api/show"))
"""Routes whose answer has no tokens that could be timed."""


def bucket(bounds: tuple[float, ...], value: float) -> int:
    """The first bucket whose bound is no less than a value; the one behind all where none is."""
    # Compiled, a look at each is a tenth of a call of bisect: most values are small, and none has many bounds.
    for at in range(len(bounds)):
        if value <= bounds[at]:
            return at
    return len(bounds)


class Histogram:
    """Counts by bucket: ``counts[i]`` are values up to ``bounds[i]``, the last one those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bucket(self.bounds, value)] += 1
        self.total += value


class OfModel:
    """What is counted of one model (its label)."""

    __slots__ = ("between", "first_token", "generated", "prompt", "queue", "rate")

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN)
        self.between = Histogram(BETWEEN)
        self.queue = Histogram(QUEUE)
        self.rate = Histogram(RATE)
        self.prompt = self.generated = 0


class Pace:
    """The time between the pieces of one answer. ``last`` is monotonic seconds."""

    __slots__ = ("_between", "last")

    def __init__(self, between: Histogram, now: float) -> None:
        self._between = between
        self.last = now

    def piece(self, now: float) -> None:
        """The next piece came."""
        between = self._between
        gap = now - self.last
        self.last = now
        between.counts[bucket(BETWEEN, gap)] += 1
        between.total += gap


class Ended:
    """Requests of one route and model (its label) that ended alike."""

    __slots__ = ("api", "count", "duration", "label", "of", "outcome", "refused", "route", "status")

    def __init__(self, record: Settled, label: str, duration: Histogram) -> None:
        self.route, self.api, self.outcome, self.status = record.route, record.api, record.outcome, record.status
        self.label, self.duration = label, duration
        self.of: OfModel | None = None  # until a node has heard of one
        self.refused = record.outcome not in ANSWERED
        self.count = 0


class Metrics:
    """All counters of a gateway. ``ended`` are requests by (route, API, model as asked for, outcome, status).

    ``ignored`` are fields of bodies that mean nothing here, by route.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.ended: dict[tuple[str, str, str, str, int], Ended] = {}
        self.durations: dict[tuple[str, str], Histogram] = {}
        self.models: dict[str, OfModel] = {}
        self.refusals: dict[str, int] = dict.fromkeys(EVERY_REASON, 0)
        self.ignored: dict[str, int] = dict.fromkeys(DECODERS, 0)
        self.continuations: dict[str, int] = dict.fromkeys(CONTINUATIONS, 0)
        self.retries: dict[str, int] = dict.fromkeys(RETRIED, 0)

    def label(self, model: str) -> str:
        """The model's full name, "" where the fleet does not know it."""
        name = canonical_name(model)
        snapshot = self._snapshot
        return name if name in snapshot.held or name in snapshot.policies else ""

    def of(self, label: str) -> OfModel:
        """What is counted of a model."""
        known = self.models.get(label)
        if known is None:
            known = self.models[label] = OfModel()
        return known

    def first_token(self, exchange: Exchange, now: float) -> Pace | None:
        """The first token of an answer came; what times the rest, None where there is nothing to time."""
        if exchange.path in WHOLE:
            return None
        known = self.of(self.label(exchange.model))
        known.first_token.observe(now - exchange.arrived)
        return Pace(known.between, now)

    def retried(self, failure: Failure) -> None:
        """An attempt failed, and another one is made."""
        name = failure.name.lower()
        self.retries[name] = self.retries.get(name, 0) + 1

    def settled(self, exchange: Exchange, record: Settled) -> None:
        """A request ended."""
        key = (record.route, record.api, record.model, record.outcome, record.status)
        ended = self.ended.get(key)
        if ended is None:
            ended = self._ended(record)
        ended.count += 1
        seconds = record.ms / 1e3
        duration = ended.duration
        duration.counts[bucket(DURATION, seconds)] += 1
        duration.total += seconds
        if ended.refused:
            self._refused(exchange, ended.status)
        if not record.attempts:
            return
        decoded = exchange.decoded
        if decoded is not None and decoded.ignored:
            self.ignored[record.route] += decoded.ignored
        of = ended.of
        if of is None:
            of = ended.of = self.of(ended.label)
        of.queue.observe(record.queue_ms / 1e3)
        tokens = record.tokens
        of.prompt += record.prompt_tokens
        of.generated += tokens
        first = record.ttft_ms
        if tokens > 1 and first is not None and ended.outcome == "ok":
            # The first token ends the prompt's time; the others are what was written in the rest.
            of.rate.observe((tokens - 1) / max(1e-6, seconds - first / 1e3))

    def _ended(self, record: Settled) -> Ended:
        # A model that the fleet does not know is never a key: names that callers invent take no memory.
        label = self.label(record.model) if record.model else ""
        key = (record.route, record.api, record.model if label else "", record.outcome, record.status)
        ended = self.ended.get(key)
        if ended is None:
            place = (record.route, label)
            duration = self.durations.get(place)
            if duration is None:
                duration = self.durations[place] = Histogram(DURATION)
            ended = self.ended[key] = Ended(record, label, duration)
        return ended

    def _refused(self, exchange: Exchange, status: int) -> None:
        reason = exchange.refusal or REASONS.get(status)
        if reason is None:
            # Past its limits, so what was missing is a node.
            reason = "no_node" if status == 503 and exchange.decoded is not None else "other"
        self.refusals[reason] += 1
