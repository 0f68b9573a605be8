"""What backup commands do, in the audit trail of the installation: they go past control, straight to its database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.backup.place import Place, open_database, sqlite_file
from corral.store import actions
from corral.store.database import DatabaseError, reason


def note(connection: Connection, action: str, told: dict[str, Any]) -> None:
    """Enter one, in the transaction that does it. `action` is create, restore or drill."""
    actions.ran(connection, f"corral backup {action}", told)


def enter(place: Place, action: str, told: dict[str, Any]) -> str | None:
    """Enter one in the installation's database, where there is one; why it could not be, or None."""
    store = place.settings.store
    file = sqlite_file(store.database, place.root)
    if file is not None and not file.exists():
        return None
    try:
        database = open_database(store.database, place.root, store.database_password_file)
    except DatabaseError as error:
        return str(error)
    try:
        database.write_now(note, action, told)
    except SQLAlchemyError as error:
        return reason(error)
    finally:
        database.close()
    return None
