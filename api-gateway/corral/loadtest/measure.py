"""Takes what came of each request and sums it up: in all, by model, key and node, and over time. Bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

from corral.loadtest.answers import CANCELLED, OK
from corral.loadtest.client import Answer
from corral.loadtest.histogram import Histogram
from corral.loadtest.result import MEASURES, ErrorKind, Group, Slot, Summary

PERCENTILES = (50, 90, 95, 99)
_CDF = [0.5, *range(1, 96), 95.5, 96, 96.5, 97, 97.5, 98, 98.5, 99, 99.25, 99.5, 99.75, 99.9, 100]
_REASONS_MAX = 24
_GROUPS_MAX = 64
_SLOTS_MAX = 240
_LATEST = 100
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a good request keeps to (seconds). ``itl`` bounds the mean time between the tokens of one answer."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def kept(self, ttft: float | None, gaps: list[float], e2e: float) -> bool:
        """Whether a whole answer kept to all of them; one that has no first token keeps to no ``ttft``."""
        if self.ttft is not None and (ttft is None or ttft > self.ttft):
            return False
        if self.itl is not None and gaps and sum(gaps) / len(gaps) > self.itl:
            return False
        return self.e2e is None or e2e <= self.e2e

    def given(self) -> dict[str, float]:
        """Those that were stated."""
        return {name: value for name in ("ttft", "itl", "e2e") if (value := getattr(self, name)) is not None}


def summary(histogram: Histogram, with_cdf: bool = True) -> Summary:
    """A histogram's figures."""
    if not histogram.count:
        return Summary()
    p50, p90, p95, p99 = histogram.percentiles(PERCENTILES)
    return Summary(
        count=histogram.count,
        mean=histogram.mean,
        deviation=histogram.deviation,
        min=histogram.least,
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=histogram.greatest,
        exact=histogram.exact,
        cdf=_cdf(histogram) if with_cdf else [],
    )


def _cdf(histogram: Histogram) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for value, share in zip(histogram.percentiles(_CDF), _CDF, strict=True):
        point = (round(value, 6), round(share / 100, 6))
        if len(points) > 1 and points[-2][0] == points[-1][0] == point[0]:
            points.pop()
        points.append(point)
    return points


class _Tally:
    """Counts and samples of a group."""

    def __init__(self, exact_max: int) -> None:
        self.group = Group(status={}, errors={}, measures={})
        self.samples = {name: Histogram(exact_max) for name in MEASURES}

    def outcome(self, answer: Answer, retries: int, good: bool) -> None:
        group = self.group
        group.requests += 1
        group.retries += retries
        if answer.kind == CANCELLED:
            group.cancelled += 1
            return
        if answer.status:
            status = str(answer.status)
            group.status[status] = group.status.get(status, 0) + 1
        if answer.kind == OK:
            group.ok += 1
            group.good += good
            return
        group.failed += 1
        kind = group.errors.setdefault(answer.kind, ErrorKind(0, {}))
        kind.count += 1
        known = answer.reason in kind.reasons or len(kind.reasons) < _REASONS_MAX
        reason = answer.reason if known else OTHER
        kind.reasons[reason] = kind.reasons.get(reason, 0) + 1

    def result(self, window: float, with_cdf: bool) -> Group:
        group = self.group
        group.requests_per_s = group.ok / window if window else 0.0
        group.good_per_s = group.good / window if window else 0.0
        group.output_tokens_per_s = group.output_tokens / window if window else 0.0
        told = group.ok + group.failed
        group.error_rate = group.failed / told if told else 0.0
        group.measures = {name: summary(h, with_cdf) for name, h in self.samples.items() if h.count}
        return group


@dataclass
class _Slice:
    """What happened in a slice of time."""

    started: int = 0
    ok: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=lambda: Histogram(500))
    e2e: Histogram = field(default_factory=lambda: Histogram(500))

    def merge(self, other: _Slice) -> None:
        self.started += other.started
        self.ok += other.ok
        self.failed += other.failed
        self.in_flight = max(self.in_flight, other.in_flight)
        self.tokens += other.tokens
        self.errors += other.errors
        self.ttft.merge(other.ttft)
        self.e2e.merge(other.e2e)


