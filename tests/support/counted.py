"""Slots as the store counts them, beside what nodes really run: looked at again and again while a gateway is hurt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import hiredis
import httpx

from corral.store.lua import PREFIX
from corral.store.valkey import encode
from support.fleet import MODEL, Fleet

_HELD = b"""
local used, held = 0, {}
for _, count in ipairs(redis.call('HVALS', ARGV[1] .. 'used:' .. ARGV[2])) do used = used + tonumber(count) end
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. 'held:*')) do
  local flat = redis.call('HGETALL', key)
  for at = 1, #flat, 2 do
    if string.sub(flat[at + 1], 1, #ARGV[2] + 3) == 'g ' .. ARGV[2] .. ' ' then
      for _, word in ipairs({ string.sub(key, #ARGV[1] + 6), flat[at], flat[at + 1] }) do held[#held + 1] = word end
    end
  end
end
return { used, held }
"""

Held = dict[tuple[str, str], str]
"""(Gateway, request) -> the node where it has a slot."""


class Counted:
    """What a fleet's store counts for a model, and what its nodes run of it.

    ``slots`` are each node's; no request may run for less than ``shortest`` seconds. ``wrong`` has what did not fit, of
    ``looks``, and by how many slots.
    """

    def __init__(self, fleet: Fleet, slots: int, shortest: float, model: str = MODEL) -> None:
        self.looks = 0
        self.wrong: list[tuple[int, str]] = []
        self._fleet, self._slots, self._shortest, self._model = fleet, slots, shortest, model

    def __enter__(self) -> Self:
        self._store = self._fleet.valkey_client()
        self._client = httpx.Client(timeout=60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._store.close()
        self._client.close()

    def look(self) -> Counter[str]:
        """How many slots each gateway holds."""
        began, before = time.monotonic(), self._held()
        running, after = self._running(), self._held()
        self.looks += 1
        if time.monotonic() - began < self._shortest:
            # Who runs had a slot before or has one now. One that ends may be counted for a moment more.
            had = Counter((before | after).values())
            self._note((n - had[node], f"{node} runs {n} with {had[node]} slots") for node, n in running.items())
        given = Counter(after.values())
        self._note((n - self._slots, f"{node}: {n} slots are given, {given}") for node, n in given.items())
        self._note((n - self._slots, f"{node} runs {n}") for node, n in running.items())
        return Counter(gateway for gateway, _ in after)

    def exact(self, gateway: str) -> bool:
        """Whether the nodes run what this one holds, and nothing else, at a moment at which nothing changes."""
        before, running, after = self._held(), self._running(), self._held()
        return before == after and running == Counter(node for (holder, _), node in after.items() if holder == gateway)

    def _held(self) -> Held:
        used, flat = self._ask(b"EVAL", _HELD, b"0", PREFIX, self._model.encode())
        words = [word.decode() for word in flat]
        held = {(words[at], words[at + 1]): words[at + 2].split(" ")[3] for at in range(0, len(words), 3)}
        if used != len(held):
            self.wrong.append((2 * self._slots, f"{used} slots are counted, {len(held)} held"))
        return held

    def _note(self, found: Iterable[tuple[int, str]]) -> None:
        self.wrong += [(by, what) for by, what in found if by > 0]

    def _running(self) -> Counter[str]:
        """Requests that run, by node."""
        found: Counter[str] = Counter()
        for name, node in self._fleet.nodes.items():
            told = self._client.get(node.url + "/simulated/work").json()["models"].get(self._model)
            found[name] = told["running"] if told else 0
        return found

    def _ask(self, *parts: bytes) -> Any:
        reader = hiredis.Reader()
        self._store.sendall(encode(*parts))
        while (reply := reader.gets()) is False:
            reader.feed(self._store.recv(65536))
        return reply
