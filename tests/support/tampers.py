"""The tamper table: what may be done to records in a database, and what `verify` has to say of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import insert

from corral.store.tables import audit
from support.sealed import GATEWAY, Records


def _reorder(records: Records) -> None:
    records.change(2, pos=99)
    records.change(4, pos=2)
    records.change(99, pos=4)


def _insert(records: Records) -> None:
    row = {"id": "forged", "ts": 2.0, "gw": GATEWAY, "outcome": "ok"}
    records.write(lambda connection: connection.execute(insert(audit).values(row)))


def _make_anew(records: Records) -> None:
    records.change(8, tokens=999)
    records.rebuild()


Tamper = Callable[[Records], None]

TAMPERS: dict[str, tuple[Tamper, str]] = {
    "flipped byte": (lambda records: records.change(3, outcome="ol"), "record 3 (r2) was changed"),
    "dropped record": (lambda records: records.drop(7, 7), "record 7 is missing"),
    "reordered records": (_reorder, "record 2 (r3) was moved: it was record 4"),
    "inserted record": (_insert, "1 records stand beside the chain"),
    "cut tail": (lambda records: records.drop(13, 18), "records 16 to 18 are missing: the tail was cut"),
    "rebuilt chain": (_make_anew, "records 6 to 10 fit together, but are not those that were signed"),
}
"""Each is done to 18 records, `r0` to `r17`, of which 1 to 5, 6 to 10 and 11 to 15 have a checkpoint each."""

_told: dict[tuple[str, str], dict[str, str]] = {}


def note(by: str, database: str, tamper: str, problem: str) -> None:
    """Note what detected a tamper, for the table at the end of the run."""
    _told.setdefault((by, database), {})[tamper] = problem


def write_table(reporter: pytest.TerminalReporter) -> None:
    """The table of what was tried in this run; one that was not found, or not tried, is named."""
    if not _told:
        return
    reporter.section("tampers")
    table = [("database", "checked by", "tamper", "told")]
    for (by, database), told in sorted(_told.items()):
        table += [(database, by, tamper, told.get(tamper, "NOT DETECTED")) for tamper in TAMPERS]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        reporter.write_line("  ".join((*cells, row[3])))
    for (by, database), told in sorted(_told.items()):
        reporter.write_line(f"{database}, {by}: {len(told)} of {len(TAMPERS)}")
