"""A model that is gone from its node's disk, and not from its memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
from support.servers import valkey
from support.slots import gateways

from corral.control.ollama import Ollama
from corral.control.placement import Placement
from corral.control.prober import Member
from corral.store.slots import Wanted


def test_a_model_that_was_removed_is_used_no_more_though_it_is_in_memory(tmp_path: Path) -> None:
    """As after `ollama rm` at a node: `/api/ps` goes on showing it, and who asks for it hears 404. Another has it."""

    async def work(url: str) -> None:
        async with gateways(url, 1) as (gateway,), httpx.AsyncClient() as client:
            members = [Member(name, "http://127.0.0.1:9", up=True, tags=[{"name": "r:latest"}]) for name in "xy"]
            members[0].ps = [{"name": "r:latest"}]
            node = lambda member: Ollama(client, member.url)  # noqa: E731
            placement = Placement(gateway.store, node, lambda model: {}, term=1)
            try:
                await placement.tick(members, time.monotonic())
                assert (await gateway.ask(Wanted("r1", "r:latest")))[0].node == "x"
                members[0].tags = []
                await placement.tick(members, time.monotonic())
                answer, _ = await gateway.ask(Wanted("r2", "r:latest"))
                assert (answer.node, answer.position) == ("", 1)
                async with asyncio.timeout(60):
                    while not any("load on y" in text for _, text in placement.why("r:latest")):
                        await placement.tick(members, time.monotonic())
            finally:
                await placement.close()

    with valkey(tmp_path) as store:
        asyncio.run(work(store.url))
