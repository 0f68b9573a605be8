"""Checks a backup, and puts what is in it in place: whole, or not at all."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from corral.backup import archive, models, trail
from corral.backup.archive import CHUNK, SMALL, BackupError, Contents, Secrets
from corral.backup.place import Place, open_database, sqlite_file
from corral.config.settings import Settings
from corral.stack.state import Lock, StateFolder
from corral.store import replace
from corral.store.database import Database, DatabaseError, resolve, revisions
from corral.store.dump import Loader, present
from corral.store.replace import KEPT, Replacement

SQLITE = "sqlite:///corral.db"
RESTORED = "restored"
PEPPER = "pepper"
SIGNING = "audit.key"

Say = Callable[[str], None]


def verify(path: Path, secrets: Secrets, say: Say = lambda text: None) -> dict[str, Any]:
    """Decrypt and check all of a backup, and write nothing; what the command prints. Raises BackupError."""
    return _described(path, checked(path, secrets, say))


def extract(path: Path, secrets: Secrets, name: str) -> bytes:
    """One small member of a backup, once all of it is checked.

    Raises:
        BackupError: it cannot be read, or has no such member.
    """
    found: list[bytes] = []

    def take(member: str, size: int, source: BinaryIO) -> None:
        if member == name:
            if size > SMALL:
                raise BackupError(f"{name} has {size} bytes: take it out with tar and age")
            found.append(source.read(size))

    members = archive.read(path, secrets, take).members
    if not found:
        near = ", ".join(difflib.get_close_matches(name, members, 3, 0.4)) or "secrets/pepper"
        raise BackupError(f"{path}: has no member {name!r}: there is {near}")
    return found[0]


@dataclass(frozen=True)
class Wishes:
    """What the command line says of a restore. ``database`` None: what the backup's settings say.

    ``entered``: it is an action of an operator, which the restored audit trail gets a record of.
    """

    database: str | None = None
    replace: bool = False
    models: Path | None = None
    entered: bool = False


def restore(
    path: Path,
    secrets: Secrets,
    place: Place,
    wishes: Wishes,
    say: Say = lambda text: None,
    contents: Contents | None = None,
) -> dict[str, Any]:
    """Check a backup and restore it into an installation that is stopped; what the command prints.

    `contents` is what `checked` said of it, where it was checked already.

    Raises:
        BackupError, DatabaseError, ReplaceError: it cannot be; nothing was changed.
    """
    contents = contents or checked(path, secrets, say)
    summary = contents.small_json("database/summary.json")
    if (schema := summary["schema"]) not in revisions():
        raise BackupError(
            f"{path}: has schema version {schema}; this Corral knows versions up to {revisions()[-1]}: "
            "restore with the newer Corral"
        )
    root = place.root
    lock = Lock(_with_run(root))
    held = -1
    try:
        if not lock.acquire():
            raise BackupError(f"a stack runs with the state folder {root}: stop it first (corral down)")
        replace.finish(root)
        held = replace.hold(root, exclusive=True)
        moved = wishes.models is None and any(name.startswith(models.BLOBS) for name in contents.members)
        old = _old(place, moved)
        if old and not wishes.replace:
            raise BackupError(f"{root} holds an installation ({', '.join(old)}): choose an empty folder, or --replace")
        return _Restore(path, secrets, place, wishes, contents, summary, say).run(old)
    finally:
        if held >= 0:
            os.close(held)
        if lock.fd >= 0:
            lock.remove()


class _Restore:
    """One restore, under the locks of its state folder."""

    def __init__(
        self,
        path: Path,
        secrets: Secrets,
        place: Place,
        wishes: Wishes,
        contents: Contents,
        summary: dict[str, Any],
        say: Say,
    ) -> None:
        self._path, self._secrets, self._place, self._wishes = path, secrets, place, wishes
        self._contents, self._summary, self._say = contents, summary, say
        saved = yaml.safe_load(contents.small["config/settings.yaml"])
        self._saved = Settings.model_validate(saved)

    def run(self, old: list[str]) -> dict[str, Any]:
        root = self._place.root
        replacement, staging = replace.begin(root)
        replacement.old = old
        try:
            url, password = self._database()
            outside = sqlite_file(url, root)
            if outside is not None and outside.parent == root:
                # It goes where it belongs with the folder's other files.
                database = open_database(f"sqlite:///{staging / outside.name}", root, None)
                self._fill(database, replacement, staging, None)
                aside = replace.commit(root, replacement, None)
            else:
                database = open_database(url, root, password)
                replacement.database = resolve(url, root)
                replacement.password_file = str(root / password) if password is not None else None
                aside = self._fill(database, replacement, staging, root)
        except BaseException as error:
            # Where the marker was written, the next start knows how it ended.
            if not (root / replace.MARKER).exists():
                shutil.rmtree(staging, ignore_errors=True)
            if self._wishes.models is not None:
                models.Target(self._wishes.models).abandon()
            raise self._explain(error) from None
        given = root / RESTORED / "corral.yaml"
        return {
            **_described(self._path, self._contents),
            "state": str(root),
            "database": database.shown.partition("?")[0] if replacement.database else f"sqlite:///{outside}",
            "config": str(given) if given.exists() else None,
            "aside": str(aside) if aside is not None else None,
        }

    def _database(self) -> tuple[str, Path | None]:
        """The database to restore into, and the file of its password."""
        given, saved = self._place.settings.store, self._saved.store
        if self._wishes.database is not None:
            return self._wishes.database, given.database_password_file
        if "database" in given.model_fields_set:
            return given.database, given.database_password_file
        if saved.database.startswith("sqlite:"):
            return SQLITE, None
        return saved.database, given.database_password_file or saved.database_password_file

    def _fill(self, database: Database, replacement: Replacement, staging: Path, root: Path | None) -> Path | None:
        """Load the database and the staging folder; with `root`, decide by the database's own commit."""
        aside: Path | None = None
        try:
            database.check()
            connection = database.engine.connect().execution_options(corral_write=True)
            with connection, connection.begin() as transaction:
                if root is not None:
                    self._check_target(connection, database)
                self._extract(connection, replacement, staging)
                if self._wishes.entered:
                    told = {"file": str(self._path), "created": self._contents.header["created"]}
                    trail.note(connection, "restore", {**told, "replaced": replacement.old})
                if root is not None:
                    replace.leave_id(connection, replacement)
                    aside = replace.commit(root, replacement, transaction.commit)
        finally:
            database.close()
        return aside

    def _check_target(self, connection: Connection, database: Database) -> None:
        found = [name for name in present(connection) if name != "corral_restore"]
        if found and not self._wishes.replace:
            raise BackupError(
                f"the database {database.shown.partition('?')[0]} is not empty ({', '.join(found[:3])}, …): "
                "choose an empty one, or --replace"
            )
        if connection.dialect.name == "postgresql":
            users = connection.execute(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name = 'corral'"
                )
            ).scalar()
            if users:
                raise BackupError("a control uses the database: stop it first")

    def _extract(self, connection: Connection, replacement: Replacement, staging: Path) -> None:
        loader = Loader(connection)
        loader.begin(self._summary["schema"])
        target = models.Target(self._wishes.models or staging / "models")
        progress = models.Progress("restore", sum(size for size, _ in self._contents.members.values()), self._say)

        def take(name: str, size: int, source: BinaryIO) -> None:
            kind, _, rest = name.partition("/")
            progress.add(size)
            if kind == "database" and rest.endswith(".jsonl.gz"):
                loader.take(rest.rpartition("-")[0], source.read(SMALL))
            elif kind == "spool":
                _write(staging / "spool" / rest, source)
            elif kind == "config":
                _write(staging / RESTORED / rest, source)
            elif kind == "secrets":
                self._secret(rest, source.read(CHUNK), replacement, staging)
            elif name.startswith(models.MANIFESTS):
                target.manifest(name.removeprefix(models.MANIFESTS + "/"), source.read(CHUNK))
            elif name.startswith(models.BLOBS):
                _write(target.blob_path(name.rpartition("/")[2]), source)
            elif name == "models/nodes.json":
                _write(staging / RESTORED / "nodes.json", source)

        again = archive.read(self._path, self._secrets, take)
        if again.members != self._contents.members:
            raise BackupError(f"{self._path}: has changed since it was checked")
        loader.end(self._summary)
        target.lay_out()

    def _secret(self, name: str, data: bytes, replacement: Replacement, staging: Path) -> None:
        """A secret within the state folder, or in a place outside of it that the settings name."""
        root = self._place.root
        made = root / (self._place.settings.audit.signing_key_file if name == SIGNING else name)
        place = self._place.secrets.get(name, made)
        if place.is_relative_to(root):
            _write_bytes(staging / place.relative_to(root), data)
            return
        known = place.read_bytes() if place.exists() else None
        if known is not None and (known.split() == data.split() or name != PEPPER):
            return  # another token serves as well: gateways have the one that is there
        if known is not None and not self._wishes.replace:
            raise BackupError(f"{place} is another than the backup's: put it aside, or --replace")
        if not os.access(place.parent, os.W_OK):
            raise BackupError(
                f"{place} has to be the backup's, and cannot be written from here: put there what "
                f"`corral backup extract {self._path} secrets/{name}` prints"
            )
        _write_bytes(staging / "outside" / name, data)
        replacement.outside[name] = str(place)

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, SQLAlchemyError):
            return DatabaseError(f"the database failed: {str(getattr(error, 'orig', None) or error).splitlines()[0]}")
        if isinstance(error, OSError):
            return BackupError(f"{self._place.root}: cannot be written: {error.strerror or error}")
        return error


