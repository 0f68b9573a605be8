"""What the leader reads of slots and tickets in the store, to decide which model stands where."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.store.budget import PREFIX
from corral.store.slots import KINDS
from corral.store.valkey import Valkey

TERM_BITS = 24


@dataclass(slots=True)
class Seen:
    """Of a model: requests that have asked for it so far, those that wait, slots in use by node, places as the store
    has them by node (state, generation)."""

    asked: int = 0
    waiting: int = 0
    used: dict[str, int] = field(default_factory=dict)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)


async def read(store: Valkey, models: Iterable[str]) -> dict[str, Seen]:
    """What the store has of these models, and of all others that were asked for.

    Raises:
        ValkeyDown, hiredis.ReplyError: the store did not say.
    """
    counts = _pairs(await store.request(b"HGETALL", PREFIX + b"asked"))
    names = sorted({*models, *counts})
    found = await asyncio.gather(*(_model(store, name.encode()) for name in names))
    for name, seen in zip(names, found, strict=True):
        seen.asked = int(counts.get(name, b"0"))
    return dict(zip(names, found, strict=True))


async def order(
    store: Valkey, tickets: Mapping[tuple[str, str], str]
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Of tickets (gateway and id, with the model that they wait for): the position of each that waits in the store, and
    the slots of each model there.

    Raises:
        ValkeyDown, hiredis.ReplyError: the store did not say.
    """
    positions: dict[tuple[str, str], int] = {}
    slots: dict[str, int] = {}
    for model in set(tickets.values()):
        name = model.encode()
        keys = (PREFIX + b"wait:" + name + b":%d" % kind for kind in range(KINDS))
        total, *queues = await asyncio.gather(
            store.request(b"GET", PREFIX + b"total:" + name),
            *(store.request(b"ZRANGE", key, b"0", b"-1", b"WITHSCORES") for key in keys),
        )
        slots[model] = int(total or 0)
        waiting = sorted(
            (float(score), member) for flat in queues for member, score in zip(flat[::2], flat[1::2], strict=True)
        )
        for at, (_, member) in enumerate(waiting):
            gateway, _, id = member.decode().partition(" ")
            if (gateway, id) in tickets:
                positions[gateway, id] = at + 1
    return positions, slots


async def generation(store: Valkey, term: int) -> int:
    """What a change of a place carries: greater than every one before it, of this leader's term and of earlier ones."""
    return (term << TERM_BITS) + int(await store.request(b"INCR", PREFIX + b"generation:%d" % term))


async def _model(store: Valkey, name: bytes) -> Seen:
    kinds = (PREFIX + b"wait:" + name + b":%d" % kind for kind in range(KINDS))
    used, places, *waiting = await asyncio.gather(
        store.request(b"HGETALL", PREFIX + b"used:" + name),
        store.request(b"HGETALL", PREFIX + b"places:" + name),
        *(store.request(b"ZCARD", key) for key in kinds),
    )
    seen = Seen(waiting=sum(int(count) for count in waiting))
    seen.used = {node: int(count) for node, count in _pairs(used).items()}
    for node, text in _pairs(places).items():
        state, number, *_ = text.split(b" ")
        seen.places[node] = state.decode(), int(number)
    return seen


def _pairs(flat: list[Any]) -> dict[str, bytes]:
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
