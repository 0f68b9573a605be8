"""The tamper table: whatever is done to the records in the database is found by `verify`, on both databases."""

from __future__ import annotations

import asyncio
import secrets
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, select, text, update
from support.sealed import Direct

from corral.config.record import AuditSettings
from corral.control import audit as trail
from corral.control import ledger as ledgers
from corral.control.auth import Principal
from corral.control.ledger import Ledger
from corral.store.chain import ZERO, Signer, Span, content, leaf_of, link_after, read_checkpoint
from corral.store.database import Database, resolve, upgrade
from corral.store.ingest import ingest
from corral.store.retention import drop_content
from corral.store.spool import encode_frame
from corral.store.tables import audit, audit_checkpoints, audit_content, audit_streams
from corral.store.verify import Report, verify

GATEWAY = "gateway-1"
WHO = Principal("k", "admin", "::1", "")


class Trail:
    """A database with three checkpoints: records 1 to 5, 6 to 10 and 11 to 15, and 16 to 18 that have none yet."""

    def __init__(self, folder: Path, url: str) -> None:
        self.database = Database(resolve(url, folder))
        self.database.migrate()
        self.folder = folder
        (folder / "audit.key").write_text(secrets.token_hex(32))
        self.ledger = self.new_ledger()
        self.offset = 0
        self.file = folder / "audit/checkpoints.jsonl"
        for number in range(18):
            self.ship(number)
            if number in (4, 9, 14):
                self.write(lambda connection: trail.record(connection, WHO, "POST", "/admin/x", {"b": 1, "a": 2}, {}))
                asyncio.run(self.ledger.sign())

    def new_ledger(self, **settings: Any) -> Ledger:
        return Ledger(self.database, AuditSettings(**settings), self.folder, 1800.0)

    def write(self, change: Callable[[Connection], Any]) -> Any:
        return self.database.write_now(change)

    def ship(self, number: int, **fields: Any) -> None:
        record = {"t": "settle", "id": f"r{number}", "request_id": "s", "ts": 1.5 + number, "outcome": "ok", **fields}
        data = encode_frame({**record, "tokens": number, "ms": 1.25, "estimated": False, "queue_ms": 1e-7})
        self.offset = self.write(lambda c: ingest(c, GATEWAY, "0000000000000001.seg", self.offset, data)).watermark

    def verify(self, public: str = "") -> Report:
        return verify(Direct(self.database), self.file.read_bytes().splitlines(), [public or self.ledger.signer.public])

    def change(self, pos: int, /, **values: Any) -> None:
        self.write(lambda c: c.execute(update(audit).where(audit.c.gw == GATEWAY, audit.c.pos == pos).values(values)))

    def drop(self, first: int, last: int) -> None:
        which = (audit.c.gw == GATEWAY) & audit.c.pos.between(first, last)
        self.write(lambda connection: connection.execute(delete(audit).where(which)))

    def rebuild(self) -> None:
        """Give the records that are there the places, leaves and links of a chain that fits together."""

        def chain(connection: Connection) -> None:
            found = connection.execute(select(audit).where(audit.c.gw == GATEWAY).order_by(audit.c.pos)).mappings()
            rows = found.all()
            connection.execute(update(audit).where(audit.c.gw == GATEWAY).values(pos=None))
            link = ZERO
            for pos, row in enumerate(rows, 1):
                leaf = leaf_of(content({**row, "pos": pos}))
                link = link_after(link, leaf)
                connection.execute(update(audit).where(audit.c.seq == row["seq"]).values(pos=pos, leaf=leaf))
            end = update(audit_streams).where(audit_streams.c.stream == GATEWAY)
            connection.execute(end.values(pos=len(rows), link=link))

        self.write(chain)


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> Any:
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


def found(made: Trail, *words: str) -> None:
    """Verify says each of these, and nothing else of other records."""
    problems = made.verify().problems
    assert len(problems) == len(words), problems
    for word, problem in zip(words, problems, strict=True):
        assert word in problem


