"""Whether a model has become far slower on a node than it was there at first, as on a CPU.

A node's `/api/ps` may say that a model is on the GPU after Ollama fell back to the CPU. Speeds are tokens/s of a stream
after its first token. Several streams share what a node has: one of n counts n times, or a crowd would look like a CPU;
the speed that it is compared with does not, as n together are faster than one alone.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

SAMPLES: Final = 8
"""So many streams make the first speed; so many in a row must be slow."""
SPAN: Final = 10.0
"""They must be spread over so long (seconds): something else may hold all of them up for a moment."""
FALLEN: Final = 6.0
"""The fastest of them is so many times slower than it was. A CPU is ten to fifty times slower than its GPU."""
RESTORED: Final = FALLEN / 2
"""What is less slow than that is as fast as it was again."""
AGAIN: Final = 3
"""So many streams say so, by their median."""
STREAMS: Final = 64
"""Streams of a node that are remembered to see who ran beside whom."""


class Streams:
    """When a node's last streams ran."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=STREAMS)

    def note(self, began: float, ended: float) -> float:
        """One ran; how many did so on average meanwhile, by those known so far, itself among them."""
        shared = sum(max(0.0, min(ended, end) - max(began, begin)) for begin, end in self._last)
        self._last.append((began, ended))
        return 1.0 + shared / (ended - began) if ended > began else 1.0


class Pace:
    """How fast a model is on a node. ``version`` is what is compared at all (its file, its size in memory).

    ``good`` is the median of the first streams, or the best that later ones had (tokens/s), 0.0 until it is known;
    ``fallen``: it is far below that now, and ``last`` how fast it was then.
    """

    def __init__(self, version: object = None) -> None:
        self.version = version
        self.good = 0.0
        self.last = 0.0
        self.fallen = False
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=SAMPLES)

    def note(self, speed: float, beside: float, at: float) -> None:
        """A stream that ended at `at` (seconds) had this speed, as one of so many."""
        self._seen.append((at, speed, speed * beside))
        shared = [one for _, _, one in self._seen]
        if self.fallen:
            if len(shared) >= AGAIN and median(shared[-AGAIN:]) * RESTORED > self.good:
                self.restart()
        elif len(shared) == SAMPLES:
            alone = median([one for _, one, _ in self._seen])
            slow = max(shared) * FALLEN < self.good
            if slow and at - min(when for when, _, _ in self._seen) >= SPAN:
                self.fallen, self.last = True, alone
                self._seen.clear()
            self.good = max(self.good, alone)

    def restart(self) -> None:
        """It was loaded anew, or is as fast as it was: what it was is known, what it is now is not."""
        self.fallen = False
        self._seen.clear()
