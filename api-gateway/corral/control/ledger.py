"""The audit trail's own upkeep: signed checkpoints, requests that nobody settled, and the end of what is too old.

A checkpoint is entered in the database first and written to the file next; a start writes what the file lacks. The
file is what an auditor keeps elsewhere: nothing that the database says can change it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx
from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from corral.config.record import AuditSettings
from corral.control.checkpoints import Lines
from corral.control.reserved import Reserved
from corral.control.webhook import Webhook
from corral.store import progress, recovery, seal
from corral.store.chain import (
    ZERO,
    Merkle,
    Older,
    OlderRoot,
    Signed,
    Signer,
    Span,
    link_after,
    read_checkpoint,
    signed_by,
)
from corral.store.checkpoints import last_checkpoint, lines_after
from corral.store.database import Database, reason
from corral.store.retention import drop, drop_content, due
from corral.store.tables import audit, audit_checkpoints, audit_streams
from corral.store.verify import PAGE

ROUND = 5.0
BREATH = 0.1
SWEEP = 3600.0
DAY = 86400.0
TAIL = 1 << 16
NOTES = 100
"""So many times within the longest duration of a request it is noted which records there are."""

SPAN_MAX = 200_000
"""Most records of a stream in one checkpoint; the next one follows at once."""

log = logging.getLogger(__name__)


class ChainBroken(Exception):
    """The database's own chain does not fit together: nothing more is signed."""


class AnotherKey(Exception):
    """The last checkpoint is of another key: this one may not sign before somebody says so."""


