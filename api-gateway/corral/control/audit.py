"""The audit trail: rows for admin actions, and the list."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query
from sqlalchemy import Connection, Table, select
from sqlalchemy.exc import SQLAlchemyError

from corral.config.values import duration
from corral.control.auth import ROUTE_MAX, Caller, Principal
from corral.control.context import Here
from corral.control.errors import Problem
from corral.store.actions import enter
from corral.store.database import Database
from corral.store.ingest import note_use
from corral.store.keys import masked
from corral.store.tables import audit, keys, usage
from corral.store.trail import Wanted, listed

MINUTE = 60.0
NOTES_MAX = 20
# Reads of the trail itself. Each text that is looked at is named; comparing is a POST, and has a row of its own.
TRAIL = re.compile(r"/admin/audit(/.*)?")
TEXTS = "/admin/audit/content"

# How the pages of one run differ.
_AFTER = re.compile(r"(?:^|&)after=(-?[0-9]{1,19})(?=&|$)")

entered = 0
"""Rows for admin actions since this process started."""

log = logging.getLogger(__name__)
router = APIRouter(tags=["audit"])


def record(
    connection: Connection,
    who: Principal,
    method: str,
    route: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    status: int = 200,
    tenant: str | None = None,
) -> None:
    """Enter an admin action, in the transaction that does it. `before` and `after` hold no secrets.

    `status` 400 and above: it was refused, from 500 on it failed. `tenant` is that of what was acted on, where it has
    one; the caller's otherwise.
    """
    global entered
    entered += 1
    known = {"key": who.key_id, "tenant": tenant or who.tenant, "addr": who.address, "request_id": who.request_id}
    enter(connection, method, route, before, after, status, **known)


class Counted(NamedTuple):
    """Whose calls are counted together in a minute: a key and its tenant, what they were, and what the count names."""

    key: str
    tenant: str
    what: str
    route: str


class Notes:
    """Enters refused calls and reads in the audit trail: of each caller NOTES_MAX of either a minute, and then how many
    more. Of reads of the trail itself it has as many again, and a row, before they are answered, that says that those
    behind it are counted; a look at texts is never only counted. Keys that were used are noted with them.

    Callers without a key that works are one caller, so that nobody can fill the database from outside.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._minute = 0
        self._counts: dict[Counted, int] = {}
        self._said: set[Counted] = set()
        self._saying = asyncio.Lock()
        self._runs: dict[tuple[str, str, str, str], int] = {}
        self._used: dict[str, float] = {}
        self._silent = False

    def used(self, key: str) -> None:
        """Note that a key was used now; `flush` enters it."""
        self._used[key] = time.time()

    async def note(self, who: Principal, method: str, route: str, status: int, query: str = "") -> bool:
        """Enter one, or count it where this caller's rows of this minute are used up; whether that was done.

        `query` is what was asked for, of a read.
        """
        minute = int(time.monotonic() // MINUTE)
        if minute != self._minute:
            self._minute = minute
            self._runs.clear()
            await self.flush()
        if status < 400 and TRAIL.fullmatch(route):
            return await self._note_trail(who, method, route, status, query)
        caller = Counted(who.key_id, who.tenant, "refused" if status >= 400 else "read", "/admin")
        count = self._counts[caller] = self._counts.get(caller, 0) + 1
        if count > NOTES_MAX and not self._silent:
            return True
        # Where the last row was not taken, the one that says how many more there were may not be either.
        done = await self._enter(who, method, route, status, query)
        if (count > NOTES_MAX if done else status < 400) and self._counts.get(caller):
            self._counts[caller] -= 1  # it has a row of its own, or is not answered
        return done

    async def _note_trail(self, who: Principal, method: str, route: str, status: int, query: str) -> bool:
        """Enter a read of the trail, unless it goes on behind where one of this minute began, and asks for the same.

        The row says that all behind its `after` may have been read: what is not entered is nothing else.
        """
        place = _AFTER.search(query)
        # What was cut, or may be read in another way than it is read here, is no page of a run.
        if route == TEXTS or place is None or query.count("after=") != 1 or len(query) >= ROUTE_MAX:
            return await self._count_trail(who, method, route, status, query) is not None
        run, after = (who.key_id, who.address, route, _AFTER.sub("", query)), int(place[1])
        if (began := self._runs.get(run)) is not None and began <= after:
            return True
        entered = await self._count_trail(who, method, route, status, query)
        if entered:
            self._runs[run] = after
        return entered is not None

    async def _count_trail(self, who: Principal, method: str, route: str, status: int, query: str) -> bool | None:
        """Enter a read of the trail, or count it behind the row that says so; whether it was entered, None for neither.

        That row is there before any read is only counted: a control that is killed loses the number, not that there
        were some.
        """
        if route == TEXTS:
            return await self._enter(who, method, route, status, query) or None
        caller = Counted(who.key_id, who.tenant, "read", "/admin/audit")
        count = self._counts[caller] = self._counts.get(caller, 0) + 1
        if count <= NOTES_MAX:
            done = await self._enter(who, method, route, status, query)
            if not done and self._counts.get(caller):
                self._counts[caller] -= 1  # it is not answered
            return done or None
        async with self._saying:  # of many at once one has the row, and the others wait for it
            if caller in self._said and not self._silent:
                return False
            done = await self._enter(who, method, route, status, query, counting=True)
            if self._counts.get(caller):
                self._counts[caller] -= 1  # it has a row of its own, or is not answered
                if done:
                    self._said.add(caller)
        return done or None

    async def _enter(
        self, who: Principal, method: str, route: str, status: int, query: str, counting: bool = False
    ) -> bool:
        asked: dict[str, Any] = {"query": query} if query else {}
        if counting:
            asked["counting"] = True
        return await self._write(lambda connection: record(connection, who, method, route, None, asked or None, status))

    async def flush(self) -> None:
        """Enter how many were left out of those that were noted, one row a caller, and count anew; and when keys were
        used."""
        counts, self._counts = self._counts, {}
        self._said.clear()
        more = {caller: count - NOTES_MAX for caller, count in counts.items() if count > NOTES_MAX}

        def tell(connection: Connection) -> None:
            for caller, count in more.items():
                who = Principal(caller.key, "", "", "", caller.tenant)
                status = 429 if caller.what == "refused" else 200
                record(connection, who, "", caller.route, None, {f"more_{caller.what}": count}, status=status)

        if more and not await self._write(tell):
            for caller in more:  # the next minute tells of them too
                self._counts[caller] = self._counts.get(caller, 0) + counts[caller]
        await self._note_use()

    async def _note_use(self) -> None:
        used, self._used = self._used, {}
        try:
            if used:
                # By itself: that it is taken does not say that a row would be.
                await self._database.write(note_use, used)
        except SQLAlchemyError:
            self._used = used | self._used  # with the next ones

    async def run(self) -> None:
        """Flush each minute, until cancelled."""
        while True:
            await asyncio.sleep(MINUTE)
            await self.flush()

    async def _write(self, enter: Callable[[Connection], None]) -> bool:
        try:
            await self._database.write(enter)
        except SQLAlchemyError as error:
            if not self._silent:
                log.warning("refused admin calls are not in the audit trail, and reads are refused: %s", error)
            self._silent = True
            return False
        self._silent = False
        return True


@router.get("/admin/audit")
async def list_audit(
    control: Here,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=1000, description="Rows at most.")] = 100,
    after: Annotated[int | None, Query(description="Rows behind this `seq`.")] = None,
    before: Annotated[str | None, Query(description="Rows before this `seq`, or before a time.")] = None,
    key: Annotated[str | None, Query(description="Of this key: its id, or the name of one or several.")] = None,
    model: Annotated[str | None, Query(description="Of this model.")] = None,
    request: Annotated[str | None, Query(description="Of this request: the `X-Request-ID` of its answer.")] = None,
    since: Annotated[str | None, Query(description="Not older: epoch seconds, 1h, or ISO 8601.")] = None,
) -> dict[str, Any]:
    """Rows of the audit trail, oldest first: the newest `limit`, or those behind `after`.

    An operator is shown those of its tenant.
    """
    below = until = None
    if before is not None:
        # A row's number is small, a time is not.
        number = int(before) if re.fullmatch(r"\d{1,18}", before, re.ASCII) else None
        if number is not None and number < 10**9:
            below = number
        else:
            until = moment(before, "before")
    ids = None if key is None else await control.database.read(of_key, caller, key)
    start = None if since is None else moment(since, "since")
    wanted = Wanted(after, below, start, until, ids, caller.bound, model, request)
    rows = await control.database.read(listed, wanted, limit)
    return {"audit": rows, "next": rows[-1]["seq"] if rows else after}


