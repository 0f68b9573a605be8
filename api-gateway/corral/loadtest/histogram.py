"""Samples with bounded memory: exact while they are few, then in buckets 1% wide."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

_GROWTH = math.log(1.01)
_LEAST = 1e-7


class Histogram:
    """Values from 0 on. Up to ``exact_max`` of them are kept; beyond, a percentile is within 0.5% of the sample's.

    Count, sum, deviation, least and greatest are always exact. Buckets: at most about 3,500 for 100 ns to a year.
    """

    __slots__ = ("_buckets", "_exact_max", "_samples", "_sorted", "count", "greatest", "least", "squares", "total")

    def __init__(self, exact_max: int = 20_000) -> None:
        self.count = 0
        self.total = self.squares = 0.0
        self.least, self.greatest = math.inf, 0.0
        self._exact_max = exact_max
        self._samples: array[float] | None = array("d")
        self._sorted = True
        self._buckets: dict[int, int] = {}

    @property
    def exact(self) -> bool:
        """Whether each sample is kept."""
        return self._samples is not None

    def add(self, value: float) -> None:
        """Take one sample."""
        self.extend((value,))

    def extend(self, values: Iterable[float]) -> None:
        """Take samples."""
        for value in values:
            self.count += 1
            self.total += value
            self.squares += value * value
            self.least = min(self.least, value)
            self.greatest = max(self.greatest, value)
            if self._samples is None:
                self._put(value, 1)
            else:
                self._samples.append(value)
                self._sorted = False
                if len(self._samples) > self._exact_max:
                    self._fold()

    def merge(self, other: Histogram) -> None:
        """Take another's samples too."""
        if other._samples is not None:
            self.extend(other._samples)
            return
        self._fold()
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        for index, number in other._buckets.items():
            self._buckets[index] = self._buckets.get(index, 0) + number

    def _fold(self) -> None:
        samples, self._samples = self._samples, None
        for value in samples or ():
            self._put(value, 1)

    def _put(self, value: float, number: int) -> None:
        index = math.floor(math.log(value) / _GROWTH) if value > _LEAST else math.floor(math.log(_LEAST) / _GROWTH)
        self._buckets[index] = self._buckets.get(index, 0) + number

    @property
    def mean(self) -> float:
        """The average; 0 without samples."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation of the samples; 0 for fewer than two."""
        if self.count < 2:
            return 0.0
        return math.sqrt(max(0.0, (self.squares - self.total * self.mean) / (self.count - 1)))

    def percentile(self, share: float) -> float:
        """The least sample that at least ``share`` percent of them do not exceed; 0 without samples."""
        return self.percentiles([share])[0]

    def percentiles(self, shares: Iterable[float]) -> list[float]:
        """The same for ascending shares."""
        if not self.count:
            return [0.0 for _ in shares]
        # Rounded first: 0.95 * 100 must not be 95.00000000000001, whose ceiling is another rank.
        ranks = [min(self.count, max(1, math.ceil(round(share / 100 * self.count, 6)))) for share in shares]
        if self._samples is not None:
            if not self._sorted:
                self._samples = array("d", sorted(self._samples))
                self._sorted = True
            return [self._samples[rank - 1] for rank in ranks]
        found, seen, buckets = [], 0, iter(sorted(self._buckets.items()))
        value = self.least
        for rank in ranks:
            while seen < rank:
                index, number = next(buckets)
                seen += number
                value = math.exp((index + 0.5) * _GROWTH)
            found.append(min(self.greatest, max(self.least, value)))
        return found
