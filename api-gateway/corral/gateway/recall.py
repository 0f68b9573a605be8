"""Learns from control what keys and tenants used before this gateway started, so that no budget begins anew with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import hiredis
import httpx

from corral.gateway.snapshot import Snapshot
from corral.store import leases
from corral.store.asking import http_client
from corral.store.limits import Limits
from corral.store.valkey import ValkeyDown

FIRST = 5.0
"""How long a start waits for a control that is slow (seconds); one that is away is not waited for."""
AGAIN = 2.0
LATE = 20.0
"""For how long records of before are still shipped (seconds), this gateway's own and those of others that ended."""

log = logging.getLogger(__name__)


class Recall:
    """Asks control for what the records say was used, and raises what is known of the budgets, never lowers it."""

    def __init__(self, snapshot: Snapshot, limits: Limits, control_url: str, token: str) -> None:
        self._snapshot, self._limits = snapshot, limits
        self._url = f"{control_url}/internal/spent"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._done = False

    async def first(self) -> None:
        """Ask once. Where control is away or says nothing of use, the gateway starts all the same."""
        try:
            async with asyncio.timeout(FIRST):
                told = await self._ask()
                if told is None:
                    return
                while not self._snapshot.version:  # noqa: ASYNC110 (it is on its way: control answers)
                    await asyncio.sleep(0.01)
                await self._take(told)
        except TimeoutError:
            log.warning("control does not say in time what was used of budgets")
        except Exception:  # a fault of ours, or an answer of another kind
            log.exception("what was used of budgets is not known")

    async def again(self) -> None:
        """Ask again until control has told everything and late records have arrived.

        What the store still is to hear of requests is in the records too: then it is asked later.
        """
        began, silent = time.monotonic(), False
        while not self._done or time.monotonic() - began < LATE:
            await asyncio.sleep(AGAIN)
            store, limits = self._limits.store, self._limits
            if self._done and (store is None or not store.connected or limits.owes()):
                continue
            try:
                told = await self._ask()
                if told is not None:
                    await self._take(told)
            except Exception:
                if not silent:
                    log.exception("what was used of budgets is not known")
                silent = True

    async def _ask(self) -> dict[str, Any] | None:
        try:
            # Reading the certificates of all authorities takes a tenth of a second, in which nobody is served.
            async with http_client(FIRST, verify=self._url.startswith("https:")) as client:
                answer = await client.get(self._url, headers=self._headers)
            return dict(answer.json()) if answer.status_code == 200 else None
        except (httpx.HTTPError, OSError, ValueError):
            return None

    async def _take(self, told: dict[str, Any]) -> None:
        self._done = bool(told["complete"]) and bool(self._snapshot.version)
        raised = [
            scope
            for name, (of_day, of_month) in told["used"].items()
            if (scope := self._snapshot.budget(name)) is not None
            and scope.recall(told["day"], of_day, told["month"], of_month)
        ]
        store = self._limits.store
        if raised and store is not None and store.connected:
            with contextlib.suppress(ValkeyDown, hiredis.ReplyError):
                await leases.tell(self._limits, raised)
