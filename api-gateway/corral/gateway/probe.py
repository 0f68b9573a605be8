"""What a gateway finds out of nodes by itself while control says nothing.

Control's word on a node holds for six seconds. From then on each node but those that are drained is asked each second
what it has in memory, on the way that requests take. One that answers twice in a row may have work, whatever control
said last; one that HAProxy does not reach, twice in a row, gets none. If these are more than half of the nodes, it may
be this gateway's own way that is broken: those that had work keep it. What answers late, or nonsense, says nothing:
such a node is known by its streams (`corral.gateway.health`). As soon as control is heard again, its word counts.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any, Final

import httpx

from corral.config.haproxy_rules import PROXY_HEADER
from corral.fleet.catalogue import is_own
from corral.fleet.node import Node, NodeState
from corral.gateway.snapshot import Snapshot
from corral.store import answers
from corral.store.asking import http_client

EVERY: Final = 1.0
PATIENCE: Final = 2.0
"""Seconds that a node may take to answer."""
TIMES: Final = 2
"""How often in a row it must have been seen that a node is there, or is not: HAProxy's `rise` and `fall`."""

Found = list[dict[str, Any]] | bool | None
"""What is in a node's memory; False where it is away, None where neither can be said."""

log = logging.getLogger(__name__)


class Probe:
    """Keeps the states of a snapshot's nodes current while control is away. ``nodes_url`` is HAProxy's front end."""

    def __init__(self, snapshot: Snapshot, nodes_url: str) -> None:
        self._snapshot = snapshot
        self._url = f"{nodes_url}/api/ps"
        # How often in a row a node was there, or (negative) was not.
        self._seen: dict[str, int] = {}

    async def run(self) -> None:
        """Look each second, until cancelled."""
        async with http_client(PATIENCE, verify=False) as client:
            while True:
                await asyncio.sleep(EVERY)
                try:
                    await self.look(client)
                except Exception:  # a fault of ours: what control said last holds on
                    log.exception("the nodes were not asked")

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask each node once, if control has said nothing for too long."""
        if self._snapshot.led(monotonic()):
            self._seen.clear()
            return
        nodes = [node for node in self._snapshot.nodes.values() if node.state is not NodeState.DRAINING]
        found = await asyncio.gather(*[self._ask(client, node) for node in nodes])
        # What control says has come meanwhile, and is of nodes that may be others.
        if not self._snapshot.led(monotonic()):
            self._take(dict(zip([node.name for node in nodes], found, strict=True)))

    async def _ask(self, client: httpx.AsyncClient, node: Node) -> Found:
        headers = {"X-Corral-Node": node.name, "Accept-Encoding": "identity"}
        try:
            async with asyncio.timeout(PATIENCE), client.stream("GET", self._url, headers=headers) as response:
                if response.status_code in (502, 503) and PROXY_HEADER in response.headers:
                    return False
                found = answers.models(await answers.whole(response)) if response.status_code == 200 else None
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        return None if found is None else [model for model in found if not is_own(model["name"])]

    def _take(self, told: dict[str, Found]) -> None:
        """Judge nodes by their answers, by name."""
        nodes = self._snapshot.nodes
        for name, found in told.items():
            seen = self._seen.get(name, 0)
            if found is None:
                self._seen[name] = 0
            else:
                self._seen[name] = min(seen, 0) - 1 if found is False else max(seen, 0) + 1
        away = [name for name in told if self._seen[name] <= -TIMES]
        believed = 2 * len(away) <= len(told)
        changed = False
        for name, found in told.items():
            node = nodes[name]
            state = node.state
            if self._seen[name] >= TIMES:
                state = NodeState.READY
            elif name in away and believed:
                state = NodeState.DOWN
            if isinstance(found, list):
                changed |= node.holds(found)
            if state is not node.state:
                log.warning("%s: control says nothing, and the node %s", name, SAYS[state])
                node.state = state
                changed = True
        if changed:
            self._snapshot.judged()


SAYS: Final = {NodeState.READY: "answers: it gets work", NodeState.DOWN: "is away: it gets none"}
