"""What is left when a backup or a restore is killed, or the disk is full: the old or the new, never a mix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.backup import FOR_ME, IDENTITY, cli, fill, place, rows_at
from support.postgres import Postgres, name_of
from support.servers import python_env

from corral.backup.create import create
from corral.backup.restore import Wishes, restore, verify
from corral.config.values import database_url as address
from corral.store.replace import MARKER, STAGING, ReplaceError, finish

# For each number that it reads, runs a restore that is killed before the step of that number which changes what others
# see, and says how it ended. Each is a process of its own, forked from one that has restored it elsewhere: all is
# imported by then.
KILLED = """
import os, signal, sys, traceback
from pathlib import Path
from sqlalchemy.engine import RootTransaction
import shutil
from corral.backup.place import find, read_secrets
import psycopg
from corral.backup.restore import Wishes, restore
left = 10**9

def counted(function):
    def step(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return step

os.rename, os.replace, shutil.rmtree = counted(os.rename), counted(os.replace), counted(shutil.rmtree)
os.mkdir, Path.unlink = counted(os.mkdir), counted(Path.unlink)
RootTransaction.commit = counted(RootTransaction.commit)
file, state, url, identity, elsewhere = sys.argv[1:]
wishes = Wishes(database="sqlite:///corral.db", replace=True)
restore(Path(file), read_secrets(None, (), (identity,)), find(None, elsewhere, {}), wishes)
for line in sys.stdin:
    left = int(line)
    if not (child := os.fork()):
        signal.alarm(60)
        try:
            secrets = read_secrets(None, (), (identity,))
            restore(Path(file), secrets, find(None, state, {}), Wishes(database=url, replace=True))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Runs restores of a file, each killed before one of its steps."""

    def __init__(self, folder: Path, file: Path, state: Path, url: str) -> None:
        argv = [sys.executable, "-c", KILLED, file, state, url, identity_file(folder), folder / "elsewhere"]
        self._log = folder / "killer.log"
        with self._log.open("wb") as said:
            self._process = subprocess.Popen(
                [*map(str, argv)],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said},
                text=True,
                env=python_env(),
            )

    def killed_at(self, step: int) -> bool:
        """Whether it was killed: the last one has no such step, and ends."""
        with suppress(BrokenPipeError):  # what it said stands in its log
            print(step, file=self._process.stdin, flush=True)
        assert self._process.stdout is not None
        status = self._process.stdout.readline().strip()
        assert status in (str(-signal.SIGKILL), "0"), self._log.read_text()
        return status != "0"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def identity_file(folder: Path) -> Path:
    path = folder / "identity"
    path.write_text(f"# made by a test\n{IDENTITY}\n")
    return path


@pytest.mark.slow
def test_a_restore_that_is_killed_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, database_url: str, request: pytest.FixtureRequest
) -> None:
    """Killed before each of its steps in turn; whatever starts next ends it, one way or the other."""
    new = place(tmp_path / "source", "sqlite:///corral.db")
    fill(new, rows=3, name="new")
    create(new, tmp_path / "new.backup", FOR_ME)
    target = place(tmp_path / "state", database_url)
    fill(target, rows=5, name="old")
    create(target, tmp_path / "old.backup", FOR_ME)
    states = {
        "old": ((target.root / "pepper").read_bytes(), rows_at(target)),
        "new": ((new.root / "pepper").read_bytes(), rows_at(new)),
    }
    killer = Killer(tmp_path, tmp_path / "new.backup", target.root, database_url)
    request.addfinalizer(killer.end)
    ends, step = [], 0
    while killer.killed_at(step):
        finish(target.root)
        found = ((target.root / "pepper").read_bytes(), rows_at(target))
        (which,) = [name for name, state in states.items() if state == found]
        ends.append(which)
        left = [path.name for path in target.root.iterdir() if path.name.startswith((MARKER, STAGING))]
        assert left == [], step
        if which == "new":
            restore(tmp_path / "old.backup", FOR_ME, target, Wishes(database=database_url, replace=True))
        step += 1
    assert set(ends) == {"old", "new"} and ends == sorted(ends, reverse=True), ends
    assert step > 8


def test_a_restore_whose_end_only_the_database_knows_waits_for_it(tmp_path: Path, postgres: Postgres) -> None:
    target = place(tmp_path / "state", address(postgres.database()))
    fill(target)
    create(target, tmp_path / "one.backup", FOR_ME)
    (target.root / MARKER).write_text(
        '{"id": "0", "aside": "replaced-x", "database": "postgresql+psycopg://u@127.0.0.1:1/x"}'
    )
    with pytest.raises(ReplaceError, match="its end is not known"):
        finish(target.root)
    argv = [sys.executable, "-P", "-m", "corral", "serve", "control", "--state", str(target.root)]
    done = subprocess.run(argv, capture_output=True, text=True, env=python_env(), cwd=tmp_path, timeout=240)
    assert (done.returncode, "its end is not known" in done.stderr) == (1, True), done.stderr


@pytest.mark.slow
def test_a_backup_that_is_killed_leaves_no_half_file(tmp_path: Path) -> None:
    source = place(tmp_path / "state", "sqlite:///corral.db")
    fill(source, rows=3000)
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery\n")
    folder = tmp_path / "backups"
    folder.mkdir()
    argv = [sys.executable, "-P", "-m", "corral", "backup", "create", "--state", source.root]
    argv += ["--recipient", IDENTITY.to_public(), "--output", folder]
    killed = 0
    for number in range(12):
        known = set(folder.glob(".*"))
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([*map(str, argv)], stderr=quiet, stdout=quiet, env=python_env())
        deadline = time.monotonic() + 60
        while not set(folder.glob(".*")) - known and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(number * 0.003)  # at another place each time
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        for path in folder.glob("*.backup"):
            verify(path, FOR_ME)
            path.unlink()
    assert killed > 3, "most were killed in the middle"
    assert cli(*argv[5:]).returncode == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [], "what they left is swept"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system of its own")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    source = place(tmp_path / "state", "sqlite:///corral.db")
    fill(source, rows=20000)
    create(source, tmp_path / "one.backup", FOR_ME)
    small = tmp_path / "small"
    small.mkdir()
    identity = identity_file(tmp_path)
    program, me = f"{sys.executable} -P -m corral backup", IDENTITY.to_public()
    script = f"""
        mount -t tmpfs -o size=200k small {small} || exit 99
        {program} create --state {source.root} --recipient {me} --output {small}/b.backup
        echo "status $?"
        {program} restore {tmp_path}/one.backup --identity {identity} --state {small}/state; echo "status $?"
        find {small} -mindepth 1 -type f
    """
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, env=os.environ | python_env()
    )
    if done.returncode == 99:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.split("\n")[:2] == ["status 1", "status 1"], done.stdout + done.stderr
    assert f"{small}/b.backup: cannot be written: No space left on device" in done.stderr
    assert set(done.stdout.split("\n")[2:]) <= {f"{small}/state/.control.lock", ""}, done.stdout
    refused = [line for line in done.stderr.splitlines() if line.startswith("corral:")]
    assert (len(refused) == 2 and "full" in refused[1].lower()) or "space" in refused[1].lower(), refused


def test_the_database_of_postgresql_is_whole_or_as_it_was(tmp_path: Path, postgres: Postgres) -> None:
    """A restore that fails in the middle of the rows leaves the rows that were there."""
    url = address(postgres.database())
    target = place(tmp_path / "state", url)
    fill(target, rows=5)
    before = rows_at(target)
    source = place(tmp_path / "source", "sqlite:///corral.db")
    fill(source)
    create(source, tmp_path / "one.backup", FOR_ME)
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF EXISTS (SELECT FROM pg_tables WHERE tablename = 'corral_restore') "
        "THEN RAISE 'no more of it'; END IF; END $$;"
        "CREATE EVENT TRIGGER refuse ON ddl_command_end EXECUTE FUNCTION refuse()",
        name_of(url),
    )
    with pytest.raises(Exception, match="no more of it"):
        restore(tmp_path / "one.backup", FOR_ME, target, Wishes(replace=True))
    assert rows_at(target) == before
    assert not [path for path in target.root.iterdir() if path.name.startswith((STAGING, MARKER))]
