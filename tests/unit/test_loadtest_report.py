"""Load tests: the report is one page that needs nothing else and believes no text it shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner
from support.results import result as make

from corral.cli.main import cli
from corral.loadtest import charts, comparison, report, result, summary
from corral.loadtest.charts import Axis, Line

EVIL = '<script>alert("x")</script>'


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


@pytest.mark.parametrize("compared", [False, True])
def test_the_page_needs_nothing_else(made: result.Result, compared: bool) -> None:
    page = report.page(made, make(slow=2.0) if compared else None)
    for tag, attributes in Tags(page).found:
        assert tag not in ("script", "link", "img", "iframe", "object", "image", "use")
        assert not {"src", "href", "xlink:href", "style", "onload", "onclick"} & attributes.keys()
    assert not re.search(r"@import|url\(|https?://(?!127\.0\.0\.1)", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_each_chart_is_well_formed(made: result.Result) -> None:
    drawn = re.findall(r"<svg.*?</svg>", report.page(made), re.DOTALL)
    assert len(drawn) == 10
    for svg in drawn:
        for element in ElementTree.fromstring(svg).iter():
            for name in ("x", "y", "cx", "cy", "width", "height"):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= charts.WIDTH


def test_what_others_named_is_shown_as_text() -> None:
    page = report.page(make(command=f"corral {EVIL}", models=(EVIL, "b")))
    assert EVIL not in page
    assert page.count("&lt;script&gt;") >= 3


def test_no_secret_is_in_the_result_or_its_page(made: result.Result) -> None:
    assert b"secret-of-k1" not in result.encode(made)
    assert "secret-of-k1" not in report.page(made)


def test_the_page_says_what_was_measured(made: result.Result) -> None:
    page = report.page(made)
    for text in ("p95_ttft&lt;1s", "error_rate&lt;1%", "truncated", "the connection was cut", "node-1", "node-2"):
        assert text in page
    assert '<td class="good">passed</td>' in page and '<td class="bad">failed</td>' in page


def test_a_run_without_any_answer_has_a_page(made: result.Result) -> None:
    nothing = msgspec.structs.replace(
        made, total=result.Group(), by_model={}, by_key={}, by_node={}, series=[], thresholds=[], window=0.0
    )
    assert "How it was run" in report.page(nothing)
    assert "there are no latencies" in summary.text(nothing)


def test_comparison_says_what_changed_and_what_was_not_the_same(made: result.Result) -> None:
    slower = make(slow=3.0)
    rows = {row["figure"]: row for row in comparison.rows(made, slower)}
    first = rows["time to first token, mean"]
    assert first["change"] == pytest.approx(2.0)
    assert first["better"] is False
    assert rows["time between tokens, p50"]["better"] is None
    assert comparison.differences(made, slower) == []
    other = make(models=("a",))
    assert comparison.differences(made, other) == ["models"]
    assert "the loads differ in models" in comparison.text(made, other)


def test_the_command_makes_a_page_again_and_compares(made: result.Result, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(result.encode(made))
    (tmp_path / "other.json").write_bytes(result.encode(make(slow=2.0)))
    done = CliRunner().invoke(cli, ["loadtest", "report", str(tmp_path / "result.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text() == report.page(made)
    words = ["loadtest", "report", str(tmp_path / "result.json"), "--compare", str(tmp_path / "other.json"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    shown = msgspec.json.decode(done.stdout)
    assert Path(shown["report"]).read_text().count("<svg") == 4
    assert {row["figure"] for row in shown["comparison"]} >= {"requests a second", "time to first token, p95"}


def test_the_folder_of_a_run_stands_for_its_result(made: result.Result, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(result.encode(made))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    done = CliRunner().invoke(cli, ["loadtest", "report", one])
    assert done.output == f"report  {one}/report.html\n"
    done = CliRunner().invoke(cli, ["loadtest", "report", one, "--compare", two])
    assert done.output.endswith(f"report  {one}/comparison.html\n")
    nothing = CliRunner().invoke(cli, ["loadtest", "report", str(tmp_path)])
    assert (nothing.exit_code, nothing.stderr) == (
        1,
        f"corral: {tmp_path}/result.json cannot be read: No such file or directory\n",
    )


def test_the_command_prints_the_schema() -> None:
    done = CliRunner().invoke(cli, ["loadtest", "report", "--schema"])
    assert done.exit_code == 0
    assert set(msgspec.json.decode(done.stdout)["$defs"]) >= {"Result", "Group", "Summary", "Slot"}
    assert CliRunner().invoke(cli, ["loadtest", "report"]).exit_code == 2


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.0, 1.0, False), (0.0, 0.00031, False), (3.0, 3.0, False), (0.0, 0.0, False), (1e-6, 90.0, True)],
)
def test_ticks_span_what_is_drawn(low: float, high: float, log: bool) -> None:
    drawn = charts.lines("t", [Line("l", [(low, low), (high, high)])], Axis("", str, log=log), Axis("", str))
    assert 4 <= drawn.count("<text") <= 22
    assert "nan" not in drawn
