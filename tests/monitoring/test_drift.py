"""Whatever a rule, a dashboard, a runbook or a document names exists: metrics, labels, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support import monitoring
from support.monitoring import MONITORING, RULES, RUNBOOKS
from support.servers import REPOSITORY
from support.stage import Stage

from corral.cli.main import cli

NAME = re.compile(r"(?<![\w./$-])((?:corral|haproxy|process)_[a-z0-9_]+|corral:[a-z0-9_]+:[a-z0-9_]+)(?![\w./-])")
DASHBOARDS = sorted((MONITORING / "grafana/dashboards").glob("*.json"))
DOCUMENTS = [*sorted(RUNBOOKS.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md"]
ELSEWHERE = {
    "corral_database_connections": "PostgreSQL's alone",
    "corral_database_connections_max": "PostgreSQL's alone",
    "corral_database_transactions_total": "PostgreSQL's alone",
}
"""Exported, but not by the stack of this test."""
NO_METRICS = {"corral_egress", "corral_exampleid", "process_exporter", "haproxy_socket"}


def names(path: Path) -> set[str]:
    """The metrics that a file names."""
    return set(NAME.findall(path.read_text(encoding="utf-8"))) - NO_METRICS


@pytest.fixture(scope="module")
def exported(whole_stage: Stage) -> set[str]:
    """Every metric that Prometheus has of a stack, and what rules record."""
    recorded = {rule["record"] for rule in monitoring.rules() if "record" in rule}
    # Not of this instant alone: of a target whose last scrape came late there is nothing then.
    lately = 'count by (__name__) (last_over_time({__name__!=""}[5m]))'
    told = {series["metric"]["__name__"] for series in whole_stage.query(lately)}
    assert len(told) > 100
    return told | recorded | ELSEWHERE.keys()


def exists(name: str, exported: set[str]) -> bool:
    """Whether it is a metric, or the family that histograms' series belong to."""
    return name in exported or f"{name}_bucket" in exported


@pytest.mark.parametrize("path", [*RULES, *DASHBOARDS, *DOCUMENTS], ids=lambda path: path.name)
def test_every_metric_that_is_named_exists(path: Path, exported: set[str]) -> None:
    missing = {name for name in names(path) if not exists(name, exported)}
    assert not missing


def test_what_is_exported_elsewhere_is_exported_at_all() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "api-gateway/corral").rglob("*.py"))
    for name in ELSEWHERE:
        assert f'"{name.removesuffix("_total")}"' in sources, name


def test_the_table_of_alerts_is_that_of_the_rules() -> None:
    text = (REPOSITORY / "docs/monitoring.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \[(\w+)\]\(runbooks/(\w+)\.md\) \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    rules: dict[str, tuple[list[str], list[str]]] = {}
    for rule in monitoring.alerts():
        severities, times = rules.setdefault(rule["alert"], ([], []))
        severities.append(rule["labels"]["severity"])
        times.append(rule["for"])
    told = {name: (severity, time) for name, _, severity, time in table}
    assert all(name == runbook for name, runbook, _, _ in table)
    assert told == {
        name: (", ".join(dict.fromkeys(severities)), ", ".join(dict.fromkeys(times)))
        for name, (severities, times) in rules.items()
    }


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(runbook, line) of the blocks of a language in the runbooks of alerts."""
    for name in sorted({rule["alert"] for rule in monitoring.alerts()}):
        text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if line.strip():
                    yield name, line


def test_every_query_of_a_runbook_can_be_asked(whole_stage: Stage) -> None:
    lines = list(blocks("promql"))
    assert len({name for name, _ in lines}) == len({rule["alert"] for rule in monitoring.alerts()})
    for _, line in lines:
        whole_stage.query(line)


@pytest.mark.parametrize("line", sorted({line for _, line in blocks("sh")}))
def test_every_command_of_a_runbook_exists(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "corral", "runbooks' blocks hold commands of this product"
    command: click.Command = cli
    context = click.Context(cli, info_name="corral")
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
        context = click.Context(command, parent=context, info_name=command.name)
    # Wrong options and arguments raise here; nothing is run.
    command.make_context(command.name, words, parent=context.parent)
