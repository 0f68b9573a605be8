"""Writes the dashboards' JSON with Grafana's own SDK: monitoring/grafana/generate.py [FOLDER]

What they show stands in boards/. After a change there: .venv/bin/python monitoring/grafana/generate.py
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh, VariableSort

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from boards import BOARDS  # noqa: E402
from boards.panel import Board, Panel  # noqa: E402

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
EVERY = VariableOption(text="All", value="$__all")
WIDTH, HEIGHT = 24, 8


def build(board: Board) -> str:
    """A dashboard's JSON."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["corral"])
        .readonly()
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(1)
        .link(dashboard.DashboardLink("Corral").tags(["corral"]).type("dashboards").as_dropdown(True).keep_time(True))
    )
    for name, label, query in board.variables:
        made.with_variable(_variable(name, label, query))
    number = itertools.count(1)
    for title, panels in board.rows.items():
        made.with_row(dashboard.Row(title).id(next(number)))
        stats = [panel for panel in panels if panel.kind == "stat"]
        for panel in panels:
            narrow = panel.kind == "stat" and len(stats) == len(panels)
            made.with_panel(
                _panel(panel)
                .id(next(number))
                .span(WIDTH // len(stats) if narrow else WIDTH // 3)
                .height(HEIGHT // (1 + narrow))
            )
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        # A name that is empty is meant too.
        .all_value(".*")
        .current(EVERY)
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | statetimeline.Panel:
    made = {"timeseries": _lines, "stat": _stat, "timeline": _timeline}[panel.kind](panel)
    made.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    for at, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + at))
        made.with_target(query.instant() if panel.kind == "stat" else query.range())
    return made


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
    made = (
        timeseries.Panel()
        .legend(legend.display_mode(LegendDisplayMode.TABLE).calcs(["lastNotNull", "max"]))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .show_points(VisibilityMode.NEVER)
        .line_width(1)
        .fill_opacity(25 if panel.stacked else 5)
        .min(0)
    )
    return made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)) if panel.stacked else made


def _stat(panel: Panel) -> stat.Panel:
    return stat.Panel().graph_mode(BigValueGraphMode.NONE)


def _timeline(panel: Panel) -> statetimeline.Panel:
    legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
    return statetimeline.Panel().legend(legend.display_mode(LegendDisplayMode.LIST)).merge_values(True)


def main(folder: Path) -> None:
    """Write every dashboard into ``folder``."""
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(build(board), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
