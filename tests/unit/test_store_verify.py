"""The tamper table: whatever is done to the records in the database is found by `verify`, on both databases."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Connection, delete, insert, select, update
from support.sealed import GATEWAY, Direct, Trail, found
from support.tampers import TAMPERS, note

from corral.config.record import AuditSettings
from corral.control import ledger as ledgers
from corral.store.chain import Signer, Span, read_checkpoint
from corral.store.tables import audit, audit_checkpoints, audit_streams
from corral.store.verify import verify


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> Any:
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


def test_what_was_not_touched_is_whole(made: Trail) -> None:
    report = made.verify()
    assert (report.problems, report.notes) == ([], [])
    assert (report.records, report.checkpoints, report.streams, report.unsigned) == (21, 3, 2, 3)
    assert oct(made.file.stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("tamper", TAMPERS)
def test_the_tamper_table(made: Trail, tamper: str) -> None:
    do, words = TAMPERS[tamper]
    do(made)
    (problem,) = [one for one in made.verify().problems if words in one]
    note("verify()", made.database.dialect, tamper, problem)


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


@pytest.mark.parametrize("gw", [GATEWAY, "gateway-0", "gateway-9", "", None])
@pytest.mark.parametrize("pos", [None, -1, 0, 1000])
def test_an_inserted_record_of_any_stream_and_place(made: Trail, gw: str | None, pos: int | None) -> None:
    forged = {"id": "forged", "ts": 2.0, "gw": gw, "pos": pos, "outcome": "ok", "leaf": b"x" * 32}
    made.write(lambda connection: connection.execute(insert(audit).values(forged)))
    if pos == 1000 and gw == GATEWAY:
        found(made, "records 19 to 1000 stand behind the end: they were inserted")
    else:
        found(made, f"{pos if pos == 1000 else 1} records stand beside the chain: they were inserted")


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
    with pytest.raises(ledgers.AnotherKey, match=f"checkpoint 3 is signed by another key .*{made.ledger.signer.id}"):
        asyncio.run(other.sign())
    assert (other.stranger, made.verify().problems) == (made.ledger.signer.id, [])
    other = made.new_ledger(follows=made.ledger.signer.id)
    asyncio.run(other.sign())
    assert other.stranger is None
    made.ship(18)
    with pytest.raises(ledgers.AnotherKey):  # the one before, started again
        asyncio.run(made.ledger.sign())
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


@pytest.mark.parametrize("how", ["changed", "of another key", "the last one again"])
def test_a_checkpoint_that_somebody_put_into_the_database_goes_nowhere(made: Trail, how: str) -> None:
    before = made.file.read_bytes()
    signed = read_checkpoint(before.splitlines()[-1])
    changed = replace(signed, checkpoint=replace(signed.checkpoint, number=4, previous=signed.digest()))
    other = Signer(secrets.token_hex(32)).sign(4, 9.0, signed.digest(), signed.checkpoint.streams)
    forged = {"changed": changed, "of another key": other, "the last one again": signed}[how]
    row = {"number": 4, "ts": 9.0, "line": forged.line().decode()}
    made.write(lambda connection: connection.execute(insert(audit_checkpoints).values(row)))
    for _ in range(2):
        with pytest.raises(ledgers.ChainBroken, match=r"checkpoint 4 is none that .*audit\.key signed"):
            asyncio.run(made.ledger.sign())
    assert (made.file.read_bytes(), made.ledger.number) == (before, 3), "the webhook gets what the file has"


def last_number(file: Path) -> int:
    last = ledgers.last_line(file)
    return 0 if last is None else last.checkpoint.number


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


def test_what_another_control_signs_between_two_looks_is_in_the_file_too(
    made: Trail, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("other")
    (folder / "audit.key").write_bytes((made.folder / "audit.key").read_bytes())
    other = ledgers.Ledger(made.database, AuditSettings(), folder, 1800.0)
    complete, looked = made.ledger._complete_file, list[int]()

    async def and_then() -> None:
        await complete()
        if not looked:
            looked.append(1)
            await other.sign()
            made.ship(18)

    monkeypatch.setattr(made.ledger, "_complete_file", and_then)
    asyncio.run(made.ledger.sign())
    numbers = [read_checkpoint(line).checkpoint.number for line in made.file.read_bytes().splitlines()]
    assert numbers == [1, 2, 3, 4, 5]
    assert made.verify().problems == []


def test_what_waits_for_a_checkpoint_has_waited_since_the_last_one(made: Trail) -> None:
    def begun() -> float:
        ledger = made.new_ledger()
        asyncio.run(ledger._look_back())
        return ledger.signed_at

    asyncio.run(made.ledger.sign())
    last = read_checkpoint(made.file.read_bytes().splitlines()[-1]).checkpoint.ts
    assert begun() > last, "nothing waits"
    made.ship(30)
    assert begun() == last


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
    made.write(lambda c: c.execute(insert(audit).values(id="forged", ts=2.0, gw=GATEWAY, outcome="ok", pos=5)))
    assert "gateway-1: records up to 10 that retention removes are still there, from 5 on" in made.verify().notes


@pytest.mark.parametrize("tail", [1, 100, 1 << 16])
def test_the_file_goes_on_behind_its_last_whole_line(made: Trail, monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    monkeypatch.setattr(ledgers, "TAIL", tail)
    assert last_number(made.file) == 3
    whole = made.file.read_bytes()
    made.file.write_bytes(whole + whole.splitlines()[0][:50])
    assert last_number(made.file) == 3, "a cut line is none"
    asyncio.run(made.ledger.sign())
    after = made.file.read_bytes()
    assert (after[: len(whole)], after.count(b"\n"), last_number(made.file)) == (whole, 4, 4)
    made.file.write_bytes(after.splitlines()[0][:50])
    assert last_number(made.file) == 0
