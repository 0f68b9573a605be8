"""What is asked of each model, and what it costs to have so many copies of it. Times are seconds of one clock."""

from __future__ import annotations

import math

WINDOW = 300.0
"""How long arrivals are remembered: their weight falls by 1/e in this time."""
FAST = 30.0
"""The same for a rush, which counts by `RUSH`."""
RUSH = 0.6
NOBODY = 1e-6
"""Fewer arrivals a second (one in 11 days) are none: with a load of ten minutes they are 0.0006 s of waiting in a
second, a third of what an exchange must save. A model asked once is there after 40 minutes."""
BACKLOG = 30.0
"""Those who wait count as if they came again within this time."""
BUSIEST = 0.9
"""Above this share of its slots a model falls behind."""
HORIZON = 60.0
"""How far ahead a model that falls behind is thought to go on doing so."""


class Rate:
    """Arrivals a second, decayed; refused ones count like others: what nobody could serve is still wanted."""

    __slots__ = ("_at", "_began", "_fast", "_slow")

    def __init__(self, now: float) -> None:
        self._began = self._at = now
        self._slow = self._fast = 0.0

    def note(self, now: float, count: float = 1.0) -> None:
        """`count` requests came."""
        self._decay(now)
        self._slow += count / WINDOW
        self._fast += count / FAST

    def value(self, now: float) -> float:
        """Arrivals a second."""
        self._decay(now)
        # Of what is known for a short time, less than the whole window is known.
        known = -math.expm1(-max(FAST, now - self._began) / WINDOW)
        rate = max(self._slow / known, RUSH * self._fast)
        return rate if rate >= NOBODY else 0.0

    def _decay(self, now: float) -> None:
        passed = now - self._at
        if passed > 0:
            self._slow *= math.exp(-passed / WINDOW)
            self._fast *= math.exp(-passed / FAST)
            self._at = now


class Mean:
    """A decayed mean, such as of the seconds that a model's requests take; `first` until something is known."""

    __slots__ = ("_known", "share", "value")

    def __init__(self, first: float, share: float = 0.05) -> None:
        self.value = first
        self.share = share
        self._known = 0

    def note(self, value: float) -> None:
        """Something was measured."""
        self._known += 1
        self.value += max(self.share, 1.0 / self._known) * (value - self.value)


def wait(slots: int, busy: float, seconds: float) -> float:
    """The mean wait for one of `slots` (Erlang's C formula), `busy` of which are wanted on average.

    `seconds` is how long a request takes. `busy` must be below `slots`.
    """
    blocked = 1.0
    for number in range(1, slots + 1):
        blocked = busy * blocked / (number + busy * blocked)
    waits = slots * blocked / (slots - busy * (1.0 - blocked))
    return waits * seconds / (slots - busy)


def cost(rate: float, waiting: int, seconds: float, load: float, slots: int) -> float:
    """What having `slots` for a model costs: seconds that its callers wait, in each second.

    `rate` is arrivals a second, `waiting` who waits now, `seconds` how long a request takes, `load` how long a load.
    Where there is no slot, each caller waits for a load, and then as if there were one.
    """
    rate += waiting / BACKLOG
    if rate <= 0.0:
        return 0.0
    if slots <= 0:
        return rate * load + cost(rate, 0, seconds, load, 1)
    busy = rate * seconds
    most = BUSIEST * slots
    if busy <= most:
        return rate * wait(slots, busy, seconds)
    behind = (busy - most) / slots
    return rate * (wait(slots, most, seconds) + behind * HORIZON)
