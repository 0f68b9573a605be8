"""A sealed trail, and where the verifier has its records from without a control."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, delete, insert, select, text, update

from corral.config.record import AuditSettings
from corral.control import audit as trail
from corral.control.auth import Principal
from corral.control.ledger import DAY, Ledger
from corral.store import seal
from corral.store.chain import ZERO, content, leaf_of, link_after
from corral.store.checkpoints import lines_after
from corral.store.database import Database, resolve, upgrade
from corral.store.ingest import ingest
from corral.store.spool import encode_frame
from corral.store.tables import audit, audit_streams
from corral.store.verify import Report, State, verify

GATEWAY = "gateway-1"
WHO = Principal("k", "admin", "::1", "")


class Direct:
    """Records straight from a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def state(self) -> State:
        return self._database.read_now(seal.state)

    def records(self, stream: str, after: int, limit: int) -> list[dict[str, Any]]:
        return self._database.read_now(seal.records, stream, after, limit)

    def checkpoints(self, after: int) -> list[bytes]:
        return [line.encode() for line in self._database.read_now(lines_after, after, 10**6)]


class Records:
    """The records of GATEWAY in a database, for who changes them."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def write(self, change: Callable[[Connection], Any]) -> Any:
        return self.database.write_now(change)

    def change(self, pos: int, /, **values: Any) -> None:
        self.write(lambda c: c.execute(update(audit).where(audit.c.gw == GATEWAY, audit.c.pos == pos).values(values)))

    def drop(self, first: int, last: int) -> None:
        which = (audit.c.gw == GATEWAY) & audit.c.pos.between(first, last)
        self.write(lambda connection: connection.execute(delete(audit).where(which)))

    def rebuild(self) -> None:
        """Give the records that are there the places, leaves and links of a chain that fits together."""

        def chain(connection: Connection) -> None:
            found = connection.execute(select(audit).where(audit.c.gw == GATEWAY).order_by(audit.c.pos)).mappings()
            rows = found.all()
            connection.execute(update(audit).where(audit.c.gw == GATEWAY).values(pos=None))
            link = ZERO
            for pos, row in enumerate(rows, 1):
                leaf = leaf_of(content({**row, "pos": pos}))
                link = link_after(link, leaf)
                connection.execute(update(audit).where(audit.c.seq == row["seq"]).values(pos=pos, leaf=leaf))
            end = update(audit_streams).where(audit_streams.c.stream == GATEWAY)
            connection.execute(end.values(pos=len(rows), link=link))

        self.write(chain)

    def keep(self) -> Callable[[], None]:
        """Keep the records and their chain's end as they are; what is returned puts them back."""
        kept = [(table, self._read(table, of)) for table, of in _OF_GATEWAY]

        def put_back(connection: Connection) -> None:
            for (table, rows), (_, of) in zip(kept, _OF_GATEWAY, strict=True):
                connection.execute(delete(table).where(of == GATEWAY))
                connection.execute(insert(table), rows)

        return lambda: self.write(put_back)

    def _read(self, table: Table, of: ColumnElement[str]) -> list[dict[str, Any]]:
        wanted = select(table).where(of == GATEWAY)
        return self.database.read_now(lambda c: [dict(row) for row in c.execute(wanted).mappings()])


_OF_GATEWAY = [(audit, audit.c.gw), (audit_streams, audit_streams.c.stream)]


class Trail(Records):
    """A database with three checkpoints: records 1 to 5, 6 to 10 and 11 to 15, and 16 to 18 that have none yet."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(Database(resolve(url, folder)))
        self.database.migrate()
        self.folder = folder
        (folder / "audit.key").write_text(secrets.token_hex(32))
        self.ledger = self.new_ledger()
        self.offset = 0
        self.file = folder / "audit/checkpoints.jsonl"
        for number in range(18):
            self.ship(number)
            if number in (4, 9, 14):
                self.write(lambda connection: trail.record(connection, WHO, "POST", "/admin/x", {"b": 1, "a": 2}, {}))
                asyncio.run(self.ledger.sign())

    def new_ledger(self, **settings: Any) -> Ledger:
        return Ledger(self.database, AuditSettings(**settings), self.folder, 1800.0)

    def ship(self, number: int, **fields: Any) -> None:
        record = {"t": "settle", "id": f"r{number}", "request_id": "s", "ts": 1.5 + number, "outcome": "ok", **fields}
        data = encode_frame({**record, "tokens": number, "ms": 1.25, "estimated": False, "queue_ms": 1e-7})
        self.offset = self.write(lambda c: ingest(c, GATEWAY, "0000000000000001.seg", self.offset, data)).watermark

    def verify(self, public: str = "") -> Report:
        return verify(Direct(self.database), self.file.read_bytes().splitlines(), [public or self.ledger.signer.public])


def begin_before_the_chain(connection: Connection) -> None:
    """Make a database as it was before there was the chain: six records, and one that is open."""
    upgrade(connection, "0006")
    connection.execute(text("INSERT INTO audit (id, gw, ts) VALUES ('open', 'gateway-1', 1.5)"))
    for number in range(1, 7):
        # The second half is from the days after.
        ts = 1.5 if number <= 3 else number * DAY
        done = f"'gateway-1', {ts}, 'ok', 6"
        connection.execute(text(f"INSERT INTO audit (id, gw, ts, outcome, tokens) VALUES ('old{number}', {done})"))


def move(made: Records, last: int) -> None:
    """Let the database say that what is numbered up to there is older than the chain."""

    def change(connection: Connection) -> None:
        connection.execute(delete(audit_streams).where(audit_streams.c.stream == ""))
        row = {"stream": "", "pos": last, "link": b"", "signed": 0, "signed_link": b"", "dropped": 0}
        connection.execute(insert(audit_streams).values(row))

    made.write(change)


def found(made: Trail, *words: str) -> None:
    """Verify says each of these, and nothing else of other records."""
    problems = made.verify().problems
    assert len(problems) == len(words), problems
    for word, problem in zip(words, problems, strict=True):
        assert word in problem
