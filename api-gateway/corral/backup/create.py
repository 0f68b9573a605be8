"""Makes a backup, while the stack serves or while it stands still."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from corral import __version__
from corral.backup import models
from corral.backup.archive import BackupError, Secrets, Writer
from corral.backup.place import Place, open_database, sqlite_file
from corral.stack.state import read_json, write_private
from corral.store import spool
from corral.store.database import Database
from corral.store.dump import dump
from corral.store.replace import finish
from corral.store.tables import nodes

RECORD = "backup.json"
PATTERN = "corral-*.backup"

Say = Callable[[str], None]


def create(
    place: Place,
    output: Path | None,
    secrets: Secrets,
    with_models: bool = False,
    models_folder: Path | None = None,
    keep: int | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Write a backup to `output` (a folder: under a name with the time); what the command prints.

    Raises:
        BackupError, DatabaseError, ReplaceError: it cannot be made; no file is left.
    """
    root, settings = place.root, place.settings
    finish(root)
    held = {name: _secret(path, root) for name, path in place.secrets.items()}
    target = _target(output, root)
    file = sqlite_file(settings.store.database, root)
    if file is not None and not file.exists():
        raise BackupError(f"there is no database {file}: nothing to back up")
    base = models_folder or root / "models"
    found = models.scan(base, say)
    if with_models and not found.manifests:
        raise BackupError(f"there are no models in {base}: name their folder with --models, or leave out --with-models")
    database = open_database(settings.store.database, root, settings.store.database_password_file)
    try:
        database.check()
        writer = Writer(target, secrets, _header(database))
        try:
            # First: what is shipped to control and deleted meanwhile is then in the database that is read next.
            segments = _spool(writer, settings.gateway.spool, root)
            say("database")
            summary, known = database.read_now(_database, writer)
            _configuration(writer, place)
            for name, data in held.items():
                writer.add(f"secrets/{name}", data)
            say("models")
            fleet = {node.name: node.url for node in settings.nodes} | known
            listed = models.inventory(fleet.items())
            catalogue = [model.model_dump(mode="json") for model in settings.models]
            writer.add("models/nodes.json", _json({"nodes": listed, "catalogue": catalogue}))
            blobs = models.write(writer, found, with_models, say)
            say("writing it to the disk")
            size = writer.finish()
        except BaseException:
            writer.abandon()
            raise
    except SQLAlchemyError as error:
        raise BackupError(f"the database {database.shown} failed: {error}") from None
    finally:
        database.close()
    write_private(root / RECORD, json.dumps({"last_success": time.time(), "file": str(target), "size": size}))
    removed = _prune(target, keep) if keep is not None else []
    return {
        "file": str(target),
        "size": size,
        "schema": summary["schema"],
        "tables": summary["tables"],
        "spool_segments": segments,
        "models": found.names(),
        "blob_bytes": blobs,
        "removed": removed,
    }


def listing(folder: Path) -> list[dict[str, Any]]:
    """The backups of a folder, oldest first: file, size and time."""
    found = []
    for path in folder.glob(PATTERN) if folder.is_dir() else ():
        stat = path.stat()
        found.append({"file": str(path), "size": stat.st_size, "created": stat.st_mtime})
    return sorted(found, key=lambda item: (item["created"], item["file"]))


def last(root: Path) -> Path:
    """The last backup that was made of an installation. Raises BackupError where there is none."""
    if not (made := (read_json(root / RECORD) or {}).get("file")):
        raise BackupError(f"no backup of {root} was made yet: corral backup create, or name a FILE")
    return Path(made)


def backups(root: Path) -> Path:
    """Where backups go if nothing else is said."""
    return root / "backups"


def _target(output: Path | None, root: Path) -> Path:
    name = datetime.now(UTC).strftime("corral-%Y%m%dT%H%M%SZ.backup")
    target = backups(root) / name if output is None else output / name if output.is_dir() else output
    if target.exists():
        raise BackupError(f"{target}: is there already: choose another name")
    return target.absolute()


def _prune(target: Path, keep: int) -> list[str]:
    older = [item["file"] for item in listing(target.parent) if item["file"] != str(target)]
    removed = older[: max(0, len(older) + 1 - keep)]
    for file in removed:
        os.unlink(file)
    return removed


def _secret(path: Path, root: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BackupError(f"{root} holds no installation: there is no {path}") from None
    except OSError as error:
        raise BackupError(f"{path}: cannot be read: {error.strerror}") from None


def _header(database: Database) -> dict[str, Any]:
    return {"version": __version__, "created": time.time(), "database": database.dialect}


def _spool(writer: Writer, folder: Path, root: Path) -> int:
    """The spools of gateways on this machine. Those of others are theirs to ship."""
    folder = folder if folder.is_absolute() else root / folder
    count = 0
    for gateway in sorted(folder.iterdir()) if folder.is_dir() else ():
        for path in sorted(gateway.iterdir()) if gateway.is_dir() else ():
            if path.suffix not in (".seg", *spool.ASIDE) or not path.is_file():
                continue
            try:
                data = _whole(path)
            except FileNotFoundError:
                continue  # control has it meanwhile
            if data:
                writer.stream(f"spool/{gateway.name}/{path.name}", len(data), io.BytesIO(data))
                count += 1
    return count


def _whole(path: Path) -> bytes:
    """A segment up to the last whole frame: one that is written to now may end within one."""
    with path.open("rb") as file:
        data = file.read(os.fstat(file.fileno()).st_size)
    return data[: spool.whole_frames(data)] if path.suffix == ".seg" else data


def _database(connection: Connection, writer: Writer) -> tuple[dict[str, Any], dict[str, str]]:
    summary: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for table, piece in dump(connection, summary):
        counts[table] = counts.get(table, 0) + 1
        writer.add(f"database/{table}-{counts[table]:06d}.jsonl.gz", piece)
    writer.add("database/summary.json", _json(summary))
    fleet = connection.execute(select(nodes.c.name, nodes.c.url).where(~nodes.c.removed)).all()
    return summary, {row.name: row.url for row in fleet}


def _configuration(writer: Writer, place: Place) -> None:
    effective = yaml.safe_dump(place.settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    writer.add("config/settings.yaml", effective.encode())
    try:
        given = place.file.read_bytes() if place.file is not None else None
    except OSError:
        given = None  # it was moved since; the settings that it made are there
    if given is not None:
        writer.add("config/corral.yaml", given)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
