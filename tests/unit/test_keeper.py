"""The keeper of slots leaves the loop to others, whatever the store does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from support.process import heeded

from corral.store import keeper


def test_slots_that_lapse_without_the_store_are_no_reason_to_stand_still() -> None:
    slots: Any = SimpleNamespace(store=SimpleNamespace(connected=False), lease=10.0, on_lost=None)

    async def run() -> None:
        task = asyncio.ensure_future(keeper.keep(slots))
        await asyncio.sleep(0)
        slots.on_lost()
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    with heeded(20):
        asyncio.run(run())
