"""Which loads are under way, told from one control to the others: gateways hear of all of them from theirs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

import hiredis
import msgspec

from corral.control.prober import Fleet
from corral.store.lua import PREFIX
from corral.store.valkey import Valkey, ValkeyDown

LOOK = 0.5
KEY = PREFIX + b"loading"
"""By control: a number that grows while it loads, and of each node the models with the seconds that they excuse."""
SILENT = 3.0
"""For so long the word of a control that says nothing new holds (seconds)."""
KEPT_MS = 600_000

Told = tuple[int, dict[str, dict[str, float]]]

log = logging.getLogger(__name__)


class Loads:
    """Tells this control's loads, and puts those of others down in the nodes' ``measured.elsewhere``."""

    def __init__(self, store: Valkey, fleet: Fleet) -> None:
        self._store, self._fleet = store, fleet
        self._name = secrets.token_hex(8).encode()
        self._beat = 0
        self._told = False
        self._heard: dict[bytes, tuple[bytes, float]] = {}
        self._since: dict[tuple[bytes, str, str], float] = {}

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        while True:
            try:
                if self._store.connected:
                    await self.turn(time.monotonic())
                else:
                    self._put({})
            except (ValkeyDown, hiredis.HiredisError) as error:
                log.debug("what other controls load is not known: %s", error)
                self._put({})
            await asyncio.sleep(LOOK)

    async def turn(self, now: float) -> None:
        """Tell and hear once; ``now`` is monotonic seconds.

        Raises:
            ValkeyDown, hiredis.HiredisError: the store did not take or say it.
        """
        mine = {name: one.measured.begun for name, one in self._fleet.members.items() if one.measured.begun}
        if mine:
            self._beat += 1
            self._told = True
            await self._store.request(b"HSET", KEY, self._name, msgspec.json.encode((self._beat, mine)))
            await self._store.request(b"PEXPIRE", KEY, b"%d" % KEPT_MS)
        elif self._told:
            await self._store.request(b"HDEL", KEY, self._name)
            self._told = False
        flat = await self._store.request(b"HGETALL", KEY)
        self.hear(dict(zip(flat[::2], flat[1::2], strict=True)), now)

    def hear(self, said: dict[bytes, bytes], now: float) -> None:
        """What the controls said, by name. A load excuses nothing for longer than it says, should it hang."""
        self._heard = {
            name: known if (known := self._heard.get(name)) is not None and known[0] == text else (text, now)
            for name, text in said.items()
            if name != self._name
        }
        since: dict[tuple[bytes, str, str], float] = {}
        found: dict[str, dict[str, float]] = {}
        for name, (text, at) in self._heard.items():
            if now - at > SILENT:
                continue
            for node, models in _decoded(text).items():
                for model, seconds in models.items():
                    load = name, node, model
                    since[load] = self._since.get(load, now)
                    if now - since[load] <= seconds:
                        found.setdefault(node, {})[model] = seconds
        self._since = since
        self._put(found)

    def _put(self, found: dict[str, dict[str, float]]) -> None:
        for name, member in self._fleet.members.items():
            member.measured.elsewhere = found.get(name, {})


def _decoded(text: bytes) -> dict[str, dict[str, float]]:
    try:
        told: Told = msgspec.json.decode(text, type=Told)
    except msgspec.DecodeError:
        return {}  # of a control that is newer
    return told[1]
