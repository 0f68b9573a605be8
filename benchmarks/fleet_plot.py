"""The plot of `benchmarks/fleet`: what share of requests had their first token within so many seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from corral.loadtest.charts import Axis, Line, lines

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


def write(path: Path, title: str, runs: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Write the plot of runs: their names, and the times to the first token (s) of their requests."""
    path.write_text(plot(title, runs), encoding="utf-8")


def plot(title: str, runs: Sequence[tuple[str, Sequence[float]]]) -> str:
    """An SVG: the share of requests (%) that had their first token after so many seconds at most."""
    series = []
    for number, (name, first) in enumerate(runs):
        ordered = sorted(max(0.01, value) for value in first)
        last = len(ordered) - 1
        points = [(ordered[last * step // 200], step / 2) for step in range(201)]
        series.append(Line(name, points, number))
    seconds = Axis("seconds to the first token", lambda value: f"{value:g}", log=True)
    drawn = lines(title, series, seconds, Axis("%", lambda value: f"{value:g}%", 0.0, 100.0))
    found = re.search(r"<svg viewBox=\"0 0 (\d+) (\d+)\"(.*?)>(.*)</svg>", drawn, re.S)
    assert found is not None
    width, height, rest, content = int(found[1]), int(found[2]), found[3], found[4]
    # Alone in a file, without the page that gives the report's charts their colours.
    styles = "".join(f".line.c{number}{{stroke:{colour}}}" for number, colour in enumerate(COLOURS))
    styles += ".line{fill:none;stroke-width:2}.grid{stroke:#ddd}.axis,.tick{stroke:#888}.hit circle{fill:none}"
    legend = "".join(
        f'<path class="line c{number}" d="M{at_x} {height + 12}h18"/>'
        f'<text x="{at_x + 23}" y="{height + 16}">{name}</text>'
        for number, (name, _) in enumerate(runs)
        for at_x in [20 + number * 118]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -20 {width} {height + 45}"{rest}>'
        f"<style>{styles}text{{font:11px sans-serif;fill:#333}}</style>"
        f'<rect y="-20" width="100%" height="100%" fill="#fff"/><text x="20" y="-5">{title}</text>'
        f"{content}{legend}</svg>\n"
    )
