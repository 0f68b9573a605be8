"""Which models are in memory: loading one at a time, sharing, keep_alive, eviction. As Ollama's scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from corral.node import clock
from corral.node.errors import NodeError
from corral.node.models import Model
from corral.node.options import Options
from corral.node.runners import Factory, Runner

KEEP_ALIVE = 300.0
MAX_QUEUE = 512
_BUSY = "server busy, please try again.  maximum pending requests exceeded"


@dataclass(slots=True)
class Loaded:
    """A model in memory and who uses it. ``session`` is its keep_alive in seconds."""

    model: Model
    options: Options
    runner: Runner
    session: float
    slots: asyncio.Semaphore
    uses: int = 0
    last_use: int = 0
    expires: str = ""
    ready: bool = False
    evicted: bool = False
    timer: asyncio.TimerHandle | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def context(self) -> int:
        return self.options.num_ctx


class Scheduler:
    """Runners by model. ``parallel`` requests run at once on each; more wait in order of arrival.

    At most ``max_loaded`` models and ``memory`` bytes (None: no limit) are held; to make room the idle model
    with the shortest keep_alive goes, the least recently used one first among equals.
    """

    def __init__(self, factory: Factory, parallel: int, max_loaded: int, memory: int | None = None) -> None:
        self._factory = factory
        self._parallel = parallel
        self._max_loaded = max_loaded
        self._memory = memory
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._pending = 0
        self._clock = itertools.count(1)
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def use(self, model: Model, options: Options, keep_alive: float | None) -> AsyncIterator[Loaded]:
        """A loaded runner for ``model``, held until the block ends.

        Waits for a load, an eviction or a change of options if need be. Raises NodeError: 503 if too many
        wait already, 500 if the model does not load.
        """
        options = _bounded(model, options)
        entry = self._usable(model, options) or await self._acquire(model, options, keep_alive)
        entry.uses += 1
        entry.last_use = next(self._clock)
        self._stop_timer(entry)
        if keep_alive is not None:
            entry.session = keep_alive
        try:
            yield entry
        finally:
            entry.uses -= 1
            if entry.uses == 0 and not entry.gone.is_set():
                self._idle(entry)

    def unload(self, model: Model) -> None:
        """Let ``model`` go as soon as nobody uses it."""
        if entry := self._loaded.get(model.key):
            self._expire(entry)

    def listing(self) -> list[dict[str, Any]]:
        """The entries of /api/ps, the longest-lived first. As with Ollama, a model that loads is not among them yet."""
        order = sorted((entry for entry in self._loaded.values() if entry.ready), key=lambda entry: -entry.session)
        return [_process(entry) for entry in order]

    async def close(self) -> None:
        """End every runner and wait for it."""
        for entry in list(self._loaded.values()):
            self._drop(entry)
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _usable(self, model: Model, options: Options) -> Loaded | None:
        entry = self._loaded.get(model.key)
        if entry is None or not entry.ready or not entry.runner.alive:
            return None
        return entry if entry.options.runner_key == options.runner_key else None

    async def _acquire(self, model: Model, options: Options, keep_alive: float | None) -> Loaded:
        if self._pending >= MAX_QUEUE:
            raise NodeError(503, _BUSY)
        self._pending += 1
        try:
            async with self._loading:
                while True:
                    if entry := self._usable(model, options):
                        return entry
                    runner = self._factory(model, options, self._parallel)
                    victim = self._loaded.get(model.key) or self._victim(runner)
                    if victim is None:
                        return await self._load(model, options, keep_alive, runner)
                    # A busy victim may be given further requests (as in Ollama) but goes at its first idle moment.
                    victim.evicted = True
                    self._expire(victim)
                    await victim.gone.wait()
        finally:
            self._pending -= 1

    def _victim(self, runner: Runner) -> Loaded | None:
        """Who must go before ``runner`` fits, None if it fits."""
        used = sum(entry.runner.size for entry in self._loaded.values())
        if self._memory is not None and runner.size > self._memory:
            need, have = f"{runner.size / 2**30:.1f} GiB", f"{self._memory / 2**30:.1f} GiB"
            raise NodeError(500, f"model requires more system memory ({need}) than is available ({have})")
        if len(self._loaded) < self._max_loaded and (self._memory is None or used + runner.size <= self._memory):
            return None
        return min(self._loaded.values(), key=lambda entry: (entry.uses > 0, entry.session, entry.last_use))

    async def _load(self, model: Model, options: Options, keep_alive: float | None, runner: Runner) -> Loaded:
        session = KEEP_ALIVE if keep_alive is None else keep_alive
        entry = Loaded(model, options, runner, session, asyncio.Semaphore(runner.slots))
        self._loaded[model.key] = entry
        try:
            await runner.start()
        except BaseException:
            self._drop(entry)
            raise
        entry.ready = True
        return entry

    def _idle(self, entry: Loaded) -> None:
        if entry.evicted or entry.session <= 0 or not entry.runner.alive:
            self._drop(entry)
            return
        entry.expires = clock.expiry(entry.session)
        if entry.session < math.inf:
            loop = asyncio.get_running_loop()
            entry.timer = loop.call_later(min(entry.session, clock.FOREVER / 1e3), self._drop, entry)

    def _expire(self, entry: Loaded) -> None:
        self._stop_timer(entry)
        entry.session = 0.0
        entry.expires = clock.rfc3339()
        if entry.uses == 0 and entry.ready:
            self._drop(entry)

    def _drop(self, entry: Loaded) -> None:
        self._stop_timer(entry)
        if self._loaded.get(entry.model.key) is entry:
            del self._loaded[entry.model.key]
            task = asyncio.get_running_loop().create_task(self._close(entry))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, entry: Loaded) -> None:
        try:
            await entry.runner.close()
        finally:
            entry.gone.set()

    @staticmethod
    def _stop_timer(entry: Loaded) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None


def _bounded(model: Model, options: Options) -> Options:
    """``options`` with a context that the model has."""
    context = max(4, options.num_ctx)
    if model.context_length:
        context = min(context, model.context_length)
    return replace(options, num_ctx=context) if context != options.num_ctx else options


def _process(entry: Loaded) -> dict[str, Any]:
    model = entry.model
    expires = entry.expires if entry.expires and not entry.uses else clock.expiry(entry.session)
    return {
        "name": model.name.short,
        "model": model.name.short,
        "size": entry.runner.size,
        "digest": model.digest,
        "details": dict(model.details),
        "expires_at": expires,
        "size_vram": entry.runner.vram,
        "context_length": entry.context,
    }
