"""The stage of these tests, and the table of what fired."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.stage import Fired, Stage
from support.stage import stage as run_stage

_TABLE = pytest.StashKey[list[Fired]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = []


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> list[Fired]:
    """What fired; printed at the end of the run."""
    return pytestconfig.stash[_TABLE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_TABLE]
    if not rows:
        return
    terminalreporter.section("alerts that fired and were over (rules in a hurry: support.monitoring.hasten)")
    width = max(len(row.alert) for row in rows)
    done = max(len(row.done) for row in rows)
    terminalreporter.write_line(f"{'alert'.ljust(width)}  {'what was done'.ljust(done)}  firing after  resolved after")
    for row in rows:
        terminalreporter.write_line(
            f"{row.alert.ljust(width)}  {row.done.ljust(done)}  {row.firing:10.1f} s  {row.resolved:12.1f} s"
        )


@pytest.fixture(scope="session")
def whole_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stack under Prometheus and Alertmanager."""
    with run_stage(tmp_path_factory.mktemp("stage")) as made:
        yield made
