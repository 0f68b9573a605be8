"""The database's rows in a form of no dialect's own: JSON Lines, in pieces, with the schema's version beside them.

What is dumped and loaded is what the database has, not what this version's tables say: an older schema is loaded
as it was, and then migrated.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Connection,
    Double,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    func,
    inspect,
    select,
    text,
)

from corral.store.database import DatabaseError, DatabaseTooNew, revisions, schema_version, upgrade
from corral.store.tables import metadata

PIECE = 4 << 20
ROWS = 1000
OWN = ("alembic_version", "corral_restore")

_KINDS = (JSON, BigInteger, Boolean, Double, Float, Integer, LargeBinary, String)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


def dump(connection: Connection, summary: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Each table's rows as pieces ``(table, gzip of JSON Lines)``, in an order in which they can be loaded.

    `summary` is filled meanwhile: ``schema``, ``tables`` (rows of each) and ``counters`` (the highest number that
    each counting column has given). The connection's transaction has to see one state.

    Raises:
        DatabaseTooNew: the schema is ahead of this version.
        DatabaseError: there is nothing in it, or a column of a kind that this version cannot write.
    """
    version = schema_version(connection)
    known = revisions()
    if version is None:
        raise DatabaseError("the database is empty: there is nothing to back up")
    if version not in known:
        raise DatabaseTooNew(f"the database has schema version {version}; this Corral knows up to {known[-1]}")
    tables = _tables(connection)
    summary |= {"schema": version, "tables": {}, "counters": _counters(connection, tables)}
    for table in tables:
        count = 0
        lines: list[bytes] = []
        size, pieces = 0, 0
        streamed = connection.execution_options(stream_results=True, yield_per=ROWS)
        for row in streamed.execute(select(table).order_by(*table.primary_key.columns)).mappings():
            line = _encode(dict(row))
            lines.append(line)
            size += len(line)
            count += 1
            if size >= PIECE:
                yield table.name, _piece(lines)
                lines, size, pieces = [], 0, pieces + 1
        if lines or not pieces:
            yield table.name, _piece(lines)
        summary["tables"][table.name] = count


def rows_of(piece: bytes) -> list[dict[str, Any]]:
    """The rows of a piece."""
    return [_decode(line) for line in gzip.decompress(piece).splitlines()]


class Loader:
    """Fills a database within the transaction of `connection`: ``begin``, ``take`` each piece, ``end``."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tables: dict[str, Table] = {}

    def begin(self, schema: str) -> None:
        """Make the tables of a schema version. What was there is dropped."""
        drop(self._connection)
        upgrade(self._connection, schema)
        self._tables = {table.name: table for table in _tables(self._connection)}

    def take(self, table: str, piece: bytes) -> None:
        """Enter a piece's rows."""
        into = self._tables[table]
        binary = [column.name for column in into.columns if isinstance(column.type, LargeBinary)]
        rows = rows_of(piece)
        for row in rows:
            for name in binary:
                row[name] = None if row[name] is None else base64.b64decode(row[name])
        for start in range(0, len(rows), ROWS):
            self._connection.execute(into.insert(), rows[start : start + ROWS])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Check the number of rows, set the counters, and migrate to this version's schema.

        Raises:
            DatabaseError: rows are missing.
        """
        for name, count in summary["tables"].items():
            found = self._connection.execute(select(func.count()).select_from(self._tables[name])).scalar_one()
            if found != count:
                raise DatabaseError(f"{name}: {found} rows were entered where the backup says {count}")
        for place, number in summary["counters"].items():
            name, _, column = place.partition(".")
            _count_on(self._connection, self._tables[name], column, number)
        upgrade(self._connection, "head")


def present(connection: Connection) -> list[str]:
    """Names of Corral's tables that the database has."""
    ours = {*metadata.tables, *OWN}
    return sorted(ours & set(inspect(connection).get_table_names()))


def drop(connection: Connection) -> None:
    """Drop Corral's tables, and no others."""
    found = MetaData()
    found.reflect(connection, only=present(connection))
    found.drop_all(connection)


def _tables(connection: Connection) -> list[Table]:
    found = MetaData()
    names = [name for name in inspect(connection).get_table_names() if name in metadata.tables]
    found.reflect(connection, only=names)
    for table in found.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, JSON):
                # NULL is no JSON null.
                column.type = JSON(none_as_null=True)
            if not isinstance(column.type, _KINDS):
                raise DatabaseError(f"{table.name}.{column.name}: {column.type!r} cannot be backed up")
    return found.sorted_tables


def _piece(lines: list[bytes]) -> bytes:
    return gzip.compress(b"".join(line + b"\n" for line in lines), 6, mtime=0)


def _counting(table: Table) -> tuple[str, bool] | None:
    """The column of a table that counts up by itself, and whether SQLite remembers its highest number."""
    model = metadata.tables[table.name]
    column = model.autoincrement_column
    return (column.name, model.dialect_options["sqlite"]["autoincrement"]) if column is not None else None


def _counters(connection: Connection, tables: list[Table]) -> dict[str, int]:
    found = {}
    for table in tables:
        if (counting := _counting(table)) is None:
            continue
        column, remembered = counting
        highest = connection.execute(select(func.max(table.c[column]))).scalar() or 0
        given = 0
        if connection.dialect.name != "sqlite":
            if sequence := _sequence(connection, table, column):
                # PostgreSQL's own name of it, quoted where it has to be.
                last = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {sequence}"  # noqa: S608
                given = connection.execute(text(last)).scalar_one()
        elif remembered:
            statement = text("SELECT seq FROM sqlite_sequence WHERE name = :name")
            given = connection.execute(statement, {"name": table.name}).scalar() or 0
        found[f"{table.name}.{column}"] = max(highest, given)
    return found


def _sequence(connection: Connection, table: Table, column: str) -> str | None:
    statement = text("SELECT pg_get_serial_sequence(:table, :column)")
    return connection.execute(statement, {"table": table.name, "column": column}).scalar()


def _count_on(connection: Connection, table: Table, column: str, number: int) -> None:
    """Have the next row's number be above `number`."""
    counting = _counting(table)
    if number < 1 or counting is None:
        return
    if connection.dialect.name != "sqlite":
        if sequence := _sequence(connection, table, column):
            connection.execute(text("SELECT setval(:sequence, :number)"), {"sequence": sequence, "number": number})
    elif counting[1]:
        name = {"name": table.name, "number": number}
        connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), name)
        connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :number)"), name)
