"""What control tells of the checkpoints: its file, and what the database has behind its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.control import Running, make_key

from corral.config.record import AuditSettings
from corral.control.ledger import Ledger
from corral.store.chain import read_checkpoint
from corral.store.database import Database, resolve


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
    file.parent.mkdir()
    file.write_bytes(b"".join(theirs.splitlines(keepends=True)[:2]) + b"half a li")
    assert control.admin.get("/admin/audit/checkpoints").content == theirs
    assert numbers(control, after=2) == [3]
    file.write_bytes(b"no checkpoint\n")
    assert control.admin.get("/admin/audit/checkpoints").content == b"no checkpoint\n", "`verify` says what it is"
