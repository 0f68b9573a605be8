"""The trail's upkeep and the sums of usage: none goes over the whole table, on both databases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select, update
from support.plans import BEGIN, GATEWAYS, MANY, analyse, explained, fill, many, row, seen

from corral.store import recovery, retention, usage
from corral.store.database import Database, resolve
from corral.store.tables import audit, audit_holders, audit_streams, spool_begins, spool_watermarks, spools
from corral.store.tables import usage as sums

AT = BEGIN + MANY - 200


@pytest.fixture
def filled(tmp_path: Path, database_url: str) -> Iterator[Database]:
    made = Database(resolve(database_url, tmp_path))
    made.migrate()
    many(made)
    yield made
    made.close()


def opened(connection: Connection) -> None:
    """Requests that nobody has settled, five of each gateway: of one that has begun anew, of one that is gone for long,
    and of one that lives; and of a fourth, which two have admitted."""
    late = {"outcome": None, "pos": None, "leaf": None, "ts": BEGIN}
    names = [*(f"gateway-{number}" for number in range(GATEWAYS)), "gateway-held"]
    fill(connection, [row(MANY + at, BEGIN) | late | {"gw": name} for at, name in enumerate(names * 5)])
    held = connection.execute(select(audit.c.id).where(audit.c.gw == "gateway-held")).scalars()
    connection.execute(insert(audit_holders), [{"id": one, "gateway": "gateway-0", "life": 0} for one in held])
    connection.execute(update(audit_streams).values(pos=MANY))
    last = {"seq": 2 * MANY, "since": BEGIN, "life": 1}
    connection.execute(insert(spool_begins), [{"gateway": name, **last} for name in ("gateway-0", "gateway-held")])
    gone = {"gateway": "gateway-1", "segment": "1.seg", "position": 1, "updated": AT - 2 * recovery.GONE}
    connection.execute(insert(spool_watermarks), [gone])
    lives = {"gateway": "gateway-2", "life": 1, "shipped": AT, "heard": AT, "ended": False}
    connection.execute(insert(spools), [lives])


def test_recovery_does_not_go_over_the_whole_table(filled: Database) -> None:
    filled.write_now(opened)
    now, found = AT + 2 * recovery.GONE, list[str]()
    filled.write_now(lambda c: c.execute(update(spools).values(shipped=now, heard=now)))
    with explained(filled) as looked:
        while rows := filled.write_now(recovery.recover, now, 1800.0):
            found += [one["gw"] for one in rows]
        filled.read_now(recovery.over, now, 1800.0)
        found += [one["gw"] for one in filled.write_now(recovery.overdue, now, 1800.0, MANY, 2 * MANY)]
        found += [one["gw"] for one in filled.write_now(recovery.overdue, now, 1800.0, 0, 2 * MANY)]
    assert Counter(found) == {"gateway-0": 10, "gateway-1": 5, "gateway-2": 5}, "the first was the last to hold five"
    assert seen(looked) == []


def test_retention_does_not_go_over_the_whole_table(filled: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # To such a table what 5,000 are to one of millions: of a quarter it is cheapest to read all.
    monkeypatch.setattr(retention, "BATCH", 20)
    filled.write_now(opened)

    def gone(connection: Connection) -> None:
        connection.execute(update(audit_streams).values(dropped=100))
        head = {"stream": "", "pos": 0, "link": b"", "signed": 0, "signed_link": b"", "dropped": 0}
        connection.execute(insert(audit_streams), [head])

    filled.write_now(gone)
    counts = []
    with explained(filled) as looked:
        while count := filled.write_now(retention.drop, BEGIN + 500):
            counts.append(count)
    assert counts == [20] * (5 * GATEWAYS + 1), "of each stream, and what is in none"
    assert sum(one.startswith("DELETE FROM audit ") for one in looked.asked) > GATEWAYS
    assert seen(looked) == []


def test_a_usage_report_reads_the_days_that_are_asked_for(filled: Database) -> None:
    counted = dict.fromkeys(usage.COUNTS, 1)

    def used(connection: Connection) -> None:
        days = [usage.day_of(BEGIN + 86400 * number) for number in range(400)]
        who = [{"tenant": f"team-{number}", "key": f"key-{number}", "model": "m"} for number in range(20)]
        connection.execute(insert(sums), [{"day": day, **one, **counted} for day in days for one in who])

    filled.write_now(used)
    analyse(filled)
    since = BEGIN + 86400 * 200
    with explained(filled) as looked:
        rows = filled.read_now(usage.report, since, since + 86400, ["tenant", "model"])
        filled.read_now(lambda c: usage.report(c, since, since + 86400, ["day"], tenant="team-1"))
    assert [one["requests"] for one in rows] == [2] * 20
    assert [one for one in looked.plans if re.match(r"SCAN usage( |$)", one)] == []
    assert looked.plans and seen(looked) == []
