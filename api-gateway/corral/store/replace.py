"""Replaces what a state folder, and a database outside of it, hold: whole, or not at all.

What is new is made ready in ``.restore-ID`` within the folder (which may be a mount, so that it cannot be renamed
itself). Then one step decides: the rename of the marker ``.restore.json``, or, where a database outside is replaced
too, the commit of its transaction, which leaves the id in it. What remains is renames, which any later start ends:
`finish` is called by whatever uses a state folder, before it does. What was there goes to ``replaced-TIME-…``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select

from corral.store.database import Database, DatabaseAway, DatabaseError
from corral.store.disk import sync_folder

MARKER = ".restore.json"
STAGING = ".restore-"
CONTROL_LOCK = ".control.lock"
KEPT = ("run", "logs", "backups", "backup.json", "drill.json", CONTROL_LOCK, MARKER)
"""What belongs to the place, not to what is in it."""

_restored = Table("corral_restore", MetaData(), Column("id", String(32), primary_key=True))


class ReplaceError(Exception):
    """The state folder is in use, or what was interrupted in it cannot be ended now; says what to do."""


@dataclass
class Replacement:
    """One that is under way. ``outside``: files of the staging folder's ``outside/`` by where they go."""

    id: str
    aside: str
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    outside: dict[str, str] = field(default_factory=dict)
    database: str | None = None
    password_file: str | None = None


def hold(state: Path, exclusive: bool) -> int:
    """Take the lock that a control shares and a restore has alone; the descriptor to close.

    Raises:
        ReplaceError: it is held the other way.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(state / CONTROL_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        if exclusive:
            raise ReplaceError(f"a control runs with the state folder {state}: stop it first") from None
        raise ReplaceError(f"a restore into {state} is under way: wait for its end") from None
    return descriptor


def begin(state: Path) -> tuple[Replacement, Path]:
    """A new replacement and its staging folder; the caller holds the lock."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = os.urandom(8).hex()
    replacement = Replacement(name, f"replaced-{stamp}-{name[:4]}")
    staging = state / f"{STAGING}{replacement.id}"
    staging.mkdir(mode=0o700)
    return replacement, staging


def commit(state: Path, replacement: Replacement, transaction: Callable[[], None] | None) -> Path | None:
    """Decide, and do it. `transaction` commits the database outside, with `leave_id` in it.

    Where what was there now lies, or None if there was nothing.
    """
    staging = state / f"{STAGING}{replacement.id}"
    replacement.new = sorted(path.name for path in staging.iterdir() if path.name != "outside")
    _sync_tree(staging)
    _write(state, replacement)
    if transaction is not None:
        transaction()
    return _apply(state, replacement)


def leave_id(connection: Connection, replacement: Replacement) -> None:
    """Have the transaction say that it is this replacement's."""
    _restored.create(connection, checkfirst=True)
    connection.execute(_restored.delete())
    connection.execute(_restored.insert().values(id=replacement.id))


def finish(state: Path) -> str | None:
    """End what was interrupted: ``finished``, ``undone``, or None where nothing was.

    Raises:
        ReplaceError: a restore is under way, or the database that knows how it ended does not answer.
    """
    if not (state / MARKER).exists() and not any(state.glob(f"{STAGING}*")):
        return None
    try:
        lock = hold(state, exclusive=True)
    except ReplaceError:
        os.close(hold(state, exclusive=False))  # a control alone: then there is nothing to end
        return None
    try:
        return _finish(state)
    finally:
        os.close(lock)


def _finish(state: Path) -> str | None:
    done = None
    try:
        replacement = Replacement(**json.loads((state / MARKER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    else:
        if _decided(state, replacement):
            _apply(state, replacement)
            done = "finished"
        else:
            (state / MARKER).unlink()
            done = "undone"
    for draft in state.glob(f"{MARKER}.*"):
        draft.unlink()
    for left in state.glob(f"{STAGING}*"):
        shutil.rmtree(left)
        done = done or "undone"
    return done


def _decided(state: Path, replacement: Replacement) -> bool:
    if replacement.database is None:
        return True
    try:
        with _database(replacement) as database:
            return database.read_now(_has_id, replacement.id)
    except (DatabaseAway, DatabaseError) as error:
        raise ReplaceError(f"a restore into {state} was interrupted, and its end is not known: {error}") from None


def _has_id(connection: Connection, wanted: str) -> bool:
    if not inspect(connection).has_table(_restored.name):
        return False
    return connection.execute(select(_restored.c.id).where(_restored.c.id == wanted)).first() is not None


def _apply(state: Path, replacement: Replacement) -> Path | None:
    """Put what is new in its place. Can be called again after it was interrupted anywhere."""
    staging, aside = state / f"{STAGING}{replacement.id}", state / replacement.aside
    for name in sorted({*replacement.old, *replacement.new}):
        here, fresh = state / name, staging / name
        # Where the new one is still to come, what is here is the old one.
        if name in replacement.old and here.exists() and (name not in replacement.new or fresh.exists()):
            aside.mkdir(mode=0o700, exist_ok=True)
            if not (aside / name).exists():
                os.rename(here, aside / name)
        if fresh.exists():
            os.rename(fresh, here)
    for name, place in replacement.outside.items():
        if (staging / "outside" / name).exists():
            _put_outside(staging / "outside" / name, Path(place), replacement)
    sync_folder(state)
    if replacement.database is not None:
        with _database(replacement) as database:
            database.write_now(lambda connection: _restored.drop(connection, checkfirst=True))
    shutil.rmtree(staging, ignore_errors=True)
    (state / MARKER).unlink(missing_ok=True)
    sync_folder(state)
    return aside if aside.exists() else None


def _put_outside(fresh: Path, place: Path, replacement: Replacement) -> None:
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = place.with_name(f"{place.name}.{replacement.aside}")
    if place.exists() and not kept.exists():
        shutil.copy2(place, kept)
    draft = place.with_name(f".{place.name}.{replacement.id}")
    draft.touch(0o600)
    draft.write_bytes(fresh.read_bytes())
    os.replace(draft, place)
    fresh.unlink()


@contextlib.contextmanager
def _database(replacement: Replacement) -> Iterator[Database]:
    assert replacement.database is not None
    password = replacement.password_file
    database = Database(replacement.database, Path(password) if password is not None else None)
    try:
        # As a migration would, this says what is wrong with it in one line.
        database.check()
        yield database
    finally:
        database.close()


def _write(state: Path, replacement: Replacement) -> None:
    draft = state / f"{MARKER}.{replacement.id}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(replacement), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, state / MARKER)
    sync_folder(state)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(path))
