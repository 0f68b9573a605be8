"""PostgreSQL's indexes of the largest table, built before the migration that has them: within its transaction nobody
could write for minutes."""

from __future__ import annotations

import time

from sqlalchemy import Connection, Engine, text

AHEAD = (("0016", "ix_audit_request_id_seq", "audit (request_id, seq)"),)
"""The revision that has an index, its name, and of what it is: columns that every schema before has."""

# The advisory lock of who builds; the one of writers would keep them out.
_LOCK = 0x636F7272616D
_PAUSE = 0.2

# What holds a lock of this kind on the table: a build, until it has ended, and VACUUM, which a build waits for anyway.
_HELD = text("""SELECT count(*) FROM pg_locks
    WHERE relation = to_regclass('audit') AND mode = 'ShareUpdateExclusiveLock' AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())""")

# A role's limits would end a build each time, and the next start would begin it anew.
_LIMITS = ("statement_timeout", "lock_timeout")


def build_ahead(engine: Engine, version: str) -> None:
    """Build what migrations behind a schema version want and is not there; of several that start one does it.

    Raises:
        SQLAlchemyError: the database does not answer, or an index could not be built; the next call does it.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        lock = {"lock": _LOCK}
        # Not by waiting in the database: the build would wait for that statement.
        while not connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), lock).scalar():
            time.sleep(_PAUSE)
        try:
            for limit in _LIMITS:
                connection.execute(text(f"SET {limit} = 0"))
            for revision, name, what in AHEAD:
                if version < revision:
                    _build(connection, name, what)
        finally:
            for limit in _LIMITS:
                connection.execute(text(f"RESET {limit}"))
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), lock)


def _build(connection: Connection, name: str, what: str) -> None:
    there = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
    # A build by hand is no dead one: to drop what it has made, or to build beside it, is a deadlock that may end it.
    while not (valid := connection.execute(there, {"name": name}).scalar()) and connection.execute(_HELD).scalar():
        time.sleep(_PAUSE)
    if valid is False:  # who built it was killed
        connection.execute(text(f"DROP INDEX CONCURRENTLY {name}"))
    if not valid:
        connection.execute(text(f"CREATE INDEX CONCURRENTLY {name} ON {what}"))
