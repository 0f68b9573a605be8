"""Tells the store of limits what requests used whose gateway was killed: their tokens were reserved by a guess.

A gateway settles that when a request ends; of one that was killed control settles the record (`corral.store.recovery`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hiredis

from corral.store.budget import Budget, of_key, of_tenant
from corral.store.valkey import Valkey, ValkeyDown

OWED_MAX = 100_000
"""More than these are not told of: what they reserved counts until its day and month end."""
AT_ONCE = 500

log = logging.getLogger(__name__)

Limited = Callable[[str], tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]


class Reserved:
    """Requests that the store is still to hear of. `limited` finds a key and its tenant (`Hub.limited`), `defaults` are
    the limits of a key that has none."""

    def __init__(self, store: Valkey, limited: Limited, defaults: Mapping[str, int | None]) -> None:
        self._store, self._limited, self._defaults = store, limited, defaults
        self._owed: deque[tuple[str, str, int]] = deque(maxlen=OWED_MAX)

    def ended(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Note records that have just been completed."""
        self._owed += [
            (row["key"], row["id"], (row["prompt_tokens"] or 0) + (row["tokens"] or 0)) for row in rows if row["key"]
        ]

    async def tell(self) -> None:
        """Tell the store; what it does not hear, as while it is away, it is told the next time."""
        while self._owed:
            some = [self._owed[place] for place in range(min(AT_ONCE, len(self._owed)))]
            told: dict[str, list[bytes]] = {}
            for key, request, used in some:
                # That the store was heard to reserve just as much: what it knows nothing of changes nothing.
                told.setdefault(key, []).extend((request.encode(), b"%d" % used, b"%d" % used))
            try:
                for key, words in told.items():
                    budget = self._budget(key)
                    if budget is not None and not await self._store.request(*budget.ending, *words):
                        return  # it has lost what it knew, and is told that first
            except (ValkeyDown, hiredis.HiredisError) as error:
                log.warning("the store has not heard of requests of killed gateways: %s", error)
                if isinstance(error, hiredis.ReplyError):
                    self._store.reset()  # a replica now, say
                return
            for _ in some:
                self._owed.popleft()

    def _budget(self, key: str) -> Budget | None:
        entry, tenant = self._limited(key)
        if entry is None:
            return None
        budget = of_key(entry, self._defaults, of_tenant(tenant) if tenant is not None else None)
        return budget if budget.metered else None