def test_what_was_not_touched_is_whole(made: Trail) -> None:
    report = made.verify()
    assert (report.problems, report.notes) == ([], [])
    assert (report.records, report.checkpoints, report.streams, report.unsigned) == (21, 3, 2, 3)
    assert oct(made.file.stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("pos", [1, 5, 6, 15, 17])
def test_one_changed_field(made: Trail, pos: int) -> None:
    made.change(pos, tokens=999)
    found(made, f"gateway-1: record {pos} (r{pos - 1}) was changed")


def test_a_flipped_bit_of_text(made: Trail) -> None:
    made.change(3, outcome="ol")
    found(made, "record 3 (r2) was changed")


def test_a_changed_admin_record(made: Trail) -> None:
    where = update(audit).where(audit.c.gw == "control", audit.c.pos == 2)
    made.write(lambda connection: connection.execute(where.values(before={"b": 1, "a": 3})))
    found(made, "control: record 2")


def test_a_dropped_record(made: Trail) -> None:
    made.drop(7, 7)
    found(made, "record 7 is missing")


def test_dropped_records_across_checkpoints(made: Trail) -> None:
    made.drop(4, 7)
    found(made, "records 4 to 5 are missing", "records 6 to 7 are missing")


def test_reordered_records(made: Trail) -> None:
    made.change(2, pos=99)
    made.change(4, pos=2)
    made.change(99, pos=4)
    found(made, "record 2 (r3) was moved: it was record 4", "record 4 (r1) was moved: it was record 2")


def test_an_inserted_record(made: Trail) -> None:
    def enter(connection: Connection) -> None:
        row = {"id": "forged", "ts": 2.0, "gw": GATEWAY, "outcome": "ok"}
        connection.execute(insert(audit).values(row))

    made.write(enter)
    found(made, "1 records stand beside the chain")
    made.write(lambda c: c.execute(update(audit).where(audit.c.id == "forged").values(pos=19, leaf=b"x" * 32)))
    found(made, "records 19 to 19 stand behind the end: they were inserted")


def test_a_record_that_is_inserted_with_its_chain_made_anew(made: Trail) -> None:
    def enter(connection: Connection) -> None:
        moved = update(audit).where(audit.c.gw == GATEWAY, audit.c.pos > 7)
        connection.execute(moved.values(pos=audit.c.pos + 1000))
        connection.execute(insert(audit).values(id="forged", ts=2.0, gw=GATEWAY, outcome="ok", pos=8))

    made.write(enter)
    made.rebuild()
    found(made, "checkpoint 2: records 6 to 10 fit together, but", "checkpoint 3: records 11 to 15 fit together, but")


def test_a_cut_tail(made: Trail) -> None:
    made.drop(13, 18)
    found(made, "records 13 to 15 are missing", "records 16 to 18 are missing: the tail was cut")


def test_a_cut_tail_with_its_end_made_anew(made: Trail) -> None:
    made.drop(13, 18)
    made.rebuild()
    found(made, "records 13 to 15 are missing: the tail was cut", "the database ends at record 12, 15 were signed")


def test_a_cut_tail_that_was_not_signed_yet(made: Trail) -> None:
    made.drop(18, 18)
    found(made, "record 18 is missing: the tail was cut")


def test_a_rebuilt_chain(made: Trail) -> None:
    made.change(8, tokens=999)
    made.rebuild()
    found(made, "checkpoint 2: records 6 to 10 fit together, but are not those that were signed: the chain was rebuilt")


def test_a_rebuilt_chain_that_was_not_signed_yet_is_not_signed(made: Trail) -> None:
    made.change(17, tokens=999)
    found(made, "record 17 (r16) was changed")
    with pytest.raises(ledgers.ChainBroken, match=r"gateway-1 from 16 to 19"):
        made.change(17, leaf=b"y" * 32)
        made.ship(18)
        asyncio.run(made.ledger.sign())
    assert len(made.file.read_bytes().splitlines()) == 3


def test_a_stream_that_is_gone(made: Trail) -> None:
    def remove(connection: Connection) -> None:
        connection.execute(delete(audit).where(audit.c.gw == GATEWAY))
        connection.execute(delete(audit_streams).where(audit_streams.c.stream == GATEWAY))

    made.write(remove)
    problems = made.verify().problems
    assert "gateway-1: the database no longer knows this stream" in problems


def test_a_wrong_signing_key(made: Trail) -> None:
    (made.folder / "audit.key").write_text(secrets.token_hex(32))
    other = made.new_ledger()
    asyncio.run(other.sign())
    (problem,) = [one for one in made.verify().problems if "signed by another key" in one]
    assert problem.startswith("checkpoint 4 ")
    keys = [made.ledger.signer.public, other.signer.public]
    assert verify(Direct(made.database), made.file.read_bytes().splitlines(), keys).problems == []


def test_changed_forged_and_missing_checkpoints(made: Trail) -> None:
    one, two, three = made.file.read_bytes().splitlines()
    made.file.write_bytes(b"\n".join([one, two.replace(b'"last":10', b'"last":11'), three]))
    problems = made.verify().problems
    assert "checkpoint 2 has a wrong signature: it was changed" in problems
    assert "checkpoint 3 does not continue checkpoint 2" in problems
    made.file.write_bytes(b"\n".join([one, three, b"{}"]))
    problems = made.verify().problems
    assert "checkpoint 3 follows 1: 2 to 2 is missing" in problems
    assert "line 3 of the checkpoints is none" in problems
    made.file.write_bytes(b"\n".join([one, two]))
    assert made.verify().problems[0] == "control: checkpoints are missing: records 3 to 3 were signed"


def test_a_checkpoint_of_another_chain_is_refused_whoever_signs_it(made: Trail) -> None:
    lines = made.file.read_bytes().splitlines()
    signed = read_checkpoint(lines[-1])
    spans = [Span(GATEWAY, 16, 18, "00" * 32, "00" * 32)]
    forged = Signer(secrets.token_hex(32)).sign(4, 9.0, signed.digest(), spans)
    made.file.write_bytes(b"\n".join([*lines, forged.line()]))
    assert made.verify().problems[0].startswith("checkpoint 4 is signed by another key")


def test_the_file_is_made_again_and_a_torn_line_written_anew(made: Trail) -> None:
    whole = made.file.read_bytes()
    made.file.write_bytes(whole[:-20])
    asyncio.run(made.ledger.sign())
    assert made.file.read_bytes().startswith(whole)
    assert len(made.file.read_bytes().splitlines()) == 4
    made.file.unlink()
    asyncio.run(made.ledger.sign())
    assert made.file.read_bytes().startswith(whole)
    assert made.verify().problems == []


def test_a_database_that_is_behind_the_file_is_not_signed(made: Trail) -> None:
    last = delete(audit_checkpoints).where(audit_checkpoints.c.number == 3)
    made.write(lambda connection: connection.execute(last))
    with pytest.raises(ValueError, match=r"has checkpoint 3, the database 2 at most"):
        asyncio.run(made.ledger.sign())


def test_retention_drops_whole_checkpoints_and_keeps_their_roots(made: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = update(audit_checkpoints).where(audit_checkpoints.c.number <= 2).values(ts=5.0)
    made.write(lambda connection: connection.execute(moments))
    old = made.new_ledger(retention="1h")
    asyncio.run(old.forget())
    report = made.verify()
    assert report.problems == []
    kept = made.database.read_now(lambda connection: connection.execute(select(audit.c.gw, audit.c.pos)).all())
    assert sorted(kept) == [("control", 3), *((GATEWAY, pos) for pos in range(11, 19))]
    assert report.checkpoints == 4, "that the others go is signed too"
    asyncio.run(old.forget())
    assert len(made.file.read_bytes().splitlines()) == 4
    made.drop(11, 11)
    found(made, "record 11 is missing")


def test_records_of_the_previous_version_stay_and_are_told_apart(tmp_path: Path, database_url: str) -> None:
    older = Database(resolve(database_url, tmp_path))

    def begin(connection: Connection) -> None:
        upgrade(connection, "0006")
        done = "'gateway-1', 1.5, 'ok', 6"
        connection.execute(text(f"INSERT INTO audit (id, gw, ts, outcome, tokens) VALUES ('old', {done})"))
        connection.execute(text("INSERT INTO audit (id, gw, ts) VALUES ('open', 'gateway-1', 1.5)"))

    older.write_now(begin)
    older.migrate()
    older.close()
    made = Trail(tmp_path, database_url)
    made.ship(100, id="open")
    report = made.verify()
    assert report.problems == []
    assert report.notes == ["1 records are older than the chain and not covered by it"]
    kept = made.database.read_now(lambda c: c.execute(select(audit.c.tokens).where(audit.c.id == "old")).scalar())
    assert kept == 6
    made.write(lambda connection: connection.execute(insert(audit).values(id="forged", ts=2.0, outcome="ok")))
    found(made, "1 records stand beside the chain")
    asyncio.run(made.new_ledger(retention="1h").forget())
    ids = made.database.read_now(lambda connection: set(connection.execute(select(audit.c.id)).scalars()))
    assert "old" not in ids and "open" in ids
    made.database.close()


@pytest.mark.parametrize("tail", [1, 100, 1 << 16])
def test_the_file_goes_on_behind_its_last_whole_line(made: Trail, monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    monkeypatch.setattr(ledgers, "TAIL", tail)
    assert ledgers.last_number(made.file) == 3
    whole = made.file.read_bytes()
    made.file.write_bytes(whole + whole.splitlines()[0][:50])
    assert ledgers.last_number(made.file) == 3, "a cut line is none"
    asyncio.run(made.ledger.sign())
    after = made.file.read_bytes()
    assert (after[: len(whole)], after.count(b"\n"), ledgers.last_number(made.file)) == (whole, 4, 4)
    made.file.write_bytes(after.splitlines()[0][:50])
    assert ledgers.last_number(made.file) == 0


class Texts:
    """Records r18 to r22 of `made`, of which texts are kept: r18 signed with them, the others not yet."""

    def __init__(self, made: Trail) -> None:
        self.made = made
        for number in range(18, 23):
            made.ship(number, content=b64encode(b"text %d" % number).decode())
            if number == 18:
                asyncio.run(made.ledger.sign())
        assert made.verify().problems == []

    def change(self, record: str, **values: Any) -> None:
        which = audit_content.c.id == record
        self.made.write(lambda connection: connection.execute(update(audit_content).where(which).values(values)))

    def drop(self, *records: str) -> None:
        which = audit_content.c.id.in_(records)
        self.made.write(lambda connection: connection.execute(delete(audit_content).where(which)))


@pytest.fixture
def texts(made: Trail) -> Texts:
    return Texts(made)


@pytest.mark.parametrize("number", [18, 21])
def test_a_changed_text(made: Trail, texts: Texts, number: int) -> None:
    texts.change(f"r{number}", data=b"text 81")
    found(made, f"gateway-1: the text of record {number + 1} (r{number}) was changed")


def test_texts_that_changed_places(made: Trail, texts: Texts) -> None:
    for record, other in (("r18", "x"), ("r20", "r18"), ("x", "r20")):
        texts.change(record, id=other)
    found(made, "the text of record 19 (r18) was changed", "the text of record 21 (r20) was changed")


def test_a_dropped_text(made: Trail, texts: Texts) -> None:
    texts.drop("r18", "r22")
    found(made, "the text of record 19 (r18) is missing", "the text of record 23 (r22) is missing")


def test_a_dropped_text_whose_record_no_longer_names_it(made: Trail, texts: Texts) -> None:
    texts.drop("r18")
    made.change(19, content_hash=None)
    found(made, "record 19 (r18) was changed")


def test_a_text_that_no_record_names_is_told(made: Trail) -> None:
    made.write(lambda c: c.execute(insert(audit_content).values(id="r3", ts=1.0, data=b"of an older version")))
    report = made.verify()
    assert report.problems == []
    assert report.notes == ["1 prompts with their answers are not covered: no record has their digest"]


def test_texts_that_retention_removed_are_not_missing(made: Trail, texts: Texts) -> None:
    # r<n> is of 1.5 + n: r18 and r19 are older.
    assert made.write(lambda connection: drop_content(connection, 21.0)) == 2
    assert made.verify().problems == []
    asyncio.run(made.ledger.sign())
    assert made.verify().problems == []
    texts.drop("r20")
    found(made, "the text of record 21 (r20) is missing")


def test_a_text_of_a_gateway_whose_clock_was_ahead_ends_too(made: Trail, texts: Texts) -> None:
    texts.change("r22", ts=3.0)
    assert made.write(lambda connection: drop_content(connection, 4.0)) == 1
    assert made.verify().problems == []


def test_what_retention_removes_while_verify_reads_is_not_missing(made: Trail, texts: Texts) -> None:
    class Meanwhile(Direct):
        def state(self) -> Any:
            state = super().state()
            made.write(lambda connection: drop_content(connection, 21.0))
            return state

    lines, publics = made.file.read_bytes().splitlines(), [made.ledger.signer.public]
    assert verify(Meanwhile(made.database), lines, publics).problems == []
    texts.drop("r20")
    assert len(verify(Meanwhile(made.database), lines, publics).problems) == 1


def test_the_text_is_of_the_settle_that_stands(made: Trail, texts: Texts) -> None:
    made.ship(22, content=b64encode(b"of a replay").decode())
    assert made.verify().problems == []
