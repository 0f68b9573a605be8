"""Requests that nobody settled: when control does, and that it does not where somebody still may."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, select, update
from support.shipped import NOON, Spool, admit, begin, record, rows, settle

from corral.store import progress, recovery, usage
from corral.store.chain import content, leaf_of
from corral.store.database import Database
from corral.store.tables import audit_holders, spool_begins, spool_watermarks


@pytest.fixture
def database(tmp_path: Path, database_url: str) -> Iterator[Database]:
    with record(database_url, tmp_path) as made:
        yield made


def told(database: Database, gateway: str, shipped: float, heard: float, ended: bool = False) -> None:
    database.write_now(progress.shipped, {gateway: progress.Shipped(shipped, heard, ended)})


def recovered(database: Database, now: float, lives: str = "gateway-1") -> int:
    """`lives`: a gateway that has told until now, and has shipped it all."""
    if lives:
        told(database, lives, now, now)
    return len(database.write_now(recovery.recover, now, 1800.0))


def test_what_nobody_settled_is_settled_at_its_last_progress(database: Database) -> None:
    spool = Spool(database)
    far = ["node-2", 1, 40, 5, 900, 1.5, 20.0, 1000.0]
    spool.ship(admit(1), admit(2), admit(3))
    spool.ship({"t": "progress", "rows": [["edge-1", *far], ["edge-3", *far]]}, settle(3))
    further = ["node-2", 1, 40, 9, 1800, 1.5, 20.0, 2000.0]
    told_late = {"t": "progress", "rows": [["edge-1", *far]]}
    spool.ship({"t": "progress", "rows": [["edge-1", *further], ["edge-2", 1], 7]}, told_late)
    spool.ship(told_late)
    assert recovered(database, time.time() + 3600) == 0, "their gateway may live"
    spool.ship(begin(), admit(4))
    assert recovered(database, time.time() + recovery.GRACE - 5) == 0, "the edge may have asked another gateway"
    assert recovered(database, time.time() + recovery.GRACE + 5) == 2
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    by_id = {row["id"]: row for row in rows(database)}
    one, two, three, four = (by_id[f"edge-{number}"] for number in (1, 2, 3, 4))
    assert (one["outcome"], one["estimated"], one["tokens"], one["node"]) == ("interrupted", True, 9, "node-2")
    assert (one["ms"], one["prompt_tokens"], one["resp_bytes"]) == (2000.0, 40, 1800)
    assert (two["outcome"], two["estimated"], two["tokens"]) == ("interrupted", True, None)
    assert (three["outcome"], three["tokens"], four["outcome"]) == ("ok", 6, None)
    assert all(row["leaf"] == leaf_of(content(row)) for row in (one, two, three))
    spool.ship(settle(1, tokens=70))
    (sums,) = database.read_now(usage.report, NOON, NOON, ["key"])
    assert (sums["requests"], sums["failed"], sums["estimated"], sums["tokens"]) == (3, 2, 2, 15)


def test_each_begin_leaves_others_their_time_to_tell(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    began = time.time()
    killed.ship(admit(1))
    killed.ship(begin(), admit(2))
    monkeypatch.setattr(time, "time", lambda: began + recovery.GRACE - 1)
    killed.ship(begin())
    assert recovered(database, began + recovery.GRACE + 1) == 1, "request 1 has had its time"
    assert recovered(database, began + recovery.GRACE + 1) == 0, "gateway-2 has request 2, and has not told yet"
    other.ship(settle(2, gw="gateway-2"))
    assert recovered(database, began + 2 * recovery.GRACE) == 0
    assert [row["outcome"] for row in rows(database)] == ["interrupted", "ok"]


def test_one_that_begins_again_and_again_keeps_nothing_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, began = Spool(database), time.time()
    spool.ship(admit(1))
    counts = []
    for number in range(5):
        monkeypatch.setattr(time, "time", lambda number=number: began + 10 * number)
        spool.ship(begin())
        counts.append(recovered(database, began + 10 * number + 1))
    assert counts == [0, 0, 1, 0, 0]


def test_a_request_that_the_edge_gave_to_another_gateway_is_its(database: Database) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    other.ship(admit(1, ts=NOON + 1))
    killed.ship(admit(1), admit(2))
    other.ship(admit(2, ts=NOON + 1))
    killed.ship(begin())
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    assert database.read_now(lambda connection: connection.execute(select(spool_begins)).all()) == []
    other.ship(settle(1), settle(2))
    assert [(row["gw"], row["outcome"]) for row in rows(database)] == [("gateway-2", "ok")] * 2


def test_a_request_given_to_a_gateway_that_has_begun_just_now_goes_on(database: Database) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    killed.ship(admit(1), admit(2))
    other.ship(begin("gateway-2"))
    other.ship(admit(1, ts=NOON + 1))
    killed.ship(begin())
    told(database, "gateway-2", time.time() + 40, time.time() + 40)
    assert recovered(database, time.time() + recovery.GRACE + 5) == 1, "gateway-2 has the first since it began"
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    other.ship(begin("gateway-2"))
    told(database, "gateway-1", time.time() + 40, time.time() + 40)
    assert recovered(database, time.time() + recovery.GRACE + 5, "gateway-2") == 1
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    assert [row["outcome"] for row in rows(database)] == ["interrupted", "interrupted"]
    assert database.read_now(lambda connection: connection.execute(select(audit_holders)).all()) == []


def test_a_request_given_to_a_gateways_next_life_goes_on(database: Database) -> None:
    spool = Spool(database)
    spool.ship(admit(1))
    spool.ship(begin())
    spool.ship(admit(1, ts=NOON + 1))
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    spool.ship(settle(1))
    assert [row["outcome"] for row in rows(database)] == ["ok"]


def test_a_gateways_next_life_is_waited_for_until_it_has_shipped_what_the_edge_gave_it(database: Database) -> None:
    spool, began = Spool(database), time.time()
    spool.ship(admit(1), admit(2))
    spool.ship(begin())
    later = began + 10 * recovery.GRACE
    told(database, "gateway-1", began + 2, later - 1)
    assert recovered(database, later, lives="") == 0, "it has the answer, and no control took it yet"
    spool.ship(settle(1))
    assert recovered(database, later) == 1
    assert [row["outcome"] for row in rows(database)] == ["ok", "interrupted"]


def test_a_begin_that_was_long_on_its_way_says_nothing_of_what_was_written_since(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    began = time.time()
    killed.ship(admit(1), admit(2))
    killed.ship(begin(ts=began))
    monkeypatch.setattr(time, "time", lambda: began + 2 * recovery.GRACE)
    other.ship(begin("gateway-2", ts=began + 1))
    later = began + 3 * recovery.GRACE
    assert recovered(database, later) == 0, "the edge asked gateway-2 since it began"
    other.ship(settle(1, gw="gateway-2"))
    told(database, "gateway-2", later, later)
    assert recovered(database, later) == 1
    assert [row["outcome"] for row in rows(database)] == ["ok", "interrupted"]


@pytest.mark.parametrize("skew", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("first", [True, False])
def test_no_clock_decides_who_has_a_request_that_two_have_admitted(
    database: Database, skew: float, first: bool
) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    ships = [lambda: killed.ship(admit(1)), lambda: other.ship(admit(1, ts=NOON + skew))]
    for ship in ships if first else reversed(ships):
        ship()
    killed.ship(begin())
    assert recovered(database, time.time() + recovery.GRACE + 5) == 0
    other.ship(settle(1, ts=NOON + skew))
    assert [(row["gw"], row["outcome"]) for row in rows(database)] == [("gateway-2", "ok")]
    assert recovered(database, time.time() + 2 * 86400) == 0


def test_what_two_gateways_had_that_never_come_back_is_given_up(database: Database) -> None:
    both = [Spool(database), Spool(database, "gateway-2")]
    now = time.time()
    for spool in both:
        spool.ship(admit(1, ts=now - 10 * 86400))
    gone = update(spool_watermarks).values(updated=now - 2 * 86400)
    database.write_now(lambda connection: connection.execute(gone))
    assert recovered(database, now) == 1
    assert [row["outcome"] for row in rows(database)] == ["interrupted"]


def test_who_may_have_got_the_request_is_waited_for_until_it_has_shipped(database: Database) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    began = time.time()
    later = began + 10 * recovery.GRACE

    killed.ship(admit(1), admit(2))
    told(database, "gateway-2", began, began)
    told(database, "gateway-3", began - 9, began - 9, ended=True)
    told(database, "gateway-4", began - 9, later - recovery.GONE - 1)
    killed.ship(begin())
    assert recovered(database, later) == 0, "gateway-2 was cut off and has the answer"
    told(database, "gateway-2", began + recovery.GRACE - 1, began + 40)
    assert recovered(database, later) == 0, "it is heard, and behind"
    other.ship(settle(1, gw="gateway-2"))
    told(database, "gateway-2", began + 9 * recovery.GRACE, began + 41)
    told(database, "gateway-2", began + 2, began + 2)
    assert recovered(database, later) == 1, "what was told late takes nothing back"
    assert [row["outcome"] for row in rows(database)] == ["ok", "interrupted"]
    told(database, "gateway-5", began, began)
    killed.ship(admit(3))
    killed.ship(begin())
    assert recovered(database, later) == 0
    Spool(database, "gateway-5").ship(begin("gateway-5", gone=True))
    assert recovered(database, later) == 1, "another one has shipped what gateway-5 left"


def test_a_clock_that_is_ahead_is_not_believed(database: Database) -> None:
    killed, other = Spool(database), Spool(database, "gateway-2")
    now, year = time.time(), 365 * 86400.0
    later = now + recovery.GRACE + 5
    killed.ship(admit(1))
    told(database, "gateway-2", now + year, now + year)
    killed.ship(begin())
    assert recovered(database, later) == 0
    told(database, "gateway-2", now - 100, now)
    assert recovered(database, later) == 0
    told(database, "gateway-2", now + year, now + year, ended=True)
    other.ship(begin("gateway-2"))
    assert recovered(database, later) == 0, "it has begun again, whatever was said of its end"
    assert recovered(database, later, "gateway-2") == 1


def test_a_gateway_that_never_comes_back_is_given_up(database: Database) -> None:
    spool, lives = Spool(database), Spool(database, "gateway-2")
    now = time.time()
    spool.ship(admit(1, ts=now - 10 * 86400))
    lives.ship(admit(2, ts=now - 10 * 86400))
    assert recovered(database, now) == 0, "it has just shipped"
    gone = update(spool_watermarks).where(spool_watermarks.c.gateway == "gateway-1").values(updated=now - 2 * 86400)
    database.write_now(lambda connection: connection.execute(gone))
    assert recovered(database, now) == 1
    assert [(row["id"], row["outcome"]) for row in rows(database)] == [("edge-1", "interrupted"), ("edge-2", None)]


def test_what_a_gateway_that_lives_lost_the_end_of_is_settled_once_it_is_over(database: Database) -> None:
    spool, other, silent = Spool(database), Spool(database, "gateway-2"), Spool(database, "gateway-3")
    now = time.time()
    spool.ship(begin(), admit(1, ts=now + 3600), admit(2), admit(3))
    silent.ship(admit(4))
    far = ["node-2", 1, 40, 5, 900, 1.5, 20.0]
    moment, longer = 1800e3 + 300.0, 1800e3 + recovery.LATE * 1e3  # the first is how late a gateway's look may be
    spool.ship({"t": "progress", "rows": [["edge-1", *far, moment], ["edge-3", *far, longer]]}, settle(2))
    other.ship(begin("gateway-2"), admit(5))
    told(database, "gateway-1", now, now)
    told(database, "gateway-2", now, now, ended=True)
    last = max(row["seq"] for row in rows(database))
    assert database.read_now(recovery.over, now, 1800.0) == (1800.0 + recovery.LATE, last)
    spool.ship(admit(6))
    found = [row["id"] for row in database.write_now(recovery.overdue, now, 1800.0, 0, last)]
    found += [row["id"] for row in database.write_now(recovery.overdue, now, 1800.0, 0, last)]
    assert found == ["edge-1", "edge-5"], "not what runs for longer, of one that never told, or came since"
    assert database.write_now(recovery.overdue, now, 1800.0, 0, last) == []
    by_id = {row["id"]: row for row in rows(database)}
    assert {by_id[f"edge-{number}"]["outcome"] for number in (3, 4, 6)} == {None}
    one = by_id["edge-1"]
    assert (one["outcome"], one["estimated"], one["tokens"], one["gw"]) == ("interrupted", True, 5, "gateway-1")
    assert all(row["leaf"] == leaf_of(content(row)) for row in (one, by_id["edge-5"]))
    before = database.read_now(usage.report, 0.0, NOON, ["key"])
    spool.ship(settle(1, tokens=70))
    assert database.read_now(usage.report, 0.0, NOON, ["key"]) == before, "its end came late, and counts no more"
    assert (before[0]["requests"], before[0]["estimated"]) == (3, 2)


def test_no_request_is_over_before_each_gateway_has_shipped_what_it_wrote_by_then(database: Database) -> None:
    now, most = time.time(), 1800.0 + recovery.LATE

    def ago() -> float:
        return database.read_now(recovery.over, now, 1800.0)[0]

    assert ago() == most
    told(database, "gateway-1", now - 5, now - 1)
    told(database, "gateway-2", now - 500, now - 400)
    told(database, "gateway-3", now - 900, now - 800, ended=True)
    told(database, "gateway-4", now - 2 * recovery.GONE, now - recovery.GONE - 1)
    assert ago() == pytest.approx(most + 500), "one that is cut off may have the end of it"
    told(database, "gateway-2", now + 5, now + 5)
    assert ago() == pytest.approx(most + 5)
    told(database, "gateway-5", now, now + progress.AHEAD + 1)
    assert ago() == float("inf"), "a clock that is ahead of every other says nothing"


def test_a_round_looks_up_the_few_holders_and_not_all_that_was_settled(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/corral.db")
    database.migrate()
    asked: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert recovered(database, time.time()) == 0
    (deleted,) = [words for words in asked if words.startswith("DELETE FROM audit_holders")]
    plan = database.read_now(lambda connection: str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {deleted}").all()))
    assert "SCAN audit_holders" in plan and "SCAN audit'" not in plan and "SEARCH audit USING" in plan, plan
    database.close()


def test_one_whose_clock_was_ahead_keeps_nothing_open_when_it_is_gone(database: Database) -> None:
    year, now = 365 * 86400.0, time.time()
    Spool(database).ship(begin(), admit(1, ts=now + year))
    assert recovered(database, now + recovery.GONE, lives="") == 0, "it may come back"
    assert recovered(database, now + recovery.GONE + 1800 + 5, lives="") == 1