class Ledger:
    """Keeps the record. ``signed_at``: epoch seconds of the last round after which all there was had its checkpoint.

    ``number``: the last checkpoint in the file, of which ``lines`` has pages; ``stranger``: the id of the last
    checkpoint's key where this control may not sign behind it; ``recovered``: requests settled here. `shipped` says
    what gateways have shipped (`Hub.shipped`); `reserved` tells the store of limits what those requests used.
    """

    def __init__(
        self,
        database: Database,
        settings: AuditSettings,
        state: Path,
        longest: float,
        shipped: Callable[[], Mapping[str, progress.Shipped]] = dict,
        reserved: Reserved | None = None,
    ) -> None:
        self._database, self._settings, self._longest, self._shipped = database, settings, longest, shipped
        self._reserved = reserved
        self.path = state / settings.checkpoints
        self.lines = Lines(self.path)
        self._key = state / settings.signing_key_file
        self.signer = Signer(self._key.read_text(encoding="ascii"))
        self.signed_at = time.time()
        self.number = 0
        self.webhook = Webhook(database, settings.webhook, self.path.with_name(self.path.name + ".sent"))
        self.recovered = 0
        # Which record was the newest at which time (monotonic seconds): what gateways' clocks say is not believed.
        self._newest: deque[tuple[float, int]] = deque()
        self._over = 0  # what is open up to there is not over
        self.stranger: str | None = None
        self._silent: set[str] = set()

    async def run(self) -> None:
        """Work until cancelled; what fails is tried again in the next round."""
        swept = time.monotonic()
        await self._try("the file of checkpoints is not complete", self._complete_file)
        await self._try("it is not known what waits for a checkpoint", self._look_back)
        signed = swept - max(0.0, time.time() - self.signed_at)
        while True:
            await self._try("requests of killed gateways are not settled yet", self._recover)
            if self._reserved is not None:
                await self._try("the store has not heard of requests of killed gateways", self._reserved.tell)
            if time.monotonic() - signed >= self._settings.checkpoint:
                signed = time.monotonic()
                await self._try("there is no new checkpoint", self.sign)
                await self._try("checkpoints wait for the webhook", lambda: self.webhook.deliver(self.number))
            if time.monotonic() - swept >= min(SWEEP, self._settings.retention, self._settings.content_retention):
                swept = time.monotonic()
                await self._try("old audit rows stay for now", self.forget)
                await self._try("old prompts and answers stay for now", self.forget_content)
            await asyncio.sleep(min(ROUND, self._settings.checkpoint))

    async def _try(self, trouble: str, work: object) -> None:
        try:
            await work()  # type: ignore[operator]
        except (SQLAlchemyError, OSError, ValueError, ChainBroken, AnotherKey, httpx.HTTPError) as error:
            if trouble not in self._silent:
                log.error("%s: %s", trouble, reason(error))
            self._silent.add(trouble)
        except Exception:
            log.exception("%s", trouble)
        else:
            self._silent.discard(trouble)

    # -- checkpoints

    async def sign(self) -> None:
        """Sign what came since the last checkpoint. Raises ChainBroken, SQLAlchemyError, OSError."""
        await self._complete_file()
        older = await self._first_older()
        while await self._database.write(self._sign, None, older) is not None:
            await self._complete_file()
        self.signed_at = time.time()

    async def _look_back(self) -> None:
        """What an earlier control has not signed has waited since its last checkpoint, not since this one's start."""
        newest, waiting = await self._database.read(lambda connection: (seal.newest(connection), _unsigned(connection)))
        if newest is not None and waiting:
            self.signed_at = min(self.signed_at, newest.checkpoint.ts)

    async def forget(self) -> None:
        """Delete the records of checkpoints older than the retention: first it is signed that they go."""
        until = time.time() - self._settings.retention
        dropped = await self._database.read(due, until)
        if dropped:
            await self._drop(until, dropped, None)
        # By days: what is left is read anew each time.
        older = await self._left_older(until // DAY * DAY)
        await self._drop(until, None, older)

    async def _drop(self, until: float, dropped: dict[str, int] | None, older: Older | None) -> None:
        if dropped or older is not None:
            await self._database.write(self._sign, dropped, older)
            await self._complete_file()
        count = 1
        while count:
            count = await self._database.write(drop, until)
            await asyncio.sleep(BREATH)

    async def forget_content(self) -> None:
        """Delete prompts and answers older than their retention, or than that of records."""
        until = time.time() - min(self._settings.content_retention, self._settings.retention)
        count = 1
        while count:
            count = await self._database.write(drop_content, until)
            await asyncio.sleep(BREATH)

    async def _first_older(self) -> Older | None:
        """What is older than the chain as it is now, for the first checkpoint that says so; None for later ones."""
        newest = await self._database.read(seal.newest)
        if newest is not None and newest.checkpoint.older is not None:
            return None
        last = await self._database.read(seal.last_older)
        (root,) = await self._older_roots(last, 0.0)
        return Older(last, 0.0, root.count, root.root())

    async def _left_older(self, until: float) -> Older | None:
        """What is left of the records older than the chain without those before `until`; None where it is the same."""
        newest = await self._database.read(seal.newest)
        known = newest.checkpoint.older if newest is not None else None
        if known is None or until <= known.until or not await self._database.read(seal.has_older, known, until):
            return None
        was, left = await self._older_roots(known.last, known.until, until)
        if (was.count, was.root()) != (known.count, known.root):
            raise ChainBroken(
                "the records older than the chain are not those that were signed: `corral audit verify` says more"
            )
        return Older(known.last, until, left.count, left.root())

    async def _older_roots(self, last: int, *untils: float) -> list[OlderRoot]:
        """The roots of the records older than the chain from each of these times on, read page by page."""
        roots = [OlderRoot(until) for until in untils]
        after = 0
        while after < last and (rows := await self._database.read(seal.records, "", after, PAGE)):
            await asyncio.to_thread(_add, roots, rows)
            after = rows[-1]["pos"]
        return roots

    def _check_key(self, newest: Signed | None) -> None:
        """Raises AnotherKey where this key may not go on behind a checkpoint."""
        key = None if newest is None else newest.checkpoint.key
        self.stranger = None if key in (None, self.signer.id, self._settings.follows) else key
        if newest is None or self.stranger is None:
            return
        raise AnotherKey(
            f"checkpoint {newest.checkpoint.number} is signed by another key ({self.stranger}) than {self._key}: put "
            f"that key there, or, where it is lost, state audit.follows: {self.stranger}"
        )

    def _sign(self, connection: Connection, dropped: dict[str, int] | None, older: Older | None) -> Signed | None:
        last = seal.newest(connection)
        self._check_key(last)
        spans = [self._span(connection, *row, dropped) for row in _unsigned(connection)]
        if dropped:
            spans += [
                self._drop_alone(connection, stream, dropped) for stream in dropped if stream not in _names(spans)
            ]
        number, previous, before = 0, ZERO.hex(), None
        if last is not None:
            number, previous, before = last.checkpoint.number, last.digest(), last.checkpoint.older
        if older is not None and before is not None and older.until <= before.until:
            older = before  # another control has signed a later one meanwhile
        if not spans and (older is None or older == before):
            return None
        signed = self.signer.sign(number + 1, time.time(), previous, spans, older or before)
        checkpoint = signed.checkpoint
        row = {"number": checkpoint.number, "ts": checkpoint.ts, "line": signed.line().decode()}
        connection.execute(insert(audit_checkpoints).values(row))
        for span in spans:
            moved = {"signed": span.last, "signed_link": bytes.fromhex(span.link)}
            if span.dropped:
                moved["dropped"] = span.dropped
            connection.execute(update(audit_streams).where(audit_streams.c.stream == span.stream).values(moved))
        return signed

    def _span(
        self,
        connection: Connection,
        stream: str,
        pos: int,
        head: bytes,
        after: int,
        link: bytes,
        dropped: dict[str, int] | None,
    ) -> Span:
        last = min(pos, after + SPAN_MAX)
        leaves = select(audit.c.leaf).where(audit.c.gw == stream, audit.c.pos > after, audit.c.pos <= last)
        tree, count = Merkle(), 0
        for (leaf,) in connection.execute(leaves.order_by(audit.c.pos)):
            tree.add(leaf)
            link = link_after(link, leaf)
            count += 1
        if count != last - after or (last == pos and link != head):
            raise ChainBroken(
                f"the records of {stream} from {after + 1} to {last} are not those that were entered: "
                "`corral audit verify` says more"
            )
        drops = dropped.get(stream, 0) if dropped is not None else 0
        return Span(stream, after + 1, last, link.hex(), tree.root().hex(), drops)

    def _drop_alone(self, connection: Connection, stream: str, dropped: dict[str, int]) -> Span:
        head = connection.execute(select(audit_streams).where(audit_streams.c.stream == stream)).one()
        return Span(
            stream, head.signed + 1, head.signed, head.signed_link.hex(), Merkle().root().hex(), dropped[stream]
        )

    # -- the file

    async def _complete_file(self) -> None:
        """Write the checkpoints that the database has and the file lacks: another control may have signed, too, between
        any two looks, and a number that is passed over would be missing from then on."""
        before = await asyncio.to_thread(last_line, self.path)
        newest = await self._database.read(last_checkpoint)
        self.number = last = 0 if before is None else before.checkpoint.number
        if last > newest:
            raise ValueError(
                f"{self.path} has checkpoint {last}, the database {newest} at most: it is not the database that was "
                "signed (after a restore, put the file aside)"
            )
        while last < newest:
            lines = await self._database.read(lines_after, last, 100)
            checkpoints = [read_checkpoint(line) for line in lines]
            for one in checkpoints:
                last += 1
                self._check_next(before, one, last)
                before = one
            await asyncio.to_thread(self._append, checkpoints)

    def _check_next(self, before: Signed | None, one: Signed, number: int) -> None:
        """Raises ChainBroken for a checkpoint of the database that no control with this key entered."""
        mine = self.signer.id
        if one.checkpoint.key == mine:
            follows = signed_by(one, self.signer.public)
        else:
            follows = before is None or before.checkpoint.key != mine
        if one.checkpoint.number != number or not follows:
            raise ChainBroken(
                f"the database's checkpoint {number} is none that {self._key} signed behind the one before it: "
                "somebody put it there, or another control has another key"
            )

    def _append(self, checkpoints: list[Signed]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            # A line that a crash cut is written anew: it has no end.
            start, tail = _tail(file)
            file.seek(start + whole_lines(tail))
            file.truncate()
            file.write(b"".join(one.line() + b"\n" for one in checkpoints))
            file.flush()
            os.fsync(file.fileno())
        self.number = checkpoints[-1].checkpoint.number

    # -- requests that nobody settled

    async def note_shipped(self) -> None:
        """Write what gateways have shipped, as they said. Raises SQLAlchemyError."""
        if told := self._shipped():
            await self._database.write(progress.shipped, told)

    async def _recover(self) -> None:
        await self.note_shipped()
        while rows := await self._database.write(recovery.recover, time.time(), self._longest):
            self._settled(rows, "whose gateway was killed")
        ago, newest = await self._database.read(recovery.over, time.time(), self._longest)
        if (last := self._here(time.monotonic(), ago, newest)) > self._over:
            while rows := await self._database.write(recovery.overdue, time.time(), self._longest, self._over, last):
                self._settled(rows, "whose end is lost, though their gateway lives,")
            self._over = last

    def _settled(self, rows: recovery.Rows, which: str) -> None:
        self.recovered += len(rows)
        log.warning("%d requests %s are settled at their last progress", len(rows), which)
        if self._reserved is not None:
            self._reserved.ended(rows)

    def _here(self, now: float, ago: float, newest: int) -> int:
        """The number up to which records were here so many seconds ago, as far as this control knows; 0 for none."""
        notes = self._newest
        if not notes or now - notes[-1][0] >= self._longest / NOTES:
            notes.append((now, newest))
        while len(notes) > 1 and notes[1][0] <= now - ago:
            notes.popleft()
        return notes[0][1] if notes[0][0] <= now - ago else 0


def _add(roots: list[OlderRoot], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for root in roots:
            root.add(row)


def whole_lines(data: bytes) -> int:
    """The length of what ends with a line end."""
    return data.rfind(b"\n") + 1


def _tail(file: BinaryIO) -> tuple[int, bytes]:
    """The end of a file that grows for years, with one whole line at least where it has one, and where that begins."""
    size, length = file.seek(0, os.SEEK_END), TAIL
    while True:
        start = max(0, size - length)
        file.seek(start)
        data = file.read()
        # The first line end may be that of a line that began before.
        if start == 0 or data.count(b"\n") > 1:
            return start, data
        length *= 2


def last_line(path: Path) -> Signed | None:
    """The last checkpoint of a file, None where there is none. Raises ValueError where it is damaged."""
    try:
        with path.open("rb") as file:
            _, data = _tail(file)
    except FileNotFoundError:
        return None
    lines = data[: whole_lines(data)].splitlines()
    return read_checkpoint(lines[-1]) if lines else None


def _unsigned(connection: Connection) -> list[tuple[str, int, bytes, int, bytes]]:
    heads = audit_streams.c
    waiting = select(heads.stream, heads.pos, heads.link, heads.signed, heads.signed_link).where(
        heads.pos > heads.signed, heads.stream != ""
    )
    return [(row[0], row[1], row[2], row[3], row[4]) for row in connection.execute(waiting.order_by(heads.stream))]


def _names(spans: list[Span]) -> set[str]:
    return {span.stream for span in spans}
