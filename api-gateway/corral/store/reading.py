"""Long prompts that runners read: what each gateway tells the others of its own, through the store.

While a runner reads one it may give nobody a token, as llama.cpp computes prompts and answers in one batch. A gateway
whose own requests there are short would take it for one that hangs (`corral.fleet.hanging`).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any, Final
from urllib.parse import quote, unquote

import hiredis

from corral.store.lua import PREFIX, script, sha
from corral.store.valkey import Valkey, ValkeyDown

EVERY: Final = 0.5
LASTS: Final = 2.0
"""For so long (seconds) a word holds that is not said again."""
MOST: Final = 1000
"""Of so many runners a gateway tells at most."""
TEXT: Final = script("reading", metered=False)
_TEXT: Final = sha(TEXT)

Runner = tuple[str, str]
"""The names of a node and of a model."""

log = logging.getLogger(__name__)


class Reading:
    """``own``: of each runner that reads long prompts of this gateway for how many seconds it may be silent for the
    longest of them, and when it last gave this gateway a token (monotonic seconds; 0: never)."""

    def __init__(self) -> None:
        self.own: dict[Runner, tuple[float, float]] = {}
        self._others: dict[Runner, tuple[float, float]] = {}
        self._heard = -math.inf

    def others(self, now: float) -> Mapping[Runner, tuple[float, float]]:
        """The same of all other gateways together, as far as is known at that time (monotonic seconds)."""
        return self._others if now - self._heard <= LASTS else {}

    def said(self, now: float) -> bytes:
        """What this gateway says of its own: a line of each runner."""
        lines = [
            f"{quote(node, '')} {quote(model, '')} {need:.3f} {now - token if token else -1.0:.3f}"
            for (node, model), (need, token) in list(self.own.items())[:MOST]
        ]
        return "\n".join(lines).encode()

    def heard(self, words: Iterable[tuple[float, bytes]], now: float) -> None:
        """What others said, each so many seconds ago. A line that is none says nothing."""
        others: dict[Runner, tuple[float, float]] = {}
        for ago, word in words:
            for line in word.decode("ascii", "replace").split("\n"):
                try:
                    node, model, need, age = line.split(" ")
                    silent, since = float(need), float(age)
                except ValueError:
                    continue
                if not (math.isfinite(silent) and math.isfinite(since)):
                    continue
                runner = unquote(node), unquote(model)
                known = others.get(runner, (0.0, 0.0))
                token = now - ago - since if since >= 0.0 else 0.0
                others[runner] = max(known[0], silent), max(known[1], token)
        self._others, self._heard = others, now


async def keep(reading: Reading, store: Valkey, gateway: str) -> None:
    """Tell and hear each half second, until cancelled. While the store is away each gateway judges by its own."""
    name, lasts = gateway.encode(), b"%d" % (LASTS * 1e3)
    while True:
        await asyncio.sleep(EVERY)
        if not store.connected:
            continue
        try:
            now = monotonic()
            reply: list[Any] = await store.request(b"EVALSHA", _TEXT, b"0", PREFIX, name, reading.said(now), lasts)
            reading.heard(((int(ago) / 1e6, word) for ago, word in zip(reply[::2], reply[1::2], strict=True)), now)
        except (OSError, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("what others read is not known: %s", error)
        except Exception:  # a fault of ours, or a store of another kind: requests go on
            log.exception("what others read is not known")
