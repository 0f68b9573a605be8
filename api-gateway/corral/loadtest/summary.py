"""A result as text for a terminal."""

from __future__ import annotations

from corral.loadtest.answers import KINDS
from corral.loadtest.result import MEASURES, Group, Result, Summary
from corral.loadtest.units import number, percent, seconds

_COLUMNS = ("mean", "deviation", "p50", "p90", "p95", "p99", "max")


def value(measure: str, figure: float) -> str:
    """A figure of a measure with its unit."""
    return f"{number(figure)} /s" if measure == "stream_rate" else seconds(figure)


def threshold_value(metric: str, figure: float) -> str:
    """A threshold's measured value in its unit."""
    for measure in MEASURES:
        if metric.endswith(f"_{measure}"):
            return value(measure, figure)
    return percent(figure) if metric.startswith(("error_rate", "good_share")) else number(figure)


def text(result: Result) -> str:
    """Counts, latencies, errors, nodes, thresholds."""
    total = result.total
    lines = [f"{result.load.description}; {result.load.api} {result.load.route}, seed {result.load.seed}"]
    lines.append(
        f"{number(total.requests)} requests in {seconds(result.window)}: {number(total.ok)} whole, "
        f"{number(total.failed)} failed ({percent(total.error_rate)})"
        + (f", {number(total.cancelled)} cut short by Ctrl-C" if total.cancelled else "")
    )
    rates = f"{number(total.requests_per_s)} requests/s, {number(total.output_tokens_per_s)} tokens/s"
    if result.load.slo:
        stated = ", ".join(f"{name} <= {seconds(bound)}" for name, bound in result.load.slo.items())
        rates += f", goodput {number(total.good_per_s)} requests/s ({stated})"
    lines += [rates, "", *_table(total.measures)]
    for kind, error in sorted(total.errors.items(), key=lambda item: -item[1].count):
        lines.append(f"\n{kind}: {number(error.count)} ({KINDS.get(kind, '')})")
        lines += [f"  {number(count):>7}  {reason}" for reason, count in _most(error.reasons)]
    for title, groups in (("model", result.by_model), ("key", result.by_key), ("node", result.by_node)):
        if len(groups) > 1:
            lines += ["", *_groups(title, groups)]
    lines += [""] if result.client.warnings or result.thresholds else []
    lines += [f"warning: {warning}" for warning in result.client.warnings]
    for verdict in result.thresholds:
        measured = (
            "nothing measured" if verdict.value is None else threshold_value(_metric(verdict.text), verdict.value)
        )
        lines.append(f"{'passed' if verdict.passed else 'FAILED'}  {verdict.text}  ({measured})")
    return "\n".join(lines)


def _metric(text: str) -> str:
    return text.split("<")[0].split(">")[0].split("=")[0].strip()


def _most(reasons: dict[str, int], count: int = 5) -> list[tuple[str, int]]:
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    rest = sum(number for _, number in ordered[count:])
    return ordered[:count] + ([("other reasons", rest)] if rest else [])


def _table(measures: dict[str, Summary]) -> list[str]:
    if not measures:
        return ["no answer was whole: there are no latencies"]
    rows = [["", *_COLUMNS]]
    for name, title in MEASURES.items():
        if found := measures.get(name):
            rows.append([title, *(value(name, getattr(found, column)) for column in _COLUMNS)])
    return align(rows)


def _groups(title: str, groups: dict[str, Group]) -> list[str]:
    rows = [[title, "whole", "failed", "tokens/s", "first p50", "first p95", "end p50", "end p95"]]
    for name, group in groups.items():
        cells = [name, number(group.ok), number(group.failed), number(group.output_tokens_per_s)]
        for measure in ("ttft", "e2e"):
            found = group.measures.get(measure)
            cells += [seconds(found.p50), seconds(found.p95)] if found else ["-", "-"]
        rows.append(cells)
    return align(rows)


def align(rows: list[list[str]]) -> list[str]:
    """Columns side by side: the first to the left, the rest to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
