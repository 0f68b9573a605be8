"""A verification that runs while retention deletes: nothing is missed falsely, nothing that is missing passed over."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from support.sealed import GATEWAY, Direct, Trail, begin_before_the_chain

from corral.control import ledger as ledgers
from corral.control.ledger import DAY
from corral.store import retention
from corral.store import verify as verifying
from corral.store.database import Database, resolve
from corral.store.retention import drop, drop_content
from corral.store.tables import audit, audit_checkpoints
from corral.store.verify import Report, verify


@pytest.fixture
def made(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(verifying, "PAGE", 4)
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


class Meanwhile(Direct):
    """Records straight from a database, in which something happens before a page of a stream is read."""

    def __init__(self, made: Trail, at: int, happens: Callable[[], Any], stream: str = GATEWAY) -> None:
        super().__init__(made.database)
        self._left, self._happens, self._stream = at, happens, stream
        self.pages = 0

    def records(self, stream: str, after: int, limit: int) -> list[dict[str, Any]]:
        if stream == self._stream and limit > 1:
            self.pages += 1
            if self.pages == self._left:
                self._happens()
        return super().records(stream, after, limit)


def age(made: Trail, last: int) -> None:
    """Have the checkpoints up to a number be older than the retention."""
    moved = update(audit_checkpoints).where(audit_checkpoints.c.number <= last).values(ts=5.0)
    made.write(lambda connection: connection.execute(moved))


def checked(made: Trail, source: Direct) -> Report:
    return verify(source, made.file.read_bytes().splitlines(), [made.ledger.signer.public])


def forget(made: Trail) -> None:
    asyncio.run(made.new_ledger(retention="1h").forget())


def places(made: Trail) -> list[int]:
    wanted = select(audit.c.pos).where(audit.c.gw == GATEWAY).order_by(audit.c.pos)
    return made.database.read_now(lambda connection: list(connection.execute(wanted).scalars()))


@pytest.mark.parametrize("page", [1, 2, 3, 4])
def test_what_retention_deletes_between_two_pages_is_not_missing(made: Trail, page: int) -> None:
    age(made, 2)
    source = Meanwhile(made, page, lambda: forget(made))
    report = checked(made, source)
    assert source.pages >= page
    assert places(made) == list(range(11, 19)), "it was a real run"
    assert report.problems == []
    told = "gateway-1: records up to 10 were removed by retention meanwhile"
    assert report.notes == ([told] if page < 4 else [])
    assert made.verify().problems == []


def test_retention_that_runs_again_and_again_meanwhile(made: Trail) -> None:
    def twice() -> None:
        for last in (1, 2):
            age(made, last)
            forget(made)

    def first() -> None:
        age(made, 1)
        forget(made)
        source._left, source._happens = 2, twice

    source = Meanwhile(made, 1, first)
    report = checked(made, source)
    assert (report.problems, places(made)) == ([], list(range(11, 19)))


def test_a_stream_that_retention_empties_meanwhile(made: Trail) -> None:
    def all_of_it() -> None:
        asyncio.run(made.ledger.sign())
        age(made, 4)
        forget(made)

    report = checked(made, Meanwhile(made, 2, all_of_it))
    assert (report.problems, places(made)) == ([], [])


def test_a_batch_that_was_deleted_is_no_reason_to_miss_what_is_still_there(
    made: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    age(made, 2)

    def begin() -> None:
        ledger = made.new_ledger(retention="1h")
        dropped = made.database.read_now(retention.due, time.time() - 3600)
        signed = made.write(lambda connection: ledger._sign(connection, dropped, None))
        ledger._append([signed])
        while len(places(made)) == 18:  # that of control goes too
            made.write(lambda connection: drop(connection, time.time() - 3600))

    report = checked(made, Meanwhile(made, 1, begin))
    assert (report.problems, places(made)) == ([], list(range(3, 19)))
    assert report.notes == ["gateway-1: records up to 2 were removed by retention meanwhile"]
    made.change(4, tokens=999)
    assert "gateway-1: records up to 10 that retention removes are still there, from 3 on" in made.verify().notes


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        (12, 12, "record 12 is missing"),
        (9, 12, "records 11 to 12 are missing"),
        (9, 11, "record 11 is missing"),
        (17, 18, "records 17 to 18 are missing: the tail was cut"),
    ],
)
@pytest.mark.parametrize("page", [1, 2])
def test_what_somebody_dropped_is_missing_beside_it(made: Trail, page: int, first: int, last: int, told: str) -> None:
    age(made, 2)

    def both() -> None:
        forget(made)
        made.drop(first, last)

    assert checked(made, Meanwhile(made, page, both)).problems == [f"gateway-1: {told}"]


def test_what_is_dropped_right_behind_what_retention_removes_is_missing(
    made: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "SPAN_MAX", 2)

    def both() -> None:
        # Of those that had no checkpoint when it began, the first two have one now, and go.
        asyncio.run(made.ledger.sign())
        age(made, 4)
        forget(made)
        made.drop(18, 18)

    report = checked(made, Meanwhile(made, 1, both))
    assert report.problems == ["gateway-1: record 18 is missing: the tail was cut"]
    assert report.notes == ["gateway-1: records up to 17 were removed by retention meanwhile"]


def test_who_cannot_sign_cannot_pass_a_drop_off_as_retention(made: Trail) -> None:
    def forge() -> None:
        made.drop(3, 7)
        line = made.file.read_bytes().splitlines()[-1]
        forged = line.replace(b'"number":3', b'"number":4').replace(b'"dropped":0', b'"dropped":10')
        assert forged.count(b'"dropped":10') == 2
        row = {"number": 4, "ts": 9.0, "line": forged.decode()}
        made.write(lambda connection: connection.execute(audit_checkpoints.insert().values(row)))

    problems = checked(made, Meanwhile(made, 1, forge)).problems
    assert "gateway-1: records 3 to 5 are missing" in problems
    assert "gateway-1: records 6 to 7 are missing" in problems
    assert "checkpoint 4 has a wrong signature: it was changed" in problems


@pytest.mark.parametrize("page", [2, 3])
def test_what_is_left_is_compared_with_what_was_signed(made: Trail, page: int) -> None:
    age(made, 2)

    def both() -> None:
        made.change(13, tokens=999)
        forget(made)

    assert checked(made, Meanwhile(made, page, both)).problems == ["gateway-1: record 13 (r12) was changed"]


def test_a_text_whose_record_goes_with_it_meanwhile_is_not_missing(made: Trail) -> None:
    made.ship(18, content=b64encode(b"a text").decode())
    asyncio.run(made.ledger.sign())

    def texts_first() -> None:
        # That of control, which says that texts went, is gone before the record is looked at.
        made.write(lambda connection: drop_content(connection, 21.0))
        asyncio.run(made.ledger.sign())
        age(made, 5)
        ledger = made.new_ledger(retention="1h")
        dropped = made.database.read_now(retention.due, time.time() - 3600)
        ledger._append([made.write(lambda connection: ledger._sign(connection, dropped, None))])
        gone = delete(audit).where(audit.c.gw == "control")
        made.write(lambda connection: connection.execute(gone))

    source = Meanwhile(made, 1, texts_first, stream="control")
    assert checked(made, source).problems == []


# -- records that are older than the chain


@pytest.fixture
def upgraded(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(verifying, "PAGE", 2)
    before = Database(resolve(database_url, tmp_path))
    before.write_now(begin_before_the_chain)
    before.close()
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


def forget_older(made: Trail) -> None:
    asyncio.run(made.new_ledger(retention=f"{time.time() - 4.5 * DAY:.0f}s").forget())


def older(made: Trail) -> list[str]:
    wanted = select(audit.c.id).where(audit.c.id.like("old%")).order_by(audit.c.seq)
    return made.database.read_now(lambda connection: list(connection.execute(wanted).scalars()))


@pytest.mark.parametrize("page", [1, 2, 3])
def test_what_retention_deletes_of_records_older_than_the_chain_is_not_missing(upgraded: Trail, page: int) -> None:
    source = Meanwhile(upgraded, page, lambda: forget_older(upgraded), stream="")
    report = checked(upgraded, source)
    assert (older(upgraded), report.problems) == (["old4", "old5", "old6"], [])
    assert report.records == 21 + 3 or page == 3
    assert source.pages >= page


def test_one_of_them_that_somebody_dropped_is_missing_beside_it(upgraded: Trail) -> None:
    def both() -> None:
        forget_older(upgraded)
        upgraded.write(lambda connection: connection.execute(delete(audit).where(audit.c.id == "old5")))

    problems = checked(upgraded, Meanwhile(upgraded, 2, both, stream="")).problems
    assert problems == ["of 3 records older than the chain 1 are missing"]
