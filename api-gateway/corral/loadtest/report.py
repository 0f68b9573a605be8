"""The report: one page that needs nothing else, no script and no other file, for light and dark screens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from corral.loadtest import comparison
from corral.loadtest.answers import KINDS
from corral.loadtest.charts import COLOURS, Axis, Line, bars, lines
from corral.loadtest.result import MEASURES, Group, Result, Slot
from corral.loadtest.summary import threshold_value, value
from corral.loadtest.units import number, percent, seconds, tick

_COLUMNS = ("mean", "deviation", "min", "p50", "p90", "p95", "p99", "max")
_LINES_MAX = COLOURS
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(result: Result, other: Result | None = None) -> str:
    """The HTML of a result; with ``other`` the two are compared first."""
    parts = [_head(result)] if other is None else [_two_heads(result, other)]
    if other is None:
        parts += [_tiles(result), *(_warning(text) for text in result.client.warnings), _thresholds(result)]
    else:
        parts.append(_compared(result, other))
    parts += [_section("Distributions", _distributions(result, other))]
    if other is None:
        parts += [_section("Over time", _over_time(result)), _latencies(result), _errors(result)]
        for title, groups in (("model", result.by_model), ("key", result.by_key), ("node", result.by_node)):
            parts.append(_groups(f"By {title}", groups))
    parts += [_made(result, "How it was run" if other is None else "How the first was run")]
    if other is not None:
        parts.append(_made(other, "How the second was run"))
    css = files("corral.loadtest").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test {escape(result.started)}</title><style>{css}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


# -- the top


def _head(result: Result) -> str:
    early = " Stopped early; what was done until then is here." if result.interrupted else ""
    return (
        f"<h1>Load test</h1><p>{escape(_sentence(result))}{early}</p>"
        f'<p class="soft">{escape(result.url)}, {escape(_when(result))}</p>'
    )


def _two_heads(first: Result, second: Result) -> str:
    said = "".join(
        f'<p><b>{name}</b>: {escape(_sentence(result))} <span class="soft">{escape(_when(result))}</span></p>'
        for name, result in (("First", first), ("Second", second))
    )
    return f"<h1>Two load tests compared</h1>{said}"


def _sentence(result: Result) -> str:
    load = result.load
    models = ", ".join(name for name, _ in load.models[:4]) + (", …" if len(load.models) > 4 else "")
    form = "streamed" if load.stream else "not streamed"
    text = f"{load.description}: {load.api} {load.route}, {form}, {models}."
    return text[0].upper() + text[1:]


def _when(result: Result) -> str:
    return result.started.replace("T", " ").replace("+00:00", " UTC")


def _tiles(result: Result) -> str:
    total = result.total
    state = "bad" if total.failed else "good"
    tiles = [
        ("whole answers", number(total.ok), f"of {number(total.requests)} in {seconds(result.window)}", ""),
        ("failed", number(total.failed), percent(total.error_rate), state),
        ("requests a second", number(total.requests_per_s), "whole answers", ""),
    ]
    if result.load.slo:
        stated = ", ".join(f"{name} ≤ {seconds(bound)}" for name, bound in result.load.slo.items())
        tiles.append(("goodput a second", number(total.good_per_s), stated, ""))
    if total.output_tokens:
        tiles.append(
            ("tokens a second", number(total.output_tokens_per_s), f"{number(total.output_tokens)} in all", "")
        )
    for measure in ("ttft", "itl", "e2e"):
        if found := total.measures.get(measure):
            tiles.append((f"{MEASURES[measure]}, p95", seconds(found.p95), f"p50 {seconds(found.p50)}", ""))
    shown = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b class="{css}">{escape(figure)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, figure, note, css in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def _thresholds(result: Result) -> str:
    rows = []
    for verdict in result.thresholds:
        metric = verdict.text.split("<")[0].split(">")[0].split("=")[0].strip()
        measured = "nothing measured" if verdict.value is None else threshold_value(metric, verdict.value)
        state = '<td class="good">passed</td>' if verdict.passed else '<td class="bad">failed</td>'
        rows.append(f"<tr><th><code>{escape(verdict.text)}</code></th><td>{escape(measured)}</td>{state}</tr>")
    return _section("Thresholds", _card(("", "measured", ""), rows)) if rows else ""


# -- charts


def _distributions(result: Result, other: Result | None) -> str:
    drawn = []
    for measure in ("ttft", "itl", "e2e", "queue"):
        series = _cdfs(result, other, measure)
        points = [value for line in series for value, _ in line.points if value > 0]
        if not points:
            continue
        wide = max(points) > 20 * min(points)
        x = Axis(f"{MEASURES[measure]}{', logarithmic' if wide else ''}", tick, None if wide else 0.0, None, wide)
        drawn.append(
            lines(f"{MEASURES[measure].capitalize()}: share within", series, x, Axis("", _whole_percent, 0.0, 1.0))
        )
    return _charts(drawn)


def _cdfs(result: Result, other: Result | None, measure: str) -> list[Line]:
    def cdf(name: str, group: Group, colour: int, dashed: bool = False) -> list[Line]:
        found = group.measures.get(measure)
        return [Line(name, found.cdf, colour, dashed)] if found and found.cdf else []

    if other is not None:
        return cdf("first", result.total, 0) + cdf("second", other.total, 1, True)
    groups = result.by_model if len(result.by_model) > 1 else result.by_node
    if not 1 < len(groups) <= _LINES_MAX:
        return cdf("all", result.total, 0)
    return [line for at, (name, group) in enumerate(groups.items()) for line in cdf(name, group, at)]


def _over_time(result: Result) -> str:
    slots = result.series
    x = Axis("time since the start", tick, 0.0)
    rate = Axis("", number, 0.0)
    time = Axis("", tick, 0.0)
    counted = [
        Line("due", _points(slots, [slot.started / slot.seconds for slot in slots]), 7),
        Line("answered whole", _points(slots, [slot.ok / slot.seconds for slot in slots]), 2),
    ]
    if result.total.failed:
        counted.append(Line("failed", _points(slots, [slot.failed / slot.seconds for slot in slots]), 1))
    drawn = [
        lines("Time to first token", _pair(slots, [s.ttft_p50 for s in slots], [s.ttft_p95 for s in slots]), x, time),
        lines("Time to the end", _pair(slots, [s.e2e_p50 for s in slots], [s.e2e_p95 for s in slots]), x, time),
        lines("Requests a second", counted, x, rate),
        lines(
            "Requests under way, at most", [Line("under way", _points(slots, [s.in_flight for s in slots]), 4)], x, rate
        ),
    ]
    if result.total.output_tokens:
        tokens = Line("tokens/s", _points(slots, [slot.tokens / slot.seconds for slot in slots]), 0)
        drawn.append(lines("Tokens a second", [tokens], x, rate))
    drawn.append(bars("Failed requests by kind", [(s.at, s.seconds, s.errors) for s in slots], x, rate))
    return _charts(drawn)


def _pair(slots: Sequence[Slot], half: Sequence[float | None], most: Sequence[float | None]) -> list[Line]:
    return [Line("half of them (p50)", _points(slots, half), 0), Line("all but 5% (p95)", _points(slots, most), 1)]


def _points(slots: Sequence[Slot], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    return [(slot.at + slot.seconds / 2, value) for slot, value in zip(slots, values, strict=True)]


def _whole_percent(share: float) -> str:
    return f"{share:.0%}"


# -- tables


def _latencies(result: Result) -> str:
    rows = []
    for measure, title in MEASURES.items():
        if found := result.total.measures.get(measure):
            cells = [value(measure, getattr(found, column)) for column in _COLUMNS]
            note = "" if found.exact else " <span class=soft>(within 0.5%)</span>"
            rows.append(f"<tr><th>{title}{note}</th>{_cells([number(found.count), *cells])}</tr>")
    return _section("Latencies", _card(("", "samples", *_COLUMNS), rows)) if rows else ""


def _errors(result: Result) -> str:
    rows = [
        f"<tr><th>{escape(kind)}</th><td>{number(count)}</td><td class=text>{escape(reason)}</td></tr>"
        for kind, error in sorted(result.total.errors.items(), key=lambda item: -item[1].count)
        for reason, count in sorted(error.reasons.items(), key=lambda item: -item[1])
    ]
    if not rows:
        return ""
    meaning = "; ".join(f"{kind}: {KINDS.get(kind, '')}" for kind in sorted(result.total.errors))
    statuses = ", ".join(f"{number(count)} of {status}" for status, count in sorted(result.total.status.items()))
    note = f'<p class="soft">{escape(meaning)}. Statuses: {escape(statuses or "none")}.</p>'
    return _section("Failed requests", note + _card(("kind", "requests", "reason"), rows))


def _groups(title: str, groups: dict[str, Group]) -> str:
    if len(groups) < 2:
        return ""
    heads = ("", "requests", "whole", "failed", "tokens/s", "goodput/s", "first p50", "first p95", "end p50", "end p95")
    rows = []
    for name, group in groups.items():
        cells = [number(group.requests), number(group.ok), number(group.failed)]
        cells += [number(group.output_tokens_per_s), number(group.good_per_s)]
        for measure in ("ttft", "e2e"):
            found = group.measures.get(measure)
            cells += [seconds(found.p50), seconds(found.p95)] if found else ["-", "-"]
        rows.append(f"<tr><th>{escape(name)}</th>{_cells(cells)}</tr>")
    return _section(title, _card(heads, rows))


def _compared(first: Result, second: Result) -> str:
    rows = []
    for row in comparison.rows(first, second):
        state = {True: ' class="good"', False: ' class="bad"', None: ""}[row["better"]]
        cells = f"<td>{escape(row['first_text'])}</td><td>{escape(row['second_text'])}</td>"
        rows.append(f"<tr><th>{escape(row['figure'])}</th>{cells}<td{state}>{comparison.change_text(row)}</td></tr>")
    differing = comparison.differences(first, second)
    note = _warning(f"The loads differ in {', '.join(differing)}.") if differing else ""
    return note + _section("Figures", _card(("", "first", "second", "change"), rows))


def _made(result: Result, title: str) -> str:
    load, client, total = result.load, result.client, result.total
    weights = ", ".join(f"{name} ({weight:.3g})" for name, weight in load.models)
    lengths = "the trace's" if load.mode == "trace" else f"prompts {load.prompt_tokens}, answers {load.max_tokens}"
    late = f"p99 {seconds(client.late.p99)} late, " if client.late.count else ""
    again = f", {number(client.sent_again)} sent again on a new connection" if client.sent_again else ""
    facts = {
        "command": f"<code>{escape(result.command)}</code>",
        "machine of the client": escape("; ".join(f"{name} {text}" for name, text in result.machine.items())),
        "versions": escape(", ".join(f"{name} {text}" for name, text in result.versions.items())),
        "models (weight)": escape(weights),
        "keys": escape(", ".join(load.keys)),
        "tokens asked for": escape(lengths),
        "tokens in all": f"{number(total.prompt_tokens)} of prompts, {number(total.output_tokens)} of answers",
        "warm-up, time-out, seed": f"{load.warmup} requests, {seconds(load.timeout)}, {load.seed}",
        "client": f"{late}{client.cpu_share:.0%} of a core, at most {number(client.in_flight_max)} requests under way, "
        f"{number(client.connections)} connections{again}",
    }
    rows = [f"<tr><th>{name}</th><td class=text>{text}</td></tr>" for name, text in facts.items()]
    note = (
        "Latencies count from the time a request was due." if load.mode != "closed" else "A caller asks once answered."
    )
    return _section(title, f'<p class="soft">{note}</p>' + _card((), rows))


# -- pieces


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _charts(drawn: Iterable[str]) -> str:
    shown = "".join(drawn)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _card(heads: Sequence[str], rows: Sequence[str]) -> str:
    left = {"reason": " class=text"}
    cells = "".join(f"<th{left.get(text, '')}>{escape(text)}</th>" for text in heads)
    head = f"<thead><tr>{cells}</tr></thead>" if heads else ""
    return f'<div class="card"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)
