"""What a restored installation is asked before it counts as one: its rows, its keys, its unshipped records."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, table, text

from corral.backup.archive import BackupError
from corral.store import keys as keytext
from corral.store import spool
from corral.store.database import revisions, schema_version
from corral.store.tables import key_verifiers, keys


@dataclass(frozen=True)
class KeyAtHand:
    """A key to try, by its text. ``asked``: the operator named it, so it has to be taken. ``pepper``: the one that the
    running installation has."""

    text: str | None
    asked: bool
    pepper: bytes | None


def rows(connection: Connection, told: dict[str, Any]) -> None:
    """Schema, integrity and the number of rows of each table, against what the backup says of itself (``told``).

    Raises:
        BackupError: the database is not what the backup says.
    """
    if (version := schema_version(connection)) != revisions()[-1]:
        raise BackupError(f"restored, the database has schema {version} where this Corral has {revisions()[-1]}")
    if connection.dialect.name == "sqlite":
        broken = [line for line in connection.execute(text("PRAGMA integrity_check")).scalars() if line != "ok"]
        loose = connection.execute(text("PRAGMA foreign_key_check")).all()
        broken += [f"a row of {row[0]} whose row in {row[2]} is gone" for row in loose]
        if broken:
            raise BackupError(f"restored, the database is damaged: {broken[0]}")
    if told["schema"] != version:
        return  # a migration may make and merge rows: the restore has counted them before it
    for name, count in told["tables"].items():
        found = connection.execute(select(func.count()).select_from(table(name))).scalar_one()
        if found != count:
            raise BackupError(f"restored, {name} has {found} rows where the backup says {count}")


def key(connection: Connection, at_hand: KeyAtHand, pepper_file: Path, moment: float) -> dict[str, Any]:
    """Whether the key is taken, as a gateway would take it, with the restored pepper at the backup's ``moment``.

    ``key`` is its id, or None with the reason in ``key_unchecked``; its text is in nothing that is said.

    Raises:
        BackupError: no key can be taken, or not one that has to be.
    """
    try:
        pepper = keytext.read_pepper(pepper_file)
    except keytext.PepperError as error:
        raise BackupError(f"restored, the pepper cannot be used: {error}") from None
    if at_hand.text is None:
        return _unchecked("none is at hand: name one with --key-file")
    key_id = keytext.parse(at_hand.text)
    if key_id is None:
        raise BackupError("the key to try is malformed: expected crl_…, as `corral keys create` prints it")
    refusal = _refusal(connection, key_id, keytext.verifier(pepper, at_hand.text), moment)
    if refusal is None:
        return {"key": key_id, "key_unchecked": None}
    if at_hand.asked:
        raise BackupError(f"restored, the key {key_id} is not taken: {refusal}")
    if at_hand.pepper is not None and at_hand.pepper != pepper:
        raise BackupError(f"restored, the key {key_id} is not taken: the pepper here is another than the backup's")
    return _unchecked(f"{key_id}, the admin's key here, was not: {refusal}; name another with --key-file")


def segments(folder: Path) -> None:
    """Look whether control could take every unshipped record. Raises BackupError where one is damaged."""
    for path in sorted(folder.glob("*/*.seg")):
        data = path.read_bytes()
        if (whole := spool.whole_frames(data)) != len(data):
            raise BackupError(f"restored, {path.relative_to(folder)} has a damaged record at byte {whole}")


def _unchecked(reason: str) -> dict[str, Any]:
    return {"key": None, "key_unchecked": reason}


def _refusal(connection: Connection, key_id: str, verifier: str, moment: float) -> str | None:
    """Why a key would be refused; None where it is taken."""
    known = connection.execute(select(keys.c.revoked, keys.c.expires).where(keys.c.id == key_id)).first()
    if known is None:
        return "the backup does not know it"
    if known.revoked is not None:
        return "it was revoked"
    if known.expires is not None and moment >= known.expires:
        return "it had expired"
    columns = key_verifiers.c
    for found in connection.execute(select(columns.verifier, columns.expires).where(columns.key_id == key_id)):
        if hmac.compare_digest(found.verifier, verifier):
            return None if found.expires is None or moment < found.expires else "it had been rotated"
    return "the backup knows it with another text"