def of_key(connection: Connection, who: Principal, key: str) -> list[str]:
    """The ids of the keys that are meant by an id or a name, revoked ones too; of a name, all that have it.

    Raises:
        Problem: 404 where there is no such key, and no record of one either.
    """
    column = keys.c
    wanted = select(column.id).where((column.id == key) | (column.name == key))
    if who.bound is not None:
        wanted = wanted.where(column.tenant == who.bound)
    found = list(connection.execute(wanted).scalars())
    if key in found or (not found and any(_on_record(connection, who, key, table) for table in (audit, usage))):
        return [key]  # of records that a backup brought, say
    if not found:
        raise Problem(404, "not_found", f"key: there is no key {masked(key)!r}: `corral keys list` shows ids and names")
    return found


def _on_record(connection: Connection, who: Principal, key: str, table: Table) -> bool:
    row = select(table.c.key).where(table.c.key == key).limit(1)
    if who.bound is not None:
        row = row.where(table.c.tenant + "" == who.bound)  # compared: the key says where to look
    return connection.execute(row).first() is not None


def moment(text: str, field: str) -> float:
    """Epoch seconds of epoch seconds, of a duration before now, or of an ISO 8601 time (UTC if it says none).

    Raises:
        Problem: 400 naming the field.
    """
    if re.fullmatch(r"\d{9,12}(\.\d+)?", text, re.ASCII):
        return float(text)
    try:
        return time.time() - duration(text)
    except ValueError:
        pass
    try:
        value = datetime.fromisoformat(text)
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        wanted = "expected epoch seconds, a duration such as 1h, or a time such as 2026-01-31T12:00:00Z"
        raise Problem(400, "bad_request", f"{field}: {wanted}") from None
