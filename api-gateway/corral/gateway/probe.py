"""What a gateway finds out of nodes by itself while control says nothing.

Control's word on a node holds for six seconds. From then on each node but those that are drained is asked each second
what it has in memory, on the way that requests take. One that answers may have work, whatever control said last; one
that does not, twice in a row, gets none. If these are more than half of the nodes, it may be this gateway's own way
that is broken: those that had work keep it. As soon as control is heard again, its word counts.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any, Final

import httpx
import msgspec

from corral.fleet.node import Node, NodeState
from corral.gateway.health import HEARD
from corral.gateway.snapshot import Snapshot
from corral.store.asking import http_client

EVERY: Final = 1.0
PATIENCE: Final = 3.0
"""Seconds that a node may take to answer."""
MISSES: Final = 2
"""Answers in a row that a node must have missed: HAProxy's `fall`."""

log = logging.getLogger(__name__)


class Probe:
    """Keeps the states of a snapshot's nodes current while control is away. ``nodes_url`` is HAProxy's front end."""

    def __init__(self, snapshot: Snapshot, nodes_url: str) -> None:
        self._snapshot = snapshot
        self._url = f"{nodes_url}/api/ps"
        self._missed: dict[str, int] = {}

    async def run(self) -> None:
        """Look each second, until cancelled."""
        async with http_client(PATIENCE, verify=False) as client:
            while True:
                try:
                    await self.look(client)
                except Exception:  # a fault of ours: what control said last holds on
                    log.exception("the nodes were not asked")
                await asyncio.sleep(EVERY)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask each node once, if control has said nothing for too long."""
        if self._led():
            self._missed.clear()
            return
        nodes = [node for node in self._snapshot.nodes.values() if node.state is not NodeState.DRAINING]
        answers = await asyncio.gather(*[self._ask(client, node) for node in nodes])
        # What control says has come meanwhile, and is of nodes that may be others.
        if not self._led():
            self._take(dict(zip([node.name for node in nodes], answers, strict=True)))

    def _led(self) -> bool:
        return monotonic() - self._snapshot.heard <= HEARD

    async def _ask(self, client: httpx.AsyncClient, node: Node) -> list[dict[str, Any]] | None:
        """What is in a node's memory, as it says it; None where it does not."""
        try:
            async with asyncio.timeout(PATIENCE):
                response = await client.get(self._url, headers={"X-Corral-Node": node.name})
            if response.status_code == 200:
                models = msgspec.json.decode(response.content, type=_Resident).models
                return models if all(isinstance(model.get("name"), str) for model in models) else None
        except (httpx.HTTPError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        return None

    def _take(self, answers: dict[str, list[dict[str, Any]] | None]) -> None:
        """Judge nodes by their answers, by name."""
        nodes = self._snapshot.nodes
        for name, found in answers.items():
            self._missed[name] = 0 if found is not None else self._missed.get(name, 0) + 1
        silent = [name for name in answers if self._missed[name] >= MISSES]
        believed = 2 * len(silent) <= len(answers)
        changed = False
        for name, found in answers.items():
            node = nodes[name]
            state = node.state
            if found is not None:
                state = NodeState.READY
                changed |= node.holds(found)
            elif name in silent and believed:
                state = NodeState.DOWN
            if state is not node.state:
                log.warning("%s: control says nothing, and the node %s", name, SAYS[state])
                node.state = state
                changed = True
        if changed:
            self._snapshot.judged()


class _Resident(msgspec.Struct):
    models: list[dict[str, Any]] = []


SAYS: Final = {NodeState.READY: "answers: it gets work", NodeState.DOWN: "does not answer: it gets none"}
