"""Backups while it serves, what the gateways had not shipped yet, and the command."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select
from support.backup import FOR_ME, IDENTITY, cli, fill, place, rows_in
from support.control import Running, make_key
from support.postgres import Postgres
from support.process import Process, free_port
from support.sealed import Direct
from support.servers import answers, python_env

from corral.backup.create import backups, create
from corral.backup.place import Place
from corral.backup.restore import Wishes, restore
from corral.config.values import database_url as database_address
from corral.store.chain import ZERO, content, leaf_of, link_after
from corral.store.database import configured
from corral.store.spool import SpoolReader, encode_frame
from corral.store.tables import audit

# -- while it serves


def test_a_backup_of_a_control_that_serves_is_of_one_moment(tmp_path: Path, database_url: str) -> None:
    source = place(tmp_path / "old", database_url)
    control = Running(source.root, store={"database": source.settings.store.database})
    stop, made = threading.Event(), []

    def make_keys() -> None:
        while not stop.is_set():
            made.append(make_key(control)["id"])

    def ship() -> None:
        offset, path = 0, "/internal/spool/gateway-1/0000000000000001.seg"
        while not stop.is_set():
            frames = b"".join(encode_frame({"t": "admit", "id": f"r-{offset}-{n}", "ts": 1.0}) for n in range(50))
            answer = control.internal.post(path, params={"offset": offset}, content=frames)
            offset = answer.json()["offset"]

    threads = [threading.Thread(target=work) for work in (make_keys, make_keys, ship)]
    for thread in threads:
        thread.start()
    counts = []
    try:
        for number in range(5):
            path = tmp_path / f"{number}.backup"
            create(source, path, FOR_ME)
            found = rows_in(path)
            known = {row["id"] for row in found["keys"]}
            assert {row["key_id"] for row in found["key_verifiers"]} == known
            created = [row for row in found["audit"] if (row["route"], row["method"]) == ("/admin/keys", "POST")]
            assert {row["after"]["id"] for row in created} | {key for key in known if key not in made} >= known
            assert len(created) == len(known) - 1, "each key but the first has its row"
            (mark,) = found["spool_watermarks"] or [{"position": 0}]
            shipped = [row for row in found["audit"] if row["gw"] == "gateway-1"]
            size = len(encode_frame({"t": "admit", "id": "r-0-0", "ts": 1.0}))
            assert len(shipped) * size <= mark["position"] or not shipped
            assert bool(shipped) == bool(mark["position"])
            counts.append(len(found["audit"]))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        control.close()
    assert counts == sorted(counts) and counts[-1] > counts[0]


def test_records_that_were_not_shipped_are_in_it_once(tmp_path: Path) -> None:
    source = place(tmp_path / "old", "sqlite:///corral.db")
    fill(source)
    folder = source.root / "spool/gateway-1"
    folder.mkdir(parents=True)
    now = time.time()
    frames = [encode_frame({"t": "admit", "id": f"spooled-{number}", "ts": now}) for number in range(4)]
    (folder / "0000000000000007.seg").write_bytes(b"".join(frames) + frames[0][:9])
    (folder / "0000000000000003.torn").write_bytes(b"evidence")
    control = Running(source.root)
    try:
        ship(control, folder, 0, frames[0] + frames[1])
    finally:
        control.close()
    assert create(source, tmp_path / "one.backup", FOR_ME)["spool_segments"] == 2
    target = place(tmp_path / "new", "sqlite:///corral.db")
    restore(tmp_path / "one.backup", FOR_ME, target, Wishes())
    restored = target.root / "spool/gateway-1"
    assert (restored / "0000000000000007.seg").read_bytes() == b"".join(frames), "what was half written is left out"
    control, reader = Running(target.root), SpoolReader(restored)
    try:
        while (piece := reader.next_chunk()) is not None:
            reader.confirm(piece[0], ship(control, folder, piece[1], piece[2]))
        rows = control.admin.get("/admin/audit", params={"limit": 1000}).json()["audit"]
    finally:
        control.close()
    ids = [row["id"] for row in rows if "spooled" in row["id"]]
    assert sorted(ids) == [f"spooled-{number}" for number in range(4)]


def ship(control: Running, folder: Path, offset: int, data: bytes) -> int:
    """Give control frames of the one segment, as a gateway does; the offset that it confirms."""
    path = f"/internal/spool/{folder.name}/0000000000000007.seg"
    answer = control.internal.post(path, params={"offset": offset}, content=data)
    assert answer.status_code in (200, 409)
    return int(answer.json()["offset"])


# -- the command


def test_keep_and_list(tmp_path: Path) -> None:
    source = place(tmp_path / "old", "sqlite:///corral.db")
    fill(source)
    folder = backups(source.root)
    folder.mkdir()
    for number in range(3):
        (folder / f"corral-2020010{number}T000000Z.backup").touch()
        os.utime(folder / f"corral-2020010{number}T000000Z.backup", (number, number))
    (folder / "another file").touch()
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery\n")
    told = cli("create", "--keep", "2", "--json", "--state", source.root, "--passphrase-file", secret)
    assert told.returncode == 0, told.stderr
    made = json.loads(told.stdout)
    assert [Path(path).name for path in made["removed"]] == [f"corral-2020010{n}T000000Z.backup" for n in (0, 1)]
    listed = json.loads(cli("list", "--json", "--state", source.root).stdout)["backups"]
    assert [item["file"] for item in listed] == [str(folder / "corral-20200102T000000Z.backup"), made["file"]]
    assert (folder / "another file").exists()
    env = {"CORRAL_BACKUP_PASSPHRASE_FILE": str(secret)}
    assert "whole" in cli("verify", made["file"], env=env).stdout
    assert json.loads(cli("verify", "--state", source.root, "--json", env=env).stdout)["file"] == made["file"]
    taken = tmp_path / "taken"
    assert cli("extract", made["file"], "secrets/pepper", "--output", taken, env=env).returncode == 0
    assert taken.read_text() == (source.root / "pepper").read_text()
    assert cli("extract", made["file"], "secrets/pepper", env=env).stdout == taken.read_text()
    assert "no backup of" in cli("verify", "--state", tmp_path / "none", env=env).stderr
    assert cli("create", "--state", source.root, "--output", made["file"], env=env).returncode == 1


def test_wrong_usage_and_clear_refusals(tmp_path: Path) -> None:
    assert cli("create", "--state", tmp_path).returncode == 2
    short = tmp_path / "short"
    short.write_text("short\n")
    for arguments, said in (
        (("create", "--passphrase-file", short), "at least 8 characters"),
        (("create", "--recipient", "age1nonsense"), "expected an age recipient"),
        (("create", "--recipient", str(IDENTITY.to_public())), "holds no installation"),
        (("verify", short, "--identity", short), "AGE-SECRET-KEY-1"),
        (("verify", short), "is no backup"),
    ):
        done = cli(*arguments, *(("--state", tmp_path / "none")))
        assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (1, True, 1), done.stderr
    assert not (tmp_path / "none").exists()


def test_what_the_commands_do_is_in_the_audit_trail(tmp_path: Path, postgres: Postgres) -> None:
    identity = tmp_path / "identity"
    identity.write_text(f"{IDENTITY}\n")
    for name, url in (("lite", "sqlite:///corral.db"), ("pg", database_address(postgres.database()))):
        source = place(tmp_path / name, url)
        fill(source)
        (source.root / "corral.yaml").write_text(f"{{control: {{state: {source.root}}}, store: {{database: '{url}'}}}}")
        here = ("--config", source.root / "corral.yaml", "--state", source.root)
        backup = tmp_path / f"{name}.backup"
        made = cli("create", *here, "--recipient", str(IDENTITY.to_public()), "--output", backup)
        assert (made.returncode, "not in the audit trail" in made.stderr) == (0, False), made.stderr
        assert cli("drill", backup, *here, "--identity", identity, "--sqlite").returncode == 0
        assert [row["route"] for row in done_by(source)] == ["corral backup create", "corral backup drill"]
        restored = cli("restore", backup, *here, "--identity", identity, "--replace")
        assert restored.returncode == 0, restored.stderr
        (row,) = done_by(source)  # the others came after the backup was made
        assert (row["route"], row["after"]["file"], row["gw"]) == ("corral backup restore", str(backup), "control")
        assert "@" in row["after"]["by"] and "pepper" in row["after"]["replaced"]
        assert whole(source)


def done_by(made: Place) -> list[dict[str, Any]]:
    """What the trail of an installation says of backup commands."""
    database = configured(made.settings.store, made.root)
    try:
        chosen = select(audit).where(audit.c.route.startswith("corral backup ")).order_by(audit.c.seq)
        return database.read_now(lambda c: [dict(row) for row in c.execute(chosen).mappings()])
    finally:
        database.close()


def whole(made: Place) -> bool:
    """Whether the chain of its control fits together, up to its end."""
    database = configured(made.settings.store, made.root)
    try:
        source = Direct(database)
        rows, link = source.records("control", 0, 100), ZERO
        for row in rows:
            assert leaf_of(content(row)) == row["leaf"]
            link = link_after(link, row["leaf"])
        head = source.state().heads["control"]
        return (head.pos, head.link) == (len(rows), link)
    finally:
        database.close()


def test_where_a_container_has_its_settings(tmp_path: Path, postgres: Postgres) -> None:
    """As in control's container: settings by CORRAL_CONFIG, the database's address and the secrets in files."""
    secret, port = tmp_path / "passphrase", free_port()
    secret.write_text("correct horse battery\n")
    (tmp_path / "pepper").write_text("ab" * 32)
    (tmp_path / "url").write_text(postgres.database() + "\n")
    state = tmp_path / "state"
    (tmp_path / "corral.yaml").write_text(
        f"control: {{listen: '127.0.0.1:{port}', state: {state}}}\nauth: {{pepper_file: {tmp_path / 'pepper'}}}\n"
    )
    env = {
        "CORRAL_CONFIG": str(tmp_path / "corral.yaml"),
        "CORRAL_STORE__DATABASE_FILE": str(tmp_path / "url"),
        "CORRAL_BACKUP_PASSPHRASE_FILE": str(secret),
        "HOME": str(tmp_path),
    }
    argv = [sys.executable, "-P", "-m", "corral", "serve", "control"]
    control = Process(argv, tmp_path / "control.log", {**python_env(), **env})
    try:
        control.wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        made = cli("create", "--json", env=env)
        assert made.returncode == 0, made.stderr
        told = json.loads(made.stdout)
        assert Path(told["file"]).parent == state / "backups" and told["tables"]["keys"] == 1
        assert json.loads((state / "backup.json").read_text())["size"] == told["size"]
        refused = cli("restore", told["file"], "--replace", env=env)
        assert (refused.returncode, "stop it first" in refused.stderr) == (1, True), refused.stderr
    finally:
        control.end()
    done = cli("restore", told["file"], "--replace", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert "/test_" in json.loads(done.stdout)["database"]
    assert Path(told["file"]).exists() and not (state / "pepper").exists()
    assert json.loads(cli("verify", "--json", env=env).stdout)["tables"] == told["tables"]
