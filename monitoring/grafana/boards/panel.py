"""What a dashboard is made of: titles, what a panel means, its unit, its queries."""

from __future__ import annotations

from dataclasses import dataclass, field

FAILED = 'outcome=~"upstream_error|timeout|overloaded"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """``queries`` are (PromQL, legend); ``unit`` is Grafana's; ``kind``: timeseries, stat or timeline."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True)
class Board:
    """A dashboard. ``variables`` are (name, label, query for its values)."""

    uid: str
    title: str
    description: str
    variables: tuple[tuple[str, str, str], ...]
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)


NODE = ("node", "Node", "label_values(corral_node_up, node)")
MODEL = ("model", "Model", "label_values(corral_requests_total, model)")
KEY = ("key", "Key", "label_values(corral_key_requests_total, key)")
GATEWAY = ("gateway", "Gateway", "label_values(corral_connections, gateway)")


def stat(title: str, description: str, unit: str, query: str) -> Panel:
    """One number."""
    return Panel(title, description, unit, ((query, title),), "stat")


def line(title: str, description: str, unit: str, *queries: tuple[str, str], stacked: bool = False) -> Panel:
    """Lines over time."""
    return Panel(title, description, unit, queries, stacked=stacked)


def quantiles(metric: str, labels: str, by: str) -> tuple[tuple[str, str], ...]:
    """Median and 95th percentile of a histogram, by one label."""
    return tuple(
        (
            f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{labels}}}{RATE})))",
            f"{{{{{by}}}}} {name}",
        )
        for q, name in ((0.5, "p50"), (0.95, "p95"))
    )