def checked(path: Path, secrets: Secrets, say: Say) -> Contents:
    """Read and check all of a backup, and write nothing. Raises BackupError."""
    size = path.stat().st_size if path.is_file() else 0
    progress = models.Progress("check", size, say)
    contents = archive.read(path, secrets, progress=progress.add)
    for name in ("database/summary.json", "config/settings.yaml"):
        if name not in contents.small:
            raise BackupError(f"{path}: is damaged: it lacks {name}")
    if "secrets/pepper" not in contents.members:
        raise BackupError(f"{path}: is damaged: it lacks secrets/pepper")
    return contents


def _described(path: Path, contents: Contents) -> dict[str, Any]:
    summary = contents.small_json("database/summary.json")
    listed = contents.small_json("models/nodes.json")["nodes"] if "models/nodes.json" in contents.small else []
    blobs = [size for name, (size, _) in contents.members.items() if name.startswith(models.BLOBS)]
    return {
        "file": str(path),
        "created": contents.header["created"],
        "version": contents.header["version"],
        "schema": summary["schema"],
        "tables": summary["tables"],
        "spool_segments": sum(name.startswith("spool/") for name in contents.members),
        "members": len(contents.members),
        "nodes": listed,
        "blobs": len(blobs),
        "blob_bytes": sum(blobs),
    }


def _with_run(root: Path) -> StateFolder:
    folder = StateFolder(root)
    try:
        folder.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BackupError(f"{root}: cannot be written: {error.strerror}") from None
    return folder


def _old(place: Place, with_models: bool) -> list[str]:
    """What an installation in the folder consists of, and would be put aside."""
    kept = {*KEPT, *(() if with_models else ("models",))}
    if (password := place.settings.store.database_password_file) is not None:
        kept.add(password.parts[0])
    return sorted(
        path.name
        for path in place.root.iterdir()
        if path.name not in kept
        and not path.name.startswith((replace.STAGING, "replaced-"))
        and not (path.is_dir() and not any(one.is_file() for one in path.rglob("*")))
    )


def _write(path: Path, source: BinaryIO) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        shutil.copyfileobj(source, file, CHUNK)


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
