"""Thresholds: `p95_ttft<2s`, `error_rate<1%`, `goodput>=5`, `errors.truncated==0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from corral.config.values import duration
from corral.loadtest.answers import KINDS
from corral.loadtest.result import MEASURES, Group, Verdict

_FORM = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(<=|>=|==|<|>)\s*(\S+)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_FIGURES = ("min", "mean", "deviation", "p50", "p90", "p95", "p99", "max")
_RATES: dict[str, Callable[[Group], float]] = {
    "error_rate": lambda group: group.error_rate,
    "goodput": lambda group: group.good_per_s,
    "good_share": lambda group: group.good / (group.ok + group.failed) if group.ok + group.failed else 0.0,
    "requests_per_s": lambda group: group.requests_per_s,
    "tokens_per_s": lambda group: group.output_tokens_per_s,
    "ok": lambda group: group.ok,
    "failed": lambda group: group.failed,
}
_SHARES = frozenset({"error_rate", "good_share"})


@dataclass(frozen=True, slots=True)
class Threshold:
    """``metric`` compared with ``bound`` (seconds, shares, or requests and tokens a second)."""

    text: str
    metric: str
    comparison: str
    bound: float

    def judge(self, group: Group) -> Verdict:
        """Whether the total of a run keeps to it."""
        value = self._value(group)
        passed = value is not None and _OPERATORS[self.comparison](value, self.bound)
        return Verdict(self.text, value, passed)

    def _value(self, group: Group) -> float | None:
        if group.ok + group.failed == 0:
            return None
        if self.metric in _RATES:
            return _RATES[self.metric](group)
        if self.metric.startswith("errors."):
            kind = group.errors.get(self.metric.removeprefix("errors."))
            return kind.count if kind else 0
        figure, _, measure = self.metric.partition("_")
        found = group.measures.get(measure)
        return getattr(found, figure) if found else None


def parse(text: str) -> Threshold:
    """A threshold as it is written. ValueError saying what is wrong."""
    match = _FORM.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r}: expected METRIC<BOUND such as p95_ttft<2s or error_rate<1%")
    metric, comparison, bound = match.groups()
    figure, _, measure = metric.partition("_")
    sampled = figure in _FIGURES and measure in MEASURES
    counted = metric in _RATES or (metric.startswith("errors.") and metric.removeprefix("errors.") in KINDS)
    if not sampled and not counted:
        raise ValueError(
            f"{text!r}: {metric} is not known: expected {'|'.join(_FIGURES)} _ {'|'.join(MEASURES)} such as p95_ttft, "
            f"or one of {', '.join(_RATES)}, or errors.KIND with one of {', '.join(KINDS)}"
        )
    try:
        if metric in _SHARES and bound.endswith("%"):
            value = float(bound.removesuffix("%")) / 100
        else:
            value = duration(bound) if sampled and measure != "stream_rate" else float(bound)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return Threshold(text.strip(), metric, comparison, value)
