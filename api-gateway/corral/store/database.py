"""Control's database: opened, brought to this version's schema, and called in transactions.

SQLAlchemy Core, synchronous, in threads: control's traffic is small, and one driver per database is enough.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, Table, column, create_engine, event, inspect, select, table, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 10.0

_VERSION = table("alembic_version", column("version_num"))

T = TypeVar("T")


class DatabaseError(Exception):
    """The database cannot be used; says why."""


class DatabaseTooNew(DatabaseError):
    """The database was made by a newer Corral: an older one would damage what it does not know."""


def resolve(url: str, state: Path) -> str:
    """`url` with the path of a relative SQLite file taken within `state`.

    Raises:
        DatabaseError: no address of a database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise DatabaseError(f"store.database: {error}") from None
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        parsed = parsed.set(database=str(state / str(parsed.database)))
    return parsed.render_as_string(hide_password=False)


class Database:
    """One engine. ``read`` and ``write`` run a function of a connection in one transaction."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.dialect = parsed.get_backend_name()
        if self.dialect == "sqlite" and parsed.database:
            _make_private(Path(parsed.database))
            self.engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
            _prepare_sqlite(self.engine)
        else:
            self.engine = create_engine(parsed, pool_pre_ping=True)
        self._shown = parsed.render_as_string(hide_password=True)

    # -- schema

    def migrate(self) -> None:
        """Bring the schema to this version's.

        Raises:
            DatabaseTooNew: it is ahead of this version; nothing was changed.
            DatabaseError: it cannot be opened or changed.
        """
        known = revisions()
        try:
            with self.engine.connect().execution_options(corral_write=True) as connection, connection.begin():
                current = _version(connection)
                if current is not None and current not in known:
                    raise DatabaseTooNew(
                        f"the database {self._shown} has schema version {current}; this Corral knows versions "
                        f"up to {known[-1]}: start the newer Corral, or restore a backup of the older database"
                    )
                if current != known[-1]:
                    _upgrade(connection)
        except SQLAlchemyError as error:
            raise DatabaseError(f"the database {self._shown} cannot be used: {_reason(error)}") from error

    def version(self) -> str | None:
        """The schema's version, None for an empty database."""
        return self.read_now(_version)

    # -- calls

    def read_now(self, function: Callable[..., T], *args: Any) -> T:
        """``function(connection, *args)`` in a transaction that sees one state."""
        with self.engine.begin() as connection:
            return function(connection, *args)

    def write_now(self, function: Callable[..., T], *args: Any) -> T:
        """The same, allowed to change rows; commits when the function returns, else nothing happened."""
        with self.engine.connect().execution_options(corral_write=True) as connection, connection.begin():
            return function(connection, *args)

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """`read_now` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(None, partial(self.read_now, function, *args))

    async def write(self, function: Callable[..., T], *args: Any) -> T:
        """`write_now` in a thread. The caller's cancellation does not take back what was begun."""
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(None, partial(self.write_now, function, *args))
        )

    async def answers(self, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
        """Whether the database answers within `timeout` seconds."""
        try:
            await asyncio.wait_for(self.read(lambda connection: connection.execute(text("SELECT 1"))), timeout)
        except (SQLAlchemyError, OSError, TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def insert(connection: Connection, into: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ``on_conflict_do_update`` and ``on_conflict_do_nothing``, alike in both dialects."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(into)
    return sqlite.insert(into)


def revisions() -> list[str]:
    """This version's migrations, oldest first: the names of their files begin with them."""
    return sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(select(_VERSION.c.version_num)).scalar()


def _upgrade(connection: Connection) -> None:
    # Takes a third of a second to import, and most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its journal files the mode of the database: made here, none of them is ever open to others.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        # A gateway deletes a segment once control confirms it, so a commit must be on the disk.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A writer that begins as a reader fails when another writes in between; IMMEDIATE waits its turn.
        write = connection.get_execution_options().get("corral_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
