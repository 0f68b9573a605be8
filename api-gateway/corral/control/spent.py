"""The tokens that keys and tenants have used in this day and month (UTC), by the records.

A gateway asks when it starts (`corral.gateway.recall`): the store of limits may have lost what it knew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from corral.store.budget import DAY, TENANT, month_of
from corral.store.database import Database
from corral.store.tables import audit

FRESH = 0.5
"""For so many seconds this day's sums are taken for the present ones."""
SETTLED = 600.0
"""And those of days that are over: what is added to them came late."""
PATIENCE = 0.5
"""How long an answer waits for sums that are still being read (seconds)."""

log = logging.getLogger(__name__)


class Spent:
    """Sums by day, read when they are asked for. ``clock`` is epoch seconds."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock
        self._days: dict[int, tuple[float, Counter[str]]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def told(self) -> dict[str, Any]:
        """`day` and `month` as the store counts them, `used`: [tokens of the day, of the month] by the store's name of
        a key or tenant, and whether that is `complete`. A month's sum is less than the truth while it is not."""
        today = int(self._clock() // DAY)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(today))
        await asyncio.wait({self._reading}, timeout=PATIENCE)
        days = _days_of_month(today)
        of_day = self._days.get(today, (0.0, Counter[str]()))[1]
        of_month: Counter[str] = Counter()
        for day in days:
            of_month.update(self._days.get(day, (0.0, {}))[1])
        complete = self._reading.done() and all(day in self._days for day in days)
        used = {name: [of_day[name], tokens] for name, tokens in of_month.items()}
        return {"day": today, "month": month_of(today * DAY), "used": used, "complete": complete}

    def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, today: int) -> None:
        days = _days_of_month(today)
        self._days = {day: known for day, known in self._days.items() if day in days}
        # This day first: it has the budgets that end soonest.
        for day in reversed(days):
            at, _ = self._days.get(day, (-SETTLED, None))
            now = time.monotonic()
            if now - at < (FRESH if day == today else SETTLED):
                continue
            try:
                self._days[day] = now, await self._database.read(_sums, day * DAY, (day + 1) * DAY)
            except SQLAlchemyError as error:
                log.warning("what was used of budgets cannot be read: %s", error)
                self._days.pop(day, None)
                return


def _days_of_month(today: int) -> range:
    return range(today - datetime.fromtimestamp(today * DAY, UTC).day + 1, today + 1)


def _sums(connection: Connection, since: float, until: float) -> Counter[str]:
    column = audit.c
    tokens = func.sum(func.coalesce(column.prompt_tokens, 0) + func.coalesce(column.tokens, 0))
    within = (column.ts >= since) & (column.ts < until)
    sums: Counter[str] = Counter()
    for key, tenant, used in connection.execute(
        select(column.key, column.tenant, tokens).where(within).group_by(column.key, column.tenant)
    ):
        if key and used:
            sums[key] += int(used)
            if tenant is not None:
                sums[TENANT + tenant] += int(used)
    return sums