class _Series:
    """Slices of equal length; they double when there would be more than ``_SLOTS_MAX``."""

    def __init__(self) -> None:
        self.seconds = 0.5
        self.slices: list[_Slice] = []

    def at(self, moment: float) -> _Slice:
        index = int(max(0.0, moment) / self.seconds)
        while index >= _SLOTS_MAX:
            pairs = [self.slices[at : at + 2] for at in range(0, len(self.slices), 2)]
            for pair in pairs:
                if len(pair) == 2:
                    pair[0].merge(pair[1])
            self.slices = [pair[0] for pair in pairs]
            self.seconds *= 2
            index = int(max(0.0, moment) / self.seconds)
        while len(self.slices) <= index:
            self.slices.append(_Slice())
        return self.slices[index]

    def result(self) -> list[Slot]:
        def percentiles(histogram: Histogram) -> tuple[float | None, float | None]:
            return tuple(histogram.percentiles((50, 95))) if histogram.count else (None, None)  # type: ignore[return-value]

        return [
            Slot(
                number * self.seconds,
                self.seconds,
                s.started,
                s.ok,
                s.failed,
                s.in_flight,
                s.tokens,
                *percentiles(s.ttft),
                *percentiles(s.e2e),
                dict(s.errors),
            )
            for number, s in enumerate(self.slices)
        ]


class Recorder:
    """What a run has measured so far. Times given to it are monotonic; ``start`` is the run's."""

    def __init__(self, objectives: Objectives, start: float) -> None:
        self.objectives, self.start = objectives, start
        self.total = _Tally(50_000)
        self.by: dict[str, dict[str, _Tally]] = {"model": {}, "key": {}, "node": {}}
        self.late = Histogram()
        self.series = _Series()
        self.in_flight = self.in_flight_max = 0
        self.last_end = start
        self.latest: deque[tuple[float | None, float]] = deque(maxlen=_LATEST)
        """Time to first token and to the end of the latest whole answers."""

    def begun(self, due: float, late: float | None) -> None:
        """A request was sent ``late`` seconds after it was due (None: nothing said when it was due)."""
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        if late is not None:
            self.late.add(late)
        part = self.series.at(due - self.start)
        part.started += 1
        part.in_flight = max(part.in_flight, self.in_flight)

    def ended(self, answer: Answer, due: float, model: str, key: str, retries: int) -> None:
        """What came of a request that was due at ``due``; all latencies count from then."""
        self.in_flight -= 1
        self.last_end = max(self.last_end, answer.ended)
        times, reader = answer.reader.times, answer.reader
        ttft = times[0] - due if times else None
        e2e = answer.ended - due
        gaps = [after - before for before, after in pairwise(times)]
        whole = answer.kind == OK
        good = whole and self.objectives.kept(ttft if reader.streams else e2e, gaps, e2e)
        tokens = reader.output_tokens or len(times)
        queue = _number(answer.headers.get("x-corral-queue-ms"))
        attempts = int(_number(answer.headers.get("x-corral-attempts")) or 0)
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        tallies = [self.total, self._tally("model", model), self._tally("key", key)]
        if node := answer.headers.get("x-corral-node", ""):
            tallies.append(self._tally("node", node))
        for tally in tallies:
            tally.outcome(answer, retries, good)
            tally.group.attempts += attempts
            tally.group.output_tokens += tokens
            tally.group.prompt_tokens += reader.prompt_tokens
            samples = tally.samples
            # What a failed answer showed before it failed is no latency of an answer.
            if whole:
                samples["e2e"].add(e2e)
                if ttft is not None:
                    samples["ttft"].add(ttft)
                samples["itl"].extend(gaps)
                if queue is not None:
                    samples["queue"].add(queue / 1e3)
                if span > 0:
                    samples["stream_rate"].add((len(times) - 1) / span)
        self._over_time(answer, whole, ttft, e2e, tokens)

    def _over_time(self, answer: Answer, whole: bool, ttft: float | None, e2e: float, tokens: int) -> None:
        start, series, times = self.start, self.series, answer.reader.times
        for moment in times:
            series.at(moment - start).tokens += 1
        part = series.at(answer.ended - start)
        part.in_flight = max(part.in_flight, self.in_flight)
        if answer.kind == CANCELLED:
            return
        if not times:
            part.tokens += tokens
        if not whole:
            part.failed += 1
            part.errors[answer.kind] += 1
            return
        self.latest.append((ttft, e2e))
        part.ok += 1
        part.e2e.add(e2e)
        if ttft is not None:
            series.at(times[0] - start).ttft.add(ttft)

    def _tally(self, dimension: str, name: str) -> _Tally:
        known = self.by[dimension]
        if name not in known:
            if len(known) >= _GROUPS_MAX:
                name = OTHER
            known.setdefault(name, _Tally(2_000))
        return known[name]

    @property
    def window(self) -> float:
        """Seconds from the start to the last end."""
        return max(0.0, self.last_end - self.start)

    def groups(self, dimension: str) -> dict[str, Group]:
        """The result of each model, key or node."""
        return {name: tally.result(self.window, True) for name, tally in sorted(self.by[dimension].items())}


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and 0 <= value < 1e9 else None
