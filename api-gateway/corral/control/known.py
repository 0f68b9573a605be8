"""What the leader knows of a model besides where it stands: what is asked of it, and what was decided about it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from corral.fleet.demand import Mean, Rate
from corral.fleet.placement import Demand
from corral.store.demand import Seen

LOAD = 10.0
"""How long a load is thought to take (seconds) until one was measured."""
SECONDS = 4.0
SAMPLE = 0.45
"""So far apart (seconds) busy slots are counted for their mean, however often the leader looks."""
REASONS = 20
REBUILD = 3.0
"""For so long at most a store that was flushed is not believed (seconds): longer than it waits for its gateways."""
SHORT = 10.0
"""How long a model has fewer copies than it should before one is loaded (seconds): others may be about to do it."""


@dataclass(slots=True)
class Known:
    """Of a model: arrivals, busy slots and when they were counted last, load times, since when requests wait and copies
    are missing, decisions and why. Times are monotonic seconds."""

    rate: Rate
    asked: int
    busy: Mean = field(default_factory=lambda: Mean(0.0))
    load: Mean = field(default_factory=lambda: Mean(LOAD, 0.3))
    counted: float = -SAMPLE
    waits_since: float | None = None
    short_since: float | None = None
    reasons: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=REASONS))

    def look(self, seen: Seen, now: float) -> None:
        """What the store has of it now."""
        self.rate.note(now, max(0, seen.asked - self.asked))
        self.asked = seen.asked
        if now - self.counted >= SAMPLE:
            self.counted = now
            self.busy.note(float(sum(seen.used.values())))
        self.waits_since = (self.waits_since or now) if seen.waiting else None

    def wanted(self, now: float) -> bool:
        """Whether callers wait for it, or came so lately that it is loaded for those to come."""
        return self.waits_since is not None or self.rate.value(now) > 0.0

    def tell(self, demand: Demand, waiting: int, now: float) -> None:
        """Write down what is asked of it; of a disabled model nothing is, whoever came before."""
        demand.load = self.load.value
        if demand.disabled:
            return
        demand.rate, demand.waiting = self.rate.value(now), waiting
        demand.oldest = now - self.waits_since if self.waits_since is not None else 0.0
        # Little's law: so many run at once as come in the time that one takes.
        demand.seconds = min(600.0, max(0.1, self.busy.value / demand.rate)) if demand.rate > 0.001 else SECONDS

    def copies(self, wanted: int, standing: int, able: int, working: bool, now: float) -> int:
        """How many copies it is to have now, of those that the catalogue wants; ``able``: nodes that could have one.

        ``working``: others may be about to load it.
        """
        if standing >= min(wanted, able) or working:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = now
        short = self.short_since is not None and now - self.short_since >= SHORT
        return min(wanted, max(standing, able if short else 0))

    def note(self, now: float, text: str) -> None:
        """Something was decided, and why; what was said last is not said again."""
        if not self.reasons or self.reasons[-1][1] != text:
            self.reasons.append((now, text))


class Rebuilt:
    """Whether what a store has of slots is whole: one that was flushed has yet to hear what runs and who waits."""

    def __init__(self) -> None:
        self._ever, self._since = False, 0.0

    def whole(self, before: bytes | None, after: bytes | None, now: float) -> bool:
        """`before` and `after` a look: since when it grants, as it says itself; `now` is monotonic seconds."""
        if before is not None and before == after:
            self._ever, self._since = True, 0.0
            return True
        if not self._ever:
            return True  # nobody has asked for a slot yet
        self._since = self._since or now
        return now - self._since >= REBUILD  # there is no gateway that could tell it
