"""Backups of SQLite and PostgreSQL: there and back, whole or refused."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text
from support.backup import FOR_ME, IDENTITY, fill, place, rows_at, rows_in
from support.control import Running, until
from support.postgres import Postgres, name_of

from corral.backup import archive
from corral.backup.archive import BackupError, Secrets, Writer
from corral.backup.create import create
from corral.backup.restore import Wishes, extract, restore, verify
from corral.config.values import database_url as address
from corral.control.bootstrap import bootstrap
from corral.store import replace
from corral.store.database import configured, revisions, upgrade
from corral.store.replace import ReplaceError
from corral.store.spool import encode_frame
from corral.store.tables import audit

KINDS = ("sqlite", "postgresql")
PASSPHRASE = Secrets(passphrase="correct horse battery")

NewUrl = Callable[[str], str]


@pytest.fixture
def new_url(request: pytest.FixtureRequest) -> NewUrl:
    """Makes an empty database of a kind; its address."""

    def make(kind: str) -> str:
        if kind == "sqlite":
            return "sqlite:///corral.db"
        server: Postgres = request.getfixturevalue("postgres")
        return address(server.database())

    return make


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """A small backup of an installation on SQLite, for FOR_ME."""
    source = place(tmp_path / "old", "sqlite:///corral.db")
    fill(source)
    create(source, tmp_path / "made.backup", FOR_ME)
    yield tmp_path / "made.backup"


def next_number(made: Any) -> int:
    """The number that the next audit row gets."""
    database = configured(made.settings.store, made.root)
    try:
        key = database.write_now(lambda c: c.execute(insert(audit).values(id="next", ts=1.0))).inserted_primary_key
        return int(key[0])
    finally:
        database.close()


def nulls(made: Any) -> int:
    """How many audit rows have no `before`."""
    database = configured(made.settings.store, made.root)
    try:
        statement = text("SELECT count(*) FROM audit WHERE before IS NULL")
        return int(database.read_now(lambda connection: connection.execute(statement).scalar_one()))
    finally:
        database.close()


@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("of", KINDS)
def test_there_and_back(tmp_path: Path, new_url: NewUrl, of: str, into: str) -> None:
    source = place(tmp_path / "old", new_url(of))
    key = fill(source)
    secrets = PASSPHRASE if of != into else FOR_ME
    before = rows_at(source)
    told = create(source, tmp_path / "one.backup", secrets)
    assert told["tables"]["audit"] == 42 == len(before["audit"])
    target = place(tmp_path / "new", new_url(into))
    wishes = Wishes(database=target.settings.store.database)
    done = restore(tmp_path / "one.backup", secrets, place(tmp_path / "new"), wishes)
    assert done["aside"] is None
    assert rows_at(target) == before
    assert nulls(target) == nulls(source) > 20, "NULL is not JSON's null"
    assert (target.root / "pepper").read_bytes() == (source.root / "pepper").read_bytes()
    assert next_number(target) == next_number(source) > 43, "numbers that were given are not given again"
    assert sorted(path.name for path in target.root.iterdir() if path.name.startswith(".")) == [".control.lock"]
    control = Running(target.root, store={"database": target.settings.store.database})
    try:
        with control.client(key) as client:
            assert client.get("/admin/status").status_code == 200
        assert control.admin.get("/admin/keys").status_code == 200, "there is an admin key again"
    finally:
        control.close()
    # A call to the database that was under way may outlive control, and SQLite's files beside it go with the last one.
    until("the last call has ended", lambda: not [one for one in threading.enumerate() if "database" in one.name])
    assert all(stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700) for path in target.root.rglob("*"))


def test_what_is_called_a_segment_and_is_no_file_stops_no_backup(tmp_path: Path, new_url: NewUrl) -> None:
    source = place(tmp_path / "old", new_url("sqlite"))
    fill(source)
    spool = source.root / source.settings.gateway.spool / "gateway-1"
    (spool / "0000000000000001.seg").mkdir(parents=True)
    os.mkfifo(spool / "0000000000000002.seg")
    (spool / "0000000000000003.seg").write_bytes(encode_frame({"t": "begin", "gw": "gateway-1", "ts": 1.0}))
    assert create(source, tmp_path / "one.backup", FOR_ME)["spool_segments"] == 1


def test_the_backup_says_where_its_database_was(tmp_path: Path, postgres: Postgres) -> None:
    url = address(postgres.database())
    source = place(tmp_path / "old", url)
    fill(source)
    before = rows_at(source)
    create(source, tmp_path / "one.backup", FOR_ME)
    with pytest.raises(BackupError, match="is not empty"):
        restore(tmp_path / "one.backup", FOR_ME, place(tmp_path / "new"), Wishes())
    assert not (tmp_path / "new/pepper").exists()
    postgres.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public", name_of(url))
    restore(tmp_path / "one.backup", FOR_ME, place(tmp_path / "new"), Wishes())
    assert rows_at(place(tmp_path / "new", url)) == before


def test_what_is_in_it(tmp_path: Path, made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert b"kept" not in made.read_bytes()
    record = json.loads((tmp_path / "old/backup.json").read_text())
    assert (record["file"], record["size"]) == (str(made), made.stat().st_size)
    assert record["last_success"] == pytest.approx(time.time(), abs=60)
    found = archive.read(made, FOR_ME)
    assert {"secrets/pepper", "secrets/internal.token", "config/settings.yaml"} <= set(found.members)
    told = verify(made, FOR_ME)
    assert told["tables"] == {name: len(rows) for name, rows in rows_in(made).items()}
    seen: list[bytes] = []
    archive.read(made, FOR_ME, lambda name, size, source: seen.append(source.read(size)))
    assert (tmp_path / "old/admin.key").read_bytes().strip() not in b"".join(seen), "no key is in it, only verifiers"


@pytest.mark.parametrize("schema", revisions()[:-1])
def test_an_older_schema_is_migrated_forward(tmp_path: Path, new_url: NewUrl, schema: str) -> None:
    source = place(tmp_path / "old", new_url("sqlite"))
    fill(source)
    (source.root / "corral.db").unlink()
    older = configured(source.settings.store, source.root)

    def begin(connection: Any) -> None:
        upgrade(connection, schema)
        connection.execute(text("INSERT INTO audit (id, ts, tokens) VALUES ('old', 1.5, 6)"))

    older.write_now(begin)
    older.close()
    assert create(source, tmp_path / "one.backup", FOR_ME)["schema"] == schema
    url = new_url("postgresql")
    restore(tmp_path / "one.backup", FOR_ME, place(tmp_path / "new"), Wishes(database=url))
    found = rows_at(place(tmp_path / "new", url))
    assert found["alembic_version"] == [{"version_num": revisions()[-1]}]
    assert [(row["id"], row["tokens"], row["estimated"]) for row in found["audit"]] == [("old", 6, None)]


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **header: Any) -> Path:
    """The same backup with members changed, and whole in itself."""
    other = path.with_suffix(".changed")
    writer = Writer(other, FOR_ME, {"version": "9.9", "created": 0.0, "database": "sqlite", **header})
    archive.read(path, FOR_ME, lambda name, size, source: writer.add(name, change(name, source.read(size))))
    writer.finish()
    return other


def test_what_a_newer_corral_made_is_refused_with_both_versions(tmp_path: Path, made: Path) -> None:
    def newer(name: str, data: bytes) -> bytes:
        return data.replace(revisions()[-1].encode(), b"9999") if name == "database/summary.json" else data

    with pytest.raises(BackupError, match=f"9999.*{revisions()[-1]}"):
        restore(rewritten(made, newer), FOR_ME, place(tmp_path / "new"), Wishes())
    with pytest.raises(BackupError, match=r"format 7, made by Corral 9\.9.*up to 1"):
        verify(rewritten(made, lambda name, data: data, format=7), FOR_ME)
    assert not (tmp_path / "new/pepper").exists()


def test_every_flipped_byte_is_refused_before_anything_is_touched(tmp_path: Path, made: Path) -> None:
    whole = made.read_bytes()
    positions = {*range(0, len(whole), max(1, len(whole) // 90)), 0, 100, 511, 512, 540, 600, 700, len(whole) - 1}
    for position in sorted(positions):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        made.write_bytes(flipped)
        with pytest.raises(BackupError) as raised:
            restore(made, FOR_ME, place(tmp_path / "new"), Wishes())
        assert "\n" not in str(raised.value) and str(made) in str(raised.value), position
        assert not (tmp_path / "new").exists(), position
    assert len(positions) >= 90


def test_a_file_that_was_cut_or_added_to_is_refused(tmp_path: Path, made: Path) -> None:
    whole = made.read_bytes()
    for length in (0, 1, 511, 512, 900, len(whole) // 2, len(whole) - 1025, len(whole) - 1024, len(whole) - 1):
        made.write_bytes(whole[:length])
        with pytest.raises(BackupError):
            verify(made, FOR_ME)
    made.write_bytes(whole + b"\0")
    with pytest.raises(BackupError, match="length"):
        verify(made, FOR_ME)
    with pytest.raises(BackupError, match="cannot be read: No such file"):
        verify(tmp_path / "none.backup", FOR_ME)


def test_a_wrong_passphrase_or_identity_is_refused(tmp_path: Path, made: Path) -> None:
    create(place(tmp_path / "old", "sqlite:///corral.db"), tmp_path / "two.backup", PASSPHRASE)
    with pytest.raises(BackupError, match="the passphrase is wrong"):
        restore(tmp_path / "two.backup", Secrets(passphrase="correct horse"), place(tmp_path / "new"), Wishes())
    with pytest.raises(BackupError, match="give its passphrase"):
        verify(tmp_path / "two.backup", Secrets())
    with pytest.raises(BackupError, match="not encrypted for this"):
        verify(tmp_path / "two.backup", Secrets(identities=(IDENTITY,)))
    with pytest.raises(BackupError, match="give an --identity"):
        verify(made, PASSPHRASE)
    whole = (tmp_path / "two.backup").read_bytes()
    for position in (512 + 30, 512 + 110, 512 + 200, 512 + 330):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        (tmp_path / "two.backup").write_bytes(flipped)
        with pytest.raises(BackupError):
            verify(tmp_path / "two.backup", PASSPHRASE)
    assert not (tmp_path / "new").exists()


def test_members_that_do_not_belong_are_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(BackupError, match="is not what its name says"):
        writer = Writer(tmp_path / "blob.backup", FOR_ME, {"version": "1", "created": 0.0})
        writer.add("models/blobs/sha256-" + "0" * 64, b"not these bytes")
        writer.finish()
        verify(tmp_path / "blob.backup", FOR_ME)
    for name in ("../outside", "a/../b", "/absolute", "a//./b", "a/"):
        assert not archive.nameable(name)
    assert archive.nameable("models/manifests/registry.ollama.ai/library/llama3.2/3b")


# -- what is there already


@pytest.mark.parametrize("kind", KINDS)
def test_an_installation_is_replaced_only_if_told_so(tmp_path: Path, made: Path, new_url: NewUrl, kind: str) -> None:
    target = place(tmp_path / "new", new_url(kind))
    old_key = fill(target, rows=3, name="replaced")
    before, pepper = rows_at(target), (target.root / "pepper").read_bytes()
    with pytest.raises(BackupError, match=r"holds an installation.*pepper.*--replace"):
        restore(made, FOR_ME, target, Wishes())
    assert rows_at(target) == before
    done = restore(made, FOR_ME, target, Wishes(replace=True))
    assert rows_at(target) == rows_at(place(tmp_path / "old", "sqlite:///corral.db"))
    assert (Path(done["aside"]) / "pepper").read_bytes() == pepper
    assert not (target.root / "admin.key").exists()
    bootstrap(target.root, target.settings)
    assert old_key.encode() not in (target.root / "admin.key").read_bytes()
    if kind == "sqlite":
        assert rows_at(place(Path(done["aside"]), "sqlite:///corral.db")) == before


def test_what_runs_is_not_replaced(tmp_path: Path, made: Path, postgres: Postgres) -> None:
    held = replace.hold(tmp_path / "new", exclusive=False)
    with pytest.raises(ReplaceError, match="stop it first"):
        restore(made, FOR_ME, place(tmp_path / "new"), Wishes(replace=True))
    os.close(held)
    url = address(postgres.database())
    control = Running(tmp_path / "elsewhere", store={"database": url})
    try:
        with pytest.raises(BackupError, match="a control uses the database"):
            restore(made, FOR_ME, place(tmp_path / "new", url), Wishes(replace=True))
        assert control.admin.get("/admin/keys").status_code == 200
    finally:
        control.close()
    held = replace.hold(tmp_path / "new", exclusive=True)
    with pytest.raises(ReplaceError, match="under way"):
        replace.hold(tmp_path / "new", exclusive=False)
    os.close(held)


def test_secrets_outside_of_the_state_folder(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, token = tmp_path / "secrets/pepper", tmp_path / "secrets/token"
    secret.parent.mkdir()
    token.write_text("the token of the gateways here\n")
    target = place(tmp_path / "new")
    changed = {"pepper_file": secret, "internal_token_file": token}
    auth = target.settings.auth.model_copy(update=changed)
    target = type(target)(target.root, target.settings.model_copy(update={"auth": auth}), None)
    secret.write_text("f" * 64 + "\n")
    with pytest.raises(BackupError, match="is another than the backup's"):
        restore(made, FOR_ME, target, Wishes())
    with monkeypatch.context() as patched:
        may = os.access  # root may write anywhere
        patched.setattr(os, "access", lambda path, mode: path != secret.parent and may(path, mode))
        with pytest.raises(BackupError, match=r"corral backup extract .* secrets/pepper"):
            restore(made, FOR_ME, target, Wishes(replace=True))
    restore(made, FOR_ME, target, Wishes(replace=True))
    assert secret.read_bytes() == (tmp_path / "old/pepper").read_bytes() == extract(made, FOR_ME, "secrets/pepper")
    (kept,) = secret.parent.glob("pepper.replaced-*")
    assert kept.read_text() == "f" * 64 + "\n"
    assert "gateways here" in token.read_text()
    assert not (target.root / "pepper").exists()
    with pytest.raises(BackupError, match=r"no member 'pepper': there is .*secrets/pepper"):
        extract(made, FOR_ME, "pepper")
