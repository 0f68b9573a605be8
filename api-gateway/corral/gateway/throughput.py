"""How much gets done in a second, as it was lately."""

from __future__ import annotations

from math import exp
from time import monotonic
from typing import Final

LATELY: Final = 10.0
"""After so many seconds what was done counts e times less."""


class Throughput:
    """An exponentially decayed mean of what is done in a second."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = 0.0

    def done(self, amount: int) -> None:
        """So much got done now."""
        self._decay()
        self._sum += amount

    def time_for(self, amount: int, most: float) -> float:
        """Seconds that so much takes; `most` where that is longer, or nothing got done lately."""
        self._decay()
        rate = self._sum / LATELY
        return min(most, max(0, amount) / rate) if rate > 0.0 else most

    def _decay(self) -> None:
        now = monotonic()
        self._sum *= exp((self._at - now) / LATELY)
        self._at = now
