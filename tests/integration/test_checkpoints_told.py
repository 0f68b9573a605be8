"""What control tells of the checkpoints: its file, and what the database has behind its end, page by page."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import insert
from support.control import Running, make_key, until

from corral.cli import audit as command
from corral.cli.main import cli
from corral.config.record import AuditSettings
from corral.config.settings import Settings
from corral.control import checkpoints
from corral.control.bootstrap import bootstrap
from corral.control.checkpoints import Lines
from corral.control.ledger import Ledger
from corral.store.chain import ZERO, Signer, read_checkpoint
from corral.store.database import Database, resolve
from corral.store.tables import audit_checkpoints


def numbers(control: Running, **asked: int) -> list[int]:
    lines = control.admin.get("/admin/audit/checkpoints", params=asked).content.splitlines()
    return [read_checkpoint(line).checkpoint.number for line in lines]


def test_what_another_control_has_signed_is_told_before_it_is_in_the_file(control: Running, tmp_path: Path) -> None:
    assert numbers(control) == []
    database = Database(resolve(control.settings.store.database, control.state))
    (tmp_path / "audit.key").write_bytes((control.state / "audit.key").read_bytes())
    other = Ledger(database, AuditSettings(), tmp_path, 60.0)
    for _ in range(3):
        make_key(control)
        asyncio.run(other.sign())
    database.close()
    file, theirs = control.state / "audit/checkpoints.jsonl", other.path.read_bytes()
    assert not file.exists(), "its own round comes after a minute"
    assert control.admin.get("/admin/audit/checkpoints").content == theirs
    assert (numbers(control, after=1), numbers(control, after=3)) == ([2, 3], [])
    assert (numbers(control, after=1, limit=1), numbers(control, after=2, limit=9)) == ([2], [3])
    file.parent.mkdir()
    file.write_bytes(b"".join(theirs.splitlines(keepends=True)[:2]) + b"half a li")
    assert control.admin.get("/admin/audit/checkpoints").content == theirs
    assert numbers(control, after=2) == [3]
    assert (numbers(control, limit=2), numbers(control, after=1, limit=2)) == ([1, 2], [2, 3])
    assert (numbers(control, after=4), numbers(control, after=2**63 - 1)) == ([], [])
    file.write_bytes(b"no checkpoint\n")
    assert control.admin.get("/admin/audit/checkpoints").content == b"no checkpoint\n", "`verify` says what it is"


def test_pages_of_the_file_are_its_lines_whatever_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "STEP", 4)
    path = tmp_path / "lines"
    read = Lines(path)
    assert read.read(0, 5) == ([], 0, b"")
    drawn = random.Random(1)
    have: list[bytes] = []

    def same() -> None:
        for _ in range(40):
            after, limit = drawn.randrange(len(have) + 9), drawn.randint(1, 9)
            found = read.read(after, limit)
            assert found.lines == have[after : after + limit]
            if len(found.lines) < limit:
                assert (found.size, found.last) == (len(have), have[-1] if have else b"")
            else:
                assert found.size is None

    for _ in range(10):
        with path.open("ab") as file:
            more = [b"%d-%d\n" % (len(have) + number, drawn.randrange(10**6)) for number in range(drawn.randrange(9))]
            file.write(b"".join(more))
        have += more
        same()
    with path.open("ab") as file:
        file.write(b"half a li")
    same()
    for changed in ([b"new " + line for line in have], have[:5], have[:3] + have[20:], [], have):
        path.write_bytes(b"".join(changed))
        have = changed
        same()


def test_a_page_is_found_without_what_is_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "STEP", 4)
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(100)))
    read = Lines(path)
    assert read.read(0, 50).lines[-1] == b"49\n"
    begun: list[int] = []
    near = Lines._near
    monkeypatch.setattr(Lines, "_near", lambda *given: begun.append(near(*given)[0]) or near(*given))
    for after in (50, 54):
        assert read.read(after, 4).lines[0] == b"%d\n" % after
    assert begun == [48, 52]


def test_verify_reads_and_checks_checkpoints_page_by_page_and_says_how_far_it_is(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "AT_ONCE", 100)
    monkeypatch.setattr(command, "CHECKPOINTS", 100)
    store = {"database": database_url}
    bootstrap(tmp_path, Settings.model_validate({"control": {"state": tmp_path}, "store": store}))
    signer, previous, rows = Signer((tmp_path / "audit.key").read_text()), ZERO.hex(), []
    for number in range(1, 951):
        # Signed just now: this control's own round comes after a minute.
        signed = signer.sign(number, time.time(), previous, [])
        previous = signed.digest()
        rows.append({"number": number, "ts": signed.checkpoint.ts, "line": signed.line().decode()})
    database = Database(resolve(database_url, tmp_path))
    database.write_now(lambda c: c.execute(insert(audit_checkpoints), rows))
    database.close()
    whole = "".join(f"{row['line']}\n" for row in rows)
    control = Running(tmp_path, store=store)
    try:
        file = tmp_path / "audit/checkpoints.jsonl"
        until("the file is complete", lambda: file.exists() and file.read_text() == whole)
        file.write_text(whole[: len(whole) * 2 // 3])
        assert control.admin.get("/admin/audit/checkpoints").text == whole, "a page after the other"
        assert numbers(control, after=620, limit=100) == list(range(621, 721))
        env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (tmp_path / "admin.key").read_text().strip()}
        done = CliRunner().invoke(cli, ["audit", "verify"], env=env)
        assert ", 950 checkpoints, " in done.stdout, done.output
        assert [f"fetched {part:3d}%" in done.stderr for part in (10, 52, 100)] == [True] * 3, done.stderr
        assert "checked  52%  500 of 950 checkpoints" in done.stderr and "checked 100%  950 of 950" in done.stderr
        asked = [row for row in control.admin.get("/admin/audit").json()["audit"] if "checkpoints" in row["route"]]
        assert len(asked) <= 6, "the pages of a run are one row a minute"
    finally:
        control.close()
