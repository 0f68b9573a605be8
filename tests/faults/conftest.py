"""The fleet that these tests hurt: one for all of them, since each leaves it whole.

CORRAL_FAULTS_RUNS (1) is how often each test runs, one run after the other on the same fleet. CORRAL_FAULTS_BEFORE is a
file with the tables of all other tests of faults that were run: what is on the page, and in no table, is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import fault_rows
import pytest
from support.fleet import MODEL, QUICK, SIMULATION, SINGLE, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet

Row = Callable[[str, str, str], None]
"""Notes a fault, its bar and what was measured."""

FAILED = "FAILED"
RUNS = int(os.environ.get("CORRAL_FAULTS_RUNS", "1"))


@dataclass
class Noted:
    """A row of the table, and the test that noted it."""

    test: str
    fault: str
    bar: str
    measured: str


_rows: list[Noted] = []
_missing: list[str] = []
"""Rows of docs/faults.md that are in no table."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test as often as it is to run."""
    if RUNS > 1:
        metafunc.fixturenames.append("run")
        metafunc.parametrize("run", range(1, RUNS + 1))


@pytest.fixture(scope="session")
def runs() -> int:
    """How often each test runs."""
    return RUNS


@pytest.fixture
def turn(request: pytest.FixtureRequest) -> int:
    """Which run of a test this is, from 1 on: what is to happen for the first time has a name of its own in each."""
    given = getattr(request.node, "callspec", None)
    return int(given.params.get("run", 1)) if given is not None else 1


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Row:
    """Notes what a fault came to: (fault, bar, measured), a row of the table at the end of the run."""

    def row(fault: str, bar: str, measured: str) -> None:
        _rows.append(Noted(request.node.nodeid, fault, bar, measured))

    return row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A fault whose test failed stands in the table as such, also where nothing was measured before it did."""
    report = yield
    if report.failed:
        noted = [row for row in _rows if row.test == item.nodeid]
        if not noted:
            noted = [Noted(item.nodeid, item.nodeid.rpartition("/")[2], "-", "nothing")]
            _rows.extend(noted)
        for row in noted:
            row.measured = f"{FAILED}: {row.measured.removeprefix(f'{FAILED}: ')}"
    return report


def _table() -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in _rows:
        found.setdefault((row.fault, row.bar), []).append(row.measured)
    table = [("fault", "runs", "bar", "measured")]
    table += [(fault, str(len(seen)), bar, "; ".join(seen)) for (fault, bar), seen in found.items()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append("  ".join((*padded, cells[3])))
    return lines


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A row of the page that no table has is a failure, where all faults can be made."""
    if before := os.environ.get("CORRAL_FAULTS_BEFORE"):
        found = fault_rows.missing(fault_rows.PAGE.read_text(), "\n".join([Path(before).read_text(), *_table()]))
        _missing.extend(found)
        if found and not session.exitstatus and fault_rows.able():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, also to the file that CORRAL_FAULTS_TABLE names."""
    for row in _missing:
        terminalreporter.write_line(f"not in the table of faults: {row}")
    if not _rows:
        return
    lines = _table()
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
    if path := os.environ.get("CORRAL_FAULTS_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Edge, two gateways, control, Valkey and two simulated nodes."""
    with run_fleet(tmp_path_factory.mktemp("fleet")) as made:
        # Control's self-test of a model that runs one request at a time would stand in a test's way.
        made.stack.until_continued()
        yield made


@pytest.fixture
def fleet(whole_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, every node ready before and after."""
    whole_fleet.all_ready()
    yield whole_fleet
    whole_fleet.all_ready()


SLOTS, PLACES = 4, 16
"""Slots of a node and model in a fleet that is contended, and how many may wait for one."""
BIG = "big:latest"
BIG_LOADS = 5.0
"""Seconds that it takes to load: longer than gateways believe in a leader that says nothing. For each run of a test
there is one like it that nobody has loaded before (`turn`): fresh-1, fresh-2 and so on."""


@pytest.fixture(scope="module")
def contended_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet with few slots, which its nodes do not hold anybody to: they run whatever they are asked to."""
    folder = tmp_path_factory.mktemp("contended")
    big = {"load": BIG_LOADS, "prefill": 5000.0, "decode": 100.0, "slots": 64}
    names = [BIG, *(f"fresh-{turn}:latest" for turn in range(1, RUNS + 1))]
    simulation = {"models": [*SIMULATION["models"], *({"name": name} | big for name in names)]}
    nodes = [SimulatedNode(name, folder, simulation) for name in ("node-1", "node-2")]
    with run_fleet(folder, "20s", nodes=nodes, slots=SLOTS, queue={"length": PLACES}) as made:
        # Its requests ask for no slot: they would count as too many.
        made.stack.until_continued(MODEL, SINGLE, QUICK)
        yield made


@pytest.fixture
def contended(contended_fleet: Fleet) -> Iterator[Fleet]:
    """The same, every node ready, and what its nodes did so far forgotten."""
    contended_fleet.all_ready()
    for node in contended_fleet.nodes.values():
        node.count_anew()
    yield contended_fleet
    contended_fleet.all_ready()
