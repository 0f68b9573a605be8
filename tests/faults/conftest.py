"""The fleet that these tests hurt: one for all of them, since each leaves it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.fleet import Fleet
from support.fleet import fleet as run_fleet

Row = Callable[[str, str, str], None]
"""Notes a fault, its bar and what was measured."""


_rows: dict[tuple[str, str], list[str]] = {}


@pytest.fixture
def matrix() -> Iterator[Row]:
    """Notes what a fault came to: (fault, bar, measured), a row of the table at the end of the run."""

    def row(fault: str, bar: str, measured: str) -> None:
        _rows.setdefault((fault, bar), []).append(measured)

    yield row


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    terminalreporter.section("faults")
    table = [("fault", "runs", "bar", "measured")]
    table += [(fault, str(len(seen)), bar, "; ".join(seen)) for (fault, bar), seen in _rows.items()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        terminalreporter.write_line("  ".join((*cells, row[3])))


@pytest.fixture(scope="session")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Edge, two gateways, control, Valkey and two simulated nodes."""
    with run_fleet(tmp_path_factory.mktemp("fleet")) as made:
        # Control's self-test of a model that runs one request at a time would stand in a test's way.
        made.stack.until_continued(seconds=120)
        yield made


@pytest.fixture
def fleet(whole_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, every node ready before and after."""
    whole_fleet.all_ready()
    yield whole_fleet
    whole_fleet.all_ready()
