"""`corral backup drill`: a restore that leaves nothing proves a backup, or says what is wrong with it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update
from support.backup import FOR_ME, IDENTITY, cli, fill, place, rows_at
from support.control import Running
from support.postgres import Postgres, name_of
from support.process import Process, until
from support.servers import python_env

from corral.backup import archive, proof, restore
from corral.backup.archive import BackupError, Writer
from corral.backup.create import create
from corral.backup.drill import DRILL_LOCK, RECORD, drill
from corral.backup.place import Place
from corral.config.values import database_url as address
from corral.control.pages import DRILL, last_success
from corral.store import keys as keytext
from corral.store.database import configured, revisions
from corral.store.dump import Loader
from corral.store.tables import audit, key_verifiers, keys


@pytest.fixture
def source(tmp_path: Path, database_url: str) -> Place:
    """An installation, on SQLite and on PostgreSQL."""
    return place(tmp_path / "state", database_url)


def backed_up(source: Place, **more: Any) -> tuple[Path, str]:
    """A backup of the installation, and a key that it knows."""
    key = fill(source)
    path = source.root / "backups/one.backup"
    create(source, path, FOR_ME, **more)
    return path, key


def change(source: Place, statement: Any) -> None:
    database = configured(source.settings.store, source.root)
    database.write_now(lambda connection: connection.execute(statement))
    database.close()


def scratch(request: pytest.FixtureRequest, source: Place) -> list[str]:
    """The databases beside the installation's own that a drill has made."""
    if not source.settings.store.database.startswith("postgresql"):
        return []
    server: Postgres = request.getfixturevalue("postgres")
    found = server.execute("SELECT datname FROM pg_database WHERE datname LIKE 'corral_drill_%'")
    return [str(row[0]) for row in found]


def locked(request: pytest.FixtureRequest, source: Place) -> bool:
    """Whether a session on the server of the database is a drill's."""
    if not source.settings.store.database.startswith("postgresql"):
        return False
    server: Postgres = request.getfixturevalue("postgres")
    key = DRILL_LOCK & 0xFFFFFFFF
    return bool(server.execute(f"SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = {key}"))


@pytest.fixture
def files(request: pytest.FixtureRequest, source: Place) -> Callable[[], list[str]]:
    """What lies in the state folder, and which databases a drill has made."""

    def look() -> list[str]:
        there = [str(path.relative_to(source.root)) for path in source.root.rglob("*")]
        # SQLite's own, which come and go with a reader.
        kept = [name for name in there if not name.endswith(("-wal", "-shm")) and name not in ("run", RECORD)]
        return sorted(kept) + scratch(request, source)

    return look


def test_a_backup_is_proved_and_nothing_is_left(source: Place, files: Callable[[], list[str]], tmp_path: Path) -> None:
    path, key = backed_up(source)
    before, there = rows_at(source), files()
    (tmp_path / "key").write_text(key + "\n")
    for key_file, expected in ((None, (source.root / "admin.key").read_text().strip()), (tmp_path / "key", key)):
        done = drill(path, FOR_ME, source, key_file)
        assert (done["key"], done["key_unchecked"]) == (keytext.parse(expected), None)
        assert done["database"] == source.settings.store.database.partition(":")[0].partition("+")[0]
        assert done["tables"] == {name: len(rows) for name, rows in before.items() if name in done["tables"]}
        assert done["tables"]["audit"] == 42 and done["schema"] == revisions()[-1]
        assert not any(text in json.dumps(done) for text in (key, expected))
        assert files() == there
    assert rows_at(source) == before
    record = json.loads((source.root / RECORD).read_text())
    assert record["last_success"] == pytest.approx(time.time(), abs=60)
    assert (record["file"], record["seconds"]) == (str(path), done["seconds"])
    assert 0 < done["seconds"] < 60


def test_the_kind_of_database_can_be_chosen(source: Place, files: Callable[[], list[str]]) -> None:
    path, _ = backed_up(source)
    there = files()
    assert drill(path, FOR_ME, source, sqlite=True)["database"] == "sqlite"
    assert files() == there


def test_while_the_installation_runs(source: Place, files: Callable[[], list[str]]) -> None:
    path, key = backed_up(source)
    control = Running(source.root, store={"database": source.settings.store.database})
    try:
        there = files()
        assert drill(path, FOR_ME, source)["key"] is not None
        assert files() == there
        with control.client(key) as client:
            assert client.get("/admin/status").status_code == 200
    finally:
        control.close()


# -- what is wrong is said, and nothing is left


def rewritten(path: Path, alter: Callable[[str, bytes], bytes]) -> Path:
    """The same backup with members altered, whole in itself: only a restore can tell."""
    other = path.with_suffix(f".{alter.__name__}")
    writer = Writer(other, FOR_ME, {"version": "9.9", "created": time.time(), "database": "sqlite"})
    archive.read(path, FOR_ME, lambda name, size, source: writer.add(name, alter(name, source.read(size))))
    writer.finish()
    return other


