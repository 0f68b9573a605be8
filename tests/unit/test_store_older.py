"""Records that are older than the chain: none is changed, dropped or passed off as one unseen, on both databases."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import delete, insert, select, update
from support.sealed import GATEWAY, Trail, begin_before_the_chain, found, move

from corral.control import ledger as ledgers
from corral.store import seal
from corral.store.chain import read_checkpoint
from corral.store.database import Database, resolve
from corral.store.tables import audit, audit_checkpoints, audit_content, audit_streams


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> Any:
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


class Upgraded(Trail):
    """A trail whose database is older than the chain."""

    def __init__(self, folder: Path, url: str) -> None:
        self.before = Database(resolve(url, folder))
        self.before.write_now(begin_before_the_chain)
        self.before.close()
        super().__init__(folder, url)

    def ids(self) -> set[str]:
        return set(self.database.read_now(lambda connection: connection.execute(select(audit.c.id)).scalars()))

    def alter(self, record: str, **values: Any) -> None:
        self.write(lambda connection: connection.execute(update(audit).where(audit.c.id == record).values(values)))

    def forget(self, until: float) -> None:
        asyncio.run(self.new_ledger(retention=f"{time.time() - until:.0f}s").forget())


@pytest.fixture
def upgraded(tmp_path: Path, database_url: str) -> Any:
    one = Upgraded(tmp_path, database_url)
    yield one
    one.database.close()


COVERED = "6 records are older than the chain: covered as they were at checkpoint 1"


def test_records_of_the_previous_version_stay_and_are_told_apart(upgraded: Upgraded) -> None:
    upgraded.ship(100, id="open")
    report = upgraded.verify()
    assert (report.problems, report.notes) == ([], [COVERED])
    assert report.records == 21 + 1 + 6
    upgraded.write(lambda connection: connection.execute(insert(audit).values(id="forged", ts=2.0, outcome="ok")))
    found(upgraded, "1 records stand beside the chain")


def test_a_changed_dropped_and_inserted_record_that_is_older_than_the_chain(upgraded: Upgraded) -> None:
    upgraded.alter("old2", tokens=7)
    found(upgraded, "of 6 records older than the chain some were changed")
    upgraded.alter("old2", tokens=6)
    assert upgraded.verify().problems == []
    numbers = upgraded.database.read_now(lambda c: dict(c.execute(select(audit.c.id, audit.c.seq)).all()))
    upgraded.alter("old2", seq=1000)
    upgraded.alter("old3", seq=numbers["old2"])
    upgraded.alter("old2", seq=numbers["old3"])
    found(upgraded, "of 6 records older than the chain some were changed")
    upgraded.write(lambda connection: connection.execute(delete(audit).where(audit.c.id == "old2")))
    found(upgraded, "of 6 records older than the chain 1 are missing")
    number = numbers["open"]
    upgraded.write(lambda connection: connection.execute(delete(audit).where(audit.c.id.in_(["open", "old3"]))))
    for record, seq in (("old2", numbers["old2"]), ("old3", numbers["old3"]), ("forged", number)):
        row = {"seq": seq, "id": record, "gw": GATEWAY, "ts": 1.5, "outcome": "ok", "tokens": 6}
        upgraded.write(lambda connection, one=row: connection.execute(insert(audit).values(one)))
    found(upgraded, "of 6 records older than the chain 1 were inserted")


def test_a_text_of_a_record_that_is_older_than_the_chain(upgraded: Upgraded) -> None:
    for number, record in enumerate(("old2", "old5"), 1):
        planted = insert(audit_content).values(id=record, ts=2.0, data=b"of nobody")
        upgraded.write(lambda connection, one=planted: connection.execute(one))
        found(upgraded, f"{number} records older than the chain have a text, which none of them had")


def forge(made: Trail, **values: Any) -> None:
    row = {"id": f"forged{values['seq']}", "ts": 2.0, "gw": GATEWAY, "outcome": "ok", **values}
    made.write(lambda connection: connection.execute(insert(audit).values(row)))


@pytest.mark.parametrize("seq", [0, -1, -(10**9)])
def test_an_inserted_record_with_a_number_below_all(made: Trail, seq: int) -> None:
    forge(made, seq=seq)
    found(made, "1 records stand beside the chain")


@pytest.mark.parametrize("seq", [0, -1])
def test_an_inserted_record_below_those_that_are_older(upgraded: Upgraded, seq: int) -> None:
    forge(upgraded, seq=seq)
    found(upgraded, "1 records stand beside the chain")


def test_an_inserted_record_that_passes_for_older(made: Trail) -> None:
    move(made, 10**9)
    found(made, "records up to 1000000000 (0) pass for older than the chain, up to 0 (0) were signed")
    forge(made, seq=1000)
    found(made, "records up to 1000000000 (1) pass for older than the chain, up to 0 (0) were signed")
    forge(made, seq=-1)
    found(made, "1 records stand beside the chain", "records up to 1000000000 (1) pass for older than the chain")
    made.ship(18)
    asyncio.run(made.ledger.sign())
    found(made, "1 records stand beside the chain", "records up to 1000000000 (1) pass for older than the chain")


def test_an_inserted_record_that_passes_for_older_beside_some_that_are(upgraded: Upgraded) -> None:
    last = upgraded.database.read_now(seal.last_older)
    forge(upgraded, seq=1000)
    move(upgraded, 10**9)
    found(upgraded, f"records up to 1000000000 (7) pass for older than the chain, up to {last} (6) were signed")
    upgraded.write(lambda c: c.execute(delete(audit_streams).where(audit_streams.c.stream == "")))
    found(
        upgraded, "7 records stand beside the chain", f"records up to 0 (0) pass for older than the chain, up to {last}"
    )


def test_retention_signs_what_is_left_of_records_older_than_the_chain(upgraded: Upgraded) -> None:
    upgraded.forget(4.5 * ledgers.DAY)
    assert {one for one in upgraded.ids() if one.startswith("o")} == {"old4", "old5", "old6"}, "by whole days"
    report = upgraded.verify()
    assert (report.problems, report.notes) == ([], [COVERED.replace("6", "3")])
    count = report.checkpoints
    upgraded.forget(4.6 * ledgers.DAY)
    assert upgraded.verify().checkpoints == count, "what nothing was taken from is not signed again"
    forge(upgraded, seq=2)
    assert "1 records older than the chain, which retention removes, are still there" in upgraded.verify().notes
    upgraded.write(lambda connection: connection.execute(delete(audit).where(audit.c.id == "old4")))
    found(upgraded, "of 3 records older than the chain 1 are missing")
    with pytest.raises(ledgers.ChainBroken, match="older than the chain are not those that were signed"):
        upgraded.forget(6.5 * ledgers.DAY)
    assert "old5" in upgraded.ids(), "nothing goes, nothing is signed"
    found(upgraded, "of 3 records older than the chain 1 are missing")


def test_retention_removes_all_that_is_older_than_the_chain(upgraded: Upgraded) -> None:
    upgraded.forget(9 * ledgers.DAY)
    assert not [one for one in upgraded.ids() if one.startswith("old")]
    report = upgraded.verify()
    assert (report.problems, report.notes) == ([], [])
    forge(upgraded, seq=2, ts=20 * ledgers.DAY)
    found(upgraded, "of 0 records older than the chain 1 were inserted")


def test_checkpoints_of_a_version_that_did_not_sign_what_is_older(upgraded: Upgraded) -> None:
    unsigned, previous = [], "00" * 32
    for line in upgraded.file.read_bytes().splitlines():
        one = read_checkpoint(line).checkpoint
        signed = upgraded.ledger.signer.sign(one.number, one.ts, previous, one.streams)
        assert b"older" not in signed.line()
        previous = signed.digest()
        unsigned.append(signed)
    upgraded.file.write_bytes(b"".join(one.line() + b"\n" for one in unsigned))
    for one in unsigned:
        row = update(audit_checkpoints).where(audit_checkpoints.c.number == one.checkpoint.number)
        row = row.values(line=one.line().decode())
        upgraded.write(lambda connection, row=row: connection.execute(row))
    report = upgraded.verify()
    assert report.problems == []
    assert report.notes == ["6 records are older than the chain and covered by no checkpoint"]
    upgraded.forget(9 * ledgers.DAY)
    assert "old1" in upgraded.ids(), "they stay until they are signed"
    asyncio.run(upgraded.ledger.sign())
    report = upgraded.verify()
    assert (report.problems, report.notes) == (
        [],
        [COVERED.replace("checkpoint 1", f"checkpoint {report.checkpoints}")],
    )
    asyncio.run(upgraded.ledger.sign())
    assert upgraded.verify().checkpoints == report.checkpoints


def test_who_signs_cannot_make_more_records_older_than_the_chain(upgraded: Upgraded) -> None:
    lines = upgraded.file.read_bytes().splitlines()
    signed = read_checkpoint(lines[-1])
    older = signed.checkpoint.older
    assert older is not None
    other = structs.replace(older, last=older.last + 1)
    forged = upgraded.ledger.signer.sign(4, 9.0, signed.digest(), [], other)
    upgraded.file.write_bytes(b"\n".join([*lines, forged.line()]))
    move(upgraded, other.last)
    found(upgraded, f"checkpoint 4: records up to {other.last} are older than the chain, up to {older.last} were")
