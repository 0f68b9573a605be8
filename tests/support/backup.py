"""An installation with something in it, and what a backup of it has to keep."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyrage
from sqlalchemy import MetaData, delete, insert, select

from corral.backup import archive
from corral.backup.archive import Secrets
from corral.backup.place import Place, open_database
from corral.config.settings import Settings
from corral.control.bootstrap import bootstrap
from corral.store import keys as keytext
from corral.store.database import Database, configured
from corral.store.dump import rows_of
from corral.store.ingest import ingest
from corral.store.spool import encode_frame
from corral.store.tables import audit, key_verifiers, keys
from support.servers import python_env

IDENTITY = pyrage.x25519.Identity.generate()
FOR_ME = Secrets(recipients=(IDENTITY.to_public(),), identities=(IDENTITY,))

Rows = dict[str, list[dict[str, Any]]]


def place(root: Path, url: str | None = None) -> Place:
    """An installation in `root` whose settings say the database, or say nothing of it."""
    store = {} if url is None else {"database": url}
    settings = Settings.model_validate({"control": {"state": root}, "store": store})
    return Place(root, settings, None)


def fill(made: Place, rows: int = 40, name: str = "kept") -> str:
    """Make the installation, with a key, audit rows of all kinds, and a newest row that is deleted; the key."""
    bootstrap(made.root, made.settings)
    database = configured(made.settings.store, made.root)
    key_id, text = keytext.generate()
    pepper = keytext.read_pepper(made.root / "pepper")
    now = 1_700_000_000.123456

    def enter(connection: Any) -> None:
        row = {"id": key_id, "name": name, "tenant": "ťenant\n☃", "role": "operator", "models": ["a*", "ü"]}
        connection.execute(insert(keys).values({**row, "class": "batch", "created": now, "rpm": 2**53}))
        proof = keytext.verifier(pepper, text)
        connection.execute(insert(key_verifiers).values(verifier=proof, key_id=key_id, created=0.1 + 0.2))
        for number in range(rows):
            changes = {"before": None, "after": {"n": [number, None, "é"]}} if number % 3 else {"before": {}}
            values = {"id": f"row-{number}", "ts": now + number / 7, "model": 'm"\\\t', "estimated": number % 2 == 0}
            connection.execute(insert(audit).values({**values, **changes, "tokens": 2**40 + number, "ms": 1e-9}))
        frame = encode_frame({"t": "settle", "id": "from-spool", "ts": time.time(), "key": key_id, "status": 200})
        ingest(connection, "gateway-1", "0000000000000001.seg", 0, frame)
        connection.execute(insert(audit).values(id="deleted", ts=now))
        connection.execute(delete(audit).where(audit.c.id == "deleted"))

    database.write_now(enter)
    database.close()
    return text


def rows(database: Database) -> Rows:
    """Every row of every table, as the database has it."""

    def read(connection: Any) -> Rows:
        found = MetaData()
        found.reflect(connection)
        return {
            table.name: [
                dict(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns)).mappings()
            ]
            for table in found.sorted_tables
        }

    try:
        return database.read_now(read)
    finally:
        database.close()


def rows_at(made: Place) -> Rows:
    """The rows of an installation."""
    store = made.settings.store
    return rows(open_database(store.database, made.root, store.database_password_file))


def rows_in(path: Path, secrets: Secrets = FOR_ME) -> Rows:
    """The rows in a backup."""
    found: Rows = {}

    def take(name: str, size: int, source: Any) -> None:
        if name.endswith(".jsonl.gz"):
            found.setdefault(name.split("/")[1].rpartition("-")[0], []).extend(rows_of(source.read(size)))

    archive.read(path, secrets, take)
    return found


def cli(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A `corral backup` command."""
    argv = [sys.executable, "-P", "-m", "corral", "backup", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, env={**python_env(), **(env or {})})