def one_row_more(name: str, data: bytes) -> bytes:
    if name != "database/summary.json":
        return data
    summary = json.loads(data)
    summary["tables"]["keys"] += 1
    return json.dumps(summary).encode()


def no_pepper(name: str, data: bytes) -> bytes:
    return b"not hex\n" if name == "secrets/pepper" else data


def test_what_is_damaged_fails_and_leaves_nothing(source: Place, files: Callable[[], list[str]]) -> None:
    path, _ = backed_up(source)
    fewer = rewritten(path, one_row_more)
    torn = rewritten(path, no_pepper)
    half = path.with_suffix(".half")
    half.write_bytes(path.read_bytes()[:-2000])
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    there = files()
    for file, reason in (
        (path, "is damaged"),
        (half, "is damaged"),
        (fewer, r"keys: 2 rows were entered where the backup says 3"),
        (torn, "restored, the pepper cannot be used"),
        (path.with_name("none.backup"), "cannot be read"),
    ):
        with pytest.raises(Exception, match=reason) as raised:
            drill(file, FOR_ME, source)
        assert "\n" not in str(raised.value)
        assert files() == there
    assert not (source.root / RECORD).exists()


def test_rows_that_are_lost_while_they_are_restored_are_missed(
    source: Place, files: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = backed_up(source)
    there = files()
    end = Loader.end

    def lossy(loader: Loader, summary: Any) -> None:
        end(loader, summary)
        loader._connection.execute(delete(audit).where(audit.c.id == "row-7"))

    monkeypatch.setattr(Loader, "end", lossy)
    with pytest.raises(BackupError, match="restored, audit has 41 rows where the backup says 42"):
        drill(path, FOR_ME, source)
    assert files() == there


def test_a_key_that_is_named_has_to_be_taken(source: Place, tmp_path: Path) -> None:
    path, key = backed_up(source)
    key_id = keytext.parse(key) or ""
    file = tmp_path / "key"

    def refused(reason: str, backup: Path = path) -> None:
        with pytest.raises(BackupError, match=reason) as raised:
            drill(backup, FOR_ME, source, file)
        assert file.read_text() not in str(raised.value)

    file.write_text(keytext.generate()[1])
    refused("the backup does not know it")
    file.write_text(keytext.secret_for(key_id))
    refused("knows it with another text")
    file.write_text(key[:-1])
    refused("is malformed")
    file.write_text(key)
    change(source, update(keys).where(keys.c.id == key_id).values(revoked=1.0))
    create(source, tmp_path / "revoked.backup", FOR_ME)
    refused("it was revoked", tmp_path / "revoked.backup")
    change(source, update(keys).where(keys.c.id == key_id).values(revoked=None, expires=time.time() + 60))
    change(source, update(key_verifiers).where(key_verifiers.c.key_id == key_id).values(expires=time.time() - 1))
    create(source, tmp_path / "rotated.backup", FOR_ME)
    refused("it had been rotated", tmp_path / "rotated.backup")
    with pytest.raises(BackupError, match=r"none: cannot be read"):
        drill(path, FOR_ME, source, tmp_path / "none")
    assert not (source.root / RECORD).exists()


def test_an_admin_s_key_that_the_backup_cannot_know_is_not_held_against_it(source: Place) -> None:
    path, _ = backed_up(source)
    admin = source.root / "admin.key"
    known = admin.read_text().strip()
    admin.write_text(keytext.generate()[1])
    assert "the backup does not know it" in drill(path, FOR_ME, source)["key_unchecked"]
    admin.write_text(keytext.secret_for(keytext.parse(known) or ""))
    assert "with another text" in drill(path, FOR_ME, source)["key_unchecked"], "it was rotated since"
    (source.root / "pepper").write_text("f" * 64 + "\n")
    with pytest.raises(BackupError, match="the pepper here is another than the backup's"):
        drill(path, FOR_ME, source)
    admin.unlink()
    assert "none is at hand" in drill(path, FOR_ME, source)["key_unchecked"]


def test_a_damaged_spool_is_found(tmp_path: Path) -> None:
    (tmp_path / "gateway-1").mkdir()
    (tmp_path / "gateway-1/0000000000000001.seg").write_bytes(b"\x05\0\0\0abc")
    with pytest.raises(BackupError, match="damaged record at byte 0"):
        proof.segments(tmp_path)


def test_a_disk_that_it_could_fill_is_left_alone(
    source: Place, files: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = backed_up(source)
    there = files()
    with monkeypatch.context() as patch:
        patch.setattr("corral.backup.drill.SPARE", 1 << 62)
        with pytest.raises(BackupError, match=r"MiB are free: name another disk with --folder"):
            drill(path, FOR_ME, source)
    assert files() == there
    drill(path, FOR_ME, source, folder=tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir()) == []


# -- PostgreSQL


def test_a_role_that_may_not_make_databases_is_told_what_to_do(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    postgres.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
    postgres.execute("GRANT ALL ON SCHEMA public TO plain", name_of(url))
    plain = address(f"postgresql://plain:plain@127.0.0.1:{postgres.port}/{name_of(url)}")
    try:
        source = place(tmp_path / "state", plain)
        path, _ = backed_up(source)
        with pytest.raises(BackupError, match=r"permission denied to create database.*--sqlite") as raised:
            drill(path, FOR_ME, source)
        assert "plain:plain" not in str(raised.value)
        assert drill(path, FOR_ME, source, sqlite=True)["database"] == "sqlite"
    finally:
        postgres.execute(f"DROP DATABASE {name_of(url)} WITH (FORCE)")
        postgres.execute("DROP ROLE plain")


# A drill that stops where its restore is done, until it is told to go on.
HELD = """
import sys, time
from pathlib import Path
from corral.backup import drill
reached = Path(sys.argv[1])
def held(*args):
    reached.touch()
    time.sleep(600)
drill.proof.rows = held
sys.argv = ["corral", *sys.argv[2:]]
from corral.cli.main import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_one_that_is_stopped_leaves_nothing_or_the_next_removes_it(
    request: pytest.FixtureRequest, source: Place, files: Callable[[], list[str]], tmp_path: Path, number: int
) -> None:
    path, _ = backed_up(source)
    identity = tmp_path / "identity"
    identity.write_text(f"{IDENTITY}\n")
    config = tmp_path / "corral.yaml"
    config.write_text(json.dumps({"store": {"database": source.settings.store.database}}))
    there = files()
    argv = ["backup", "drill", path, "--identity", identity, "--config", config, "--state", source.root]
    script = [sys.executable, "-P", "-c", HELD, tmp_path / "reached", *argv]
    running = Process([*map(str, script)], tmp_path / "drill.log", python_env())
    try:
        running.wait_until(lambda: (tmp_path / "reached").exists(), 240)
        assert len(files()) > len(there)
        if scratch(request, source):
            with pytest.raises(BackupError, match="another drill uses"):
                drill(path, FOR_ME, source)
        else:
            drill(path, FOR_ME, source)
        assert list((source.root / "run").glob("corral-drill-*")), "it is not swept while it runs"
    finally:
        running.end(number)
    if number != signal.SIGKILL:
        assert files() == there
    until(lambda: not locked(request, source), "the server has seen that it is gone")
    drill(path, FOR_ME, source)
    assert files() == there


# -- the command


def test_the_command(tmp_path: Path) -> None:
    source = place(tmp_path / "state")
    identity = tmp_path / "identity"
    identity.write_text(f"{IDENTITY}\n")
    arguments = ("--identity", identity, "--state", source.root)
    fill(source)
    none = cli("drill", *arguments)
    assert (none.returncode, "no backup" in none.stderr) == (1, True)
    create(source, None, FOR_ME)
    done = cli("drill", *arguments)
    assert done.returncode == 0, done.stderr
    for words in (": restores\n", "audit 42", "into sqlite, in ", " is taken"):
        assert words in done.stdout
    admin = (source.root / "admin.key").read_text().strip()
    assert admin not in done.stdout + done.stderr
    told = json.loads(cli("drill", source.root / "backups", *arguments, "--json").stdout)
    assert (told["database"], told["key"]) == ("sqlite", keytext.parse(admin))
    (backup,) = (source.root / "backups").glob("*.backup")
    backup.write_bytes(backup.read_bytes()[:-1])
    failed = cli("drill", backup, *arguments)
    assert (failed.returncode, "is damaged" in failed.stderr, failed.stdout) == (1, True, "")
    empty = cli("drill", tmp_path, *arguments)
    assert (empty.returncode, "has no backup in it" in empty.stderr) == (1, True)


def test_where_there_is_no_installation_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place(tmp_path / "state")
    path, _ = backed_up(source)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    done = drill(path, FOR_ME, place(tmp_path / "elsewhere"))
    assert done["database"] == "sqlite" and done["key"] is None
    assert not (tmp_path / "elsewhere").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_control_tells_when_a_backup_was_last_proved(tmp_path: Path) -> None:
    source = place(tmp_path / "state", "sqlite:///corral.db")
    path, _ = backed_up(source)
    drill(path, FOR_ME, source)
    assert last_success(source.root / DRILL) == json.loads((source.root / RECORD).read_text())["last_success"]
    restore.restore(path, FOR_ME, place(tmp_path / "state"), restore.Wishes(replace=True))
    assert (source.root / RECORD).exists(), "it is of the place, not of what is restored into it"
