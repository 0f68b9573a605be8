"""Usage by day, tenant, key and model: added up in the transaction that completes the audit rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, select

from corral.store.database import insert
from corral.store.tables import usage

BY = ("day", "tenant", "key", "model")
COUNTS = (
    *("requests", "refused", "failed", "estimated", "prompt_tokens", "tokens"),
    *("queue_seconds", "node_seconds"),
)
REFUSED = frozenset({"refused", "limited"})
FAILED = frozenset({"upstream_error", "timeout", "overloaded", "interrupted"})
"""Outcomes that are not the caller's doing. One who left (client_gone) or was cancelled is neither refused
nor failed."""

LAST = 253402300799.0  # of the year 9999: a clock may be wrong by anything


def day_of(ts: float) -> str:
    """The day (UTC) of epoch seconds."""
    return time.strftime("%Y-%m-%d", time.gmtime(min(max(ts, 0.0), LAST)))


def add(connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Count audit rows of requests that have just been completed. Call it once for each, in that transaction."""
    sums: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        outcome, queue, whole = row["outcome"], row["queue_ms"] or 0.0, row["ms"] or 0.0
        place = day_of(row["ts"]), row["tenant"] or "", row["key"] or "", row["model"] or ""
        so_far = sums.setdefault(place, [0, 0, 0, 0, 0, 0, 0.0, 0.0])
        so_far[0] += 1
        so_far[1] += outcome in REFUSED
        so_far[2] += outcome in FAILED
        so_far[3] += bool(row["estimated"])
        so_far[4] += row["prompt_tokens"] or 0
        so_far[5] += row["tokens"] or 0
        so_far[6] += queue / 1e3
        so_far[7] += max(0.0, whole - queue) / 1e3 if row["attempts"] else 0.0
    if not sums:
        return
    statement = insert(connection, usage)
    more = {name: usage.c[name] + statement.excluded[name] for name in COUNTS}
    fresh = [dict(zip((*BY, *COUNTS), (*place, *counts), strict=True)) for place, counts in sorted(sums.items())]
    connection.execute(statement.on_conflict_do_update(index_elements=list(BY), set_=more), fresh)


def report(
    connection: Connection,
    since: float,
    until: float,
    by: Sequence[str] = BY,
    **only: str | Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Sums by the columns of `by` of the days from that of `since` to that of `until` (epoch seconds, both included).

    `only`: of one tenant, key or model, or of several.
    """
    columns = [usage.c[name] for name in by]
    sums = [func.sum(usage.c[name]).label(name) for name in COUNTS]
    wanted = [usage.c.day >= day_of(since), usage.c.day <= day_of(until)]
    wanted += [
        usage.c[name].in_([value] if isinstance(value, str) else value)
        for name, value in only.items()
        if value is not None
    ]
    statement = select(*columns, *sums).where(*wanted).group_by(*columns).order_by(*columns)
    found = [dict(row) for row in connection.execute(statement).mappings()]
    # PostgreSQL sums bigint as numeric.
    return [
        {name: row[name] if name in BY or name.endswith("seconds") else int(row[name]) for name in row} for row in found
    ]


def priced(
    rows: Sequence[Mapping[str, Any]], by: Sequence[str], price: Callable[[str], tuple[float, float]] | None
) -> list[dict[str, Any]]:
    """The rows of a report, summed by `by` alone, with their cost.

    `price` gives a model's price of a million tokens, of prompts and generated; without it there are no costs.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        place = tuple(row[name] for name in by)
        so_far = found.setdefault(place, {**dict(zip(by, place, strict=True)), **dict.fromkeys(COUNTS, 0)})
        for name in COUNTS:
            so_far[name] += row[name]
        if price is not None:
            prompt, generated = price(row["model"])
            cost = (row["prompt_tokens"] * prompt + row["tokens"] * generated) / 1e6
            so_far["cost"] = so_far.get("cost", 0.0) + cost
    return list(found.values())
