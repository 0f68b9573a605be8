"""Proves a backup: restores it beside the installation that runs, asks what came back, and leaves nothing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from corral.backup import proof
from corral.backup.archive import BackupError, Contents, Secrets
from corral.backup.create import last, listing
from corral.backup.place import Place, open_database
from corral.backup.proof import KeyAtHand
from corral.backup.restore import SQLITE, Wishes, checked, restore
from corral.config.settings import Settings
from corral.stack.state import write_private
from corral.store import keys as keytext
from corral.store.database import Database, DatabaseError, reason, resolve

RECORD = "drill.json"
FOLDER = "corral-drill-"
SCRATCH = "corral_drill_"
# The advisory lock that a drill holds in the installation's own database: whose scratch databases are whose is known.
DRILL_LOCK = 0x6472696C6C
# Rows take so many times the room of their compressed form, in a database with its journal and indexes.
EXPANSION = 16
SPARE = 64 << 20

Say = Callable[[str], None]


def drill(
    path: Path,
    secrets: Secrets,
    place: Place,
    key_file: Path | None = None,
    sqlite: bool = False,
    folder: Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Restore a backup into a temporary installation, check that, and remove it; what the command prints.

    The database is of the kind that `place` has: for PostgreSQL a scratch database on the same server, unless
    `sqlite`. A key whose text is at hand (`key_file`, else the admin's key of `place`) has to be one that the restored
    installation takes. ``seconds`` is how long the restore took, from the first byte read to the last check.

    Raises:
        BackupError, DatabaseError: the backup does not restore, or not to what it says; nothing is left.
    """
    began = time.monotonic()
    here = place.secrets["pepper"].exists()
    contents = checked(path, secrets, say)
    with contextlib.ExitStack() as exits:
        root = exits.enter_context(_folder(folder or (place.root / "run" if here else Path(tempfile.gettempdir()))))
        _room(contents, root)
        url, password = SQLITE, None
        if here and not sqlite and make_url(place.settings.store.database).get_backend_name() != "sqlite":
            url, password = exits.enter_context(_scratch(place))
        store = {"database": url, "database_password_file": password}
        other = Place(root, Settings.model_validate({"control": {"state": root}, "store": store}), None)
        done = restore(path, secrets, other, Wishes(database=url), say, contents)
        say("checking what came back")
        database = open_database(url, root, password)
        try:
            database.check()
            database.read_now(proof.rows, done)
            key = KeyAtHand(_known(place, key_file), key_file is not None, _pepper(place.secrets["pepper"]))
            found = database.read_now(proof.key, key, root / "pepper", done["created"])
        except SQLAlchemyError as error:
            raise DatabaseError(f"the restored database failed: {error}") from None
        finally:
            database.close()
        proof.segments(root / "spool")
    seconds = round(time.monotonic() - began, 3)
    if here:
        record = {"last_success": time.time(), "file": str(path), "seconds": seconds}
        write_private(place.root / RECORD, json.dumps(record))
    told = {name: value for name, value in done.items() if name not in ("state", "database", "config", "aside")}
    return {**told, **found, "database": database.dialect, "seconds": seconds}


def newest(given: Path | None, root: Path) -> Path:
    """The backup to take: `given`, the newest of a folder that is given, or the last that was made of `root`.

    Raises:
        BackupError: there is none.
    """
    if given is None:
        return last(root)
    if not given.is_dir():
        return given
    if not (found := listing(given)):
        raise BackupError(f"{given}: has no backup in it")
    return Path(found[-1]["file"])


@contextlib.contextmanager
def _folder(within: Path) -> Iterator[Path]:
    """A private folder, gone afterwards. What a killed drill left is removed first: each holds a lock on its own."""
    try:
        within.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(within, wait=True):  # nobody sweeps between a folder's making and its lock
            for left in within.glob(f"{FOLDER}*"):
                with contextlib.suppress(OSError), _locked(left, wait=False):
                    shutil.rmtree(left)
            made = Path(tempfile.mkdtemp(dir=within, prefix=FOLDER))
            held = contextlib.ExitStack()
            held.enter_context(_locked(made, wait=False))
    except OSError as error:
        raise BackupError(f"{within}: no folder for the drill can be made there: {error.strerror}") from None
    with held:
        try:
            yield made
        finally:
            shutil.rmtree(made)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _room(contents: Contents, root: Path) -> None:
    """Refuse what could fill the disk that the running installation writes to."""
    rows = sum(size for name, (size, _) in contents.members.items() if name.startswith("database/"))
    need = sum(size for size, _ in contents.members.values()) + EXPANSION * rows + SPARE
    free = shutil.disk_usage(root).free
    if free < need:
        raise BackupError(
            f"{root.parent}: a drill may take {need >> 20} MiB there, and {free >> 20} MiB are free: name another "
            "disk with --folder"
        )


@contextlib.contextmanager
def _scratch(place: Place) -> Iterator[tuple[str, Path | None]]:
    """An empty database on the server of the installation's own, dropped afterwards: its address, and its password."""
    store = place.settings.store
    password = place.root / store.database_password_file if store.database_password_file is not None else None
    own = open_database(store.database, place.root, password)
    try:
        own.check()
        with own.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": DRILL_LOCK}).scalar():
                raise BackupError(f"another drill uses {_address(own)}: wait for its end")
            mine = str(connection.execute(text("SELECT current_database()")).scalar_one())
            prefix = f"{SCRATCH}{hashlib.sha256(mine.encode()).hexdigest()[:8]}_"
            there = text("SELECT datname FROM pg_database WHERE starts_with(datname, :prefix)")
            for left in connection.execute(there, {"prefix": prefix}).scalars().all():
                _drop(connection, left)
            name = f"{prefix}{os.urandom(4).hex()}"
            try:
                connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
            except SQLAlchemyError as error:
                raise BackupError(
                    f"{_address(own)}: no scratch database can be made there: {reason(error)}; ALTER ROLE … CREATEDB, "
                    "or drill with --sqlite"
                ) from None
            try:
                address = make_url(resolve(store.database, place.root)).set(database=name)
                yield address.render_as_string(hide_password=False), password
            finally:
                _drop(connection, name)
    except SQLAlchemyError as error:
        raise DatabaseError(f"{_address(own)} failed: {getattr(error, 'orig', None) or error!s}") from None
    finally:
        own.close()


def _drop(connection: Connection, name: str) -> None:
    connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def _address(database: Database) -> str:
    return f"the database {database.shown.partition('?')[0]}"


def _known(place: Place, key_file: Path | None) -> str | None:
    """The text of a key that the backup may know; None where none is at hand."""
    path = key_file or place.root / "admin.key"
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if key_file is None:
            return None
        raise BackupError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _pepper(path: Path) -> bytes | None:
    try:
        return keytext.read_pepper(path)
    except (keytext.PepperError, OSError):
        return None
