"""Control's database: opened, brought to this version's schema, and called in transactions.

SQLAlchemy Core, synchronous, in threads: control's traffic is small, and one driver per database is enough.
SQLite and PostgreSQL behave alike: a reader sees one state, and writers take turns.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, Pool, Table, column, create_engine, event, inspect, select, table, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from corral.config.settings import StoreSettings
from corral.store.indexes import build_ahead

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 10.0
PATIENCE = 30.0
THREADS = 8
# The one advisory lock of PostgreSQL that Corral takes: whoever changes rows or the schema holds it.
WRITER_LOCK = 0x636F7272616C
# libpq's words; the last finds a server that the network swallowed, within ten seconds.
POSTGRESQL = {"connect_timeout": "5", "application_name": "corral", "tcp_user_timeout": "10000"}

log = logging.getLogger(__name__)

_VERSION = table("alembic_version", column("version_num"))

T = TypeVar("T")


class DatabaseError(Exception):
    """The database cannot be used; says why."""


class DatabaseAway(DatabaseError):
    """The database does not answer now; it may later."""


class DatabaseTooNew(DatabaseError):
    """The database was made by a newer Corral: an older one would damage what it does not know."""


def resolve(url: str, state: Path) -> str:
    """`url` with the path of a relative SQLite file taken within `state`.

    Raises:
        DatabaseError: no address of a database.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(f"store.database: {error}") from None
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        parsed = parsed.set(database=str(state / str(parsed.database)))
    return parsed.render_as_string(hide_password=False)


def configured(store: StoreSettings, state: Path) -> Database:
    """The database of the settings; relative files are in `state`.

    Raises:
        DatabaseError: no address of a database, or a password that cannot be read.
    """
    password = store.database_password_file
    return Database(resolve(store.database, state), state / password if password is not None else None)


class Database:
    """One engine. ``read`` and ``write`` run a function of a connection in one transaction."""

    def __init__(self, url: str, password_file: Path | None = None) -> None:
        parsed = make_url(url)
        self.dialect = parsed.get_backend_name()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        self._closed: Pool | None = None
        if self.dialect == "sqlite" and parsed.database:
            _make_private(Path(parsed.database))
            self.engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
            _prepare_sqlite(self.engine)
        else:
            told = {name: value for name, value in POSTGRESQL.items() if name not in parsed.query}
            self.engine = create_engine(parsed, pool_pre_ping=True, pool_timeout=BUSY_SECONDS, connect_args=told)
            _prepare_postgresql(self.engine, password_file)
        self.shown = parsed.render_as_string(hide_password=True)

    # -- schema

    def migrate(self) -> None:
        """Bring the schema to this version's.

        Two that start at once take turns. PostgreSQL's larger indexes are built before, while others read and write.

        Raises:
            DatabaseTooNew: it is ahead of this version; nothing was changed.
            DatabaseAway: there is no connection to it.
            DatabaseError: it cannot be opened or changed.
        """
        known = revisions()
        try:
            version = self.version()
            if version is not None and version in known[:-1]:
                log.warning(
                    "the database goes from schema %s to %s: with many records it takes minutes", version, known[-1]
                )
                if self.dialect != "sqlite":
                    build_ahead(self.engine, version)
            with self.engine.connect().execution_options(corral_write=True) as connection, connection.begin():
                current = schema_version(connection)
                if current is not None and current not in known:
                    raise DatabaseTooNew(
                        f"the database {self.shown} has schema version {current}; this Corral knows versions "
                        f"up to {known[-1]}: start the newer Corral, or restore a backup of the older database"
                    )
                if current != known[-1]:
                    upgrade(connection)
        except SQLAlchemyError as error:
            raise self._unusable(error) from error

    def check(self) -> None:
        """Ask it something.

        Raises:
            DatabaseAway, DatabaseError: as `migrate`, which changes it besides.
        """
        try:
            self.version()
        except SQLAlchemyError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: SQLAlchemyError) -> DatabaseError:
        away = self.dialect != "sqlite" and isinstance(error, OperationalError)
        kind = DatabaseAway if away else DatabaseError
        return kind(f"the database {self.shown} cannot be used: {reason(error)}")

    def version(self) -> str | None:
        """The schema's version, None for an empty database."""
        return self.read_now(schema_version)

    # -- calls

    def read_now(self, function: Callable[..., T], *args: Any) -> T:
        """``function(connection, *args)`` in a transaction that sees one state."""
        with self.engine.connect() as connection:
            if self.dialect != "sqlite":
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                return function(connection, *args)

    def write_now(self, function: Callable[..., T], *args: Any) -> T:
        """The same, allowed to change rows; commits when the function returns, else nothing happened."""
        with self.engine.connect().execution_options(corral_write=True) as connection, connection.begin():
            return function(connection, *args)

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """`read_now` in a thread."""
        return await self._in_thread(self.read_now, function, *args)

    async def write(self, function: Callable[..., T], *args: Any) -> T:
        """`write_now` in a thread. The caller's cancellation does not take back what was begun."""
        return await self._in_thread(self.write_now, function, *args)

    async def _in_thread(self, run: Callable[..., T], *args: Any) -> T:
        # Threads of its own: a database that hangs must not hold up what else control does.
        done = asyncio.get_running_loop().run_in_executor(self._threads, partial(self._run, run, *args))
        done.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may be left to hear it
        try:
            # Not `wait_for`: before Python 3.12 it loses a cancellation that comes as the call ends, and who was to
            # stop goes on for ever.
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(done)
        except TimeoutError:
            raise PoolTimeout(f"no answer within {PATIENCE:g} s") from None

    def _run(self, run: Callable[..., T], *args: Any) -> T:
        try:
            return run(*args)
        finally:
            if self._closed is not None:
                # This call has outlived `close`: it gave its connection back after that, or has only then taken one.
                self._closed.dispose()
                self.engine.pool.dispose()

    async def answers(self, timeout: float = 2.0) -> bool:  # noqa: ASYNC109
        """Whether the database answers within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.read(lambda connection: connection.execute(text("SELECT 1")))
        except (SQLAlchemyError, OSError, TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Close all connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._closed = self.engine.pool
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


def schema_version(connection: Connection) -> str | None:
    """The schema's version, None for an empty database."""
    if not inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(select(_VERSION.c.version_num)).scalar()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema forward to a version, in the connection's transaction."""
    # Takes a third of a second to import, and most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its journal files the mode of the database: made here, none of them is ever open to others.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, below
        cursor = connection.cursor()
        _write_ahead(cursor)
        # A gateway deletes a segment once control confirms it, so a commit must be on the disk.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A writer that begins as a reader fails when another writes in between; IMMEDIATE waits its turn.
        write = connection.get_execution_options().get("corral_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    # A new database is switched once, and SQLite does not wait for another that does it: its time-out is not for this.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _prepare_postgresql(engine: Engine, password_file: Path | None) -> None:
    if password_file is not None:
        _password(password_file)

        # Read for each connection: a password that was changed needs no restart.
        @event.listens_for(engine, "do_connect")
        def connecting(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
            parameters["password"] = _password(password_file)

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # As SQLite has it: what a writer has read stays true until it commits.
        if connection.get_execution_options().get("corral_write", False):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS:.0f}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")


def _password(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatabaseError(f"{path}: the database's password cannot be read: {reason}") from None


def reason(error: Exception) -> str:
    """What the database itself said, in a line."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]
