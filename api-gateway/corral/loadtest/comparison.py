"""Two results side by side: the same figures, and by how much the second differs from the first."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.loadtest.result import MEASURES, Result
from corral.loadtest.summary import align, value
from corral.loadtest.units import number, percent

_FIGURES = ("mean", "p50", "p95", "p99")


def rows(first: Result, second: Result) -> list[dict[str, Any]]:
    """``figure``, ``first``, ``second``, their texts and ``change`` (share of the first; None where that is 0)."""
    found = [
        _row("requests a second", first.total.requests_per_s, second.total.requests_per_s, number, more=True),
        _row("tokens a second", first.total.output_tokens_per_s, second.total.output_tokens_per_s, number, more=True),
        _row("goodput, requests a second", first.total.good_per_s, second.total.good_per_s, number, more=True),
        _row("failed", first.total.error_rate, second.total.error_rate, percent, more=False),
    ]
    for measure, title in MEASURES.items():
        before, after = first.total.measures.get(measure), second.total.measures.get(measure)
        if before and after:
            found += [
                _row(
                    f"{title}, {figure}",
                    getattr(before, figure),
                    getattr(after, figure),
                    lambda v, measure=measure: value(measure, v),
                    more=measure == "stream_rate",
                )
                for figure in _FIGURES
            ]
    return found


def _row(figure: str, first: float, second: float, form: Any, more: bool) -> dict[str, Any]:
    change = (second - first) / first if first else None
    better = None if change is None or abs(change) < 0.02 else (change > 0) == more
    return {
        "figure": figure,
        "first": first,
        "second": second,
        "first_text": form(first),
        "second_text": form(second),
        "change": change,
        "better": better,
    }


def change_text(row: dict[str, Any]) -> str:
    """The change as people write it."""
    return "-" if row["change"] is None else f"{row['change']:+.1%}"


def differences(first: Result, second: Result) -> list[str]:
    """In what the two loads differ: a change of a figure may come from there."""
    before, after = msgspec.structs.asdict(first.load), msgspec.structs.asdict(second.load)
    named = {name.replace("_", " ") for name in before if name != "description" and before[name] != after[name]}
    return sorted(named | ({"machine"} if first.machine != second.machine else set()))


def text(first: Result, second: Result) -> str:
    """The table for a terminal."""
    differing = differences(first, second)
    note = f"\n\nwarning: the loads differ in {', '.join(differing)}" if differing else ""
    table = [["", "first", "second", "change"]]
    table += [[row["figure"], row["first_text"], row["second_text"], change_text(row)] for row in rows(first, second)]
    return "\n".join(align(table)) + note
