"""The canary: a generation of one token on a resident model of each node, since a hung runner's API still answers.

It loads nothing, keeps no model longer than it would have stayed, and sends the options that gateways send, so that
no runner is loaded anew. A node whose slots are all in use is left alone: its streams are watched by the gateways. It
is not asked while this control loads something there, and late beside a load of another control's is not hung. The
verdict is only shown (`corral.control.node_metrics`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

import httpx

from corral.config.settings import CanarySettings
from corral.control.measured import Residence, number
from corral.control.prober import Fleet, Member
from corral.fleet.dispatch import SAMPLE_MIN
from corral.fleet.fallback import RESTORED, Pace
from corral.fleet.node import canonical_name
from corral.store import answers
from corral.store.asking import http_client
from corral.wire.options import NO_POLICY, ModelPolicy, check

TICK = 1.0
LOADING = 60.0
"""So long a model that has just become resident may need before it answers."""
LEAST = 2.0
"""So long it may take besides before the first token (seconds)."""
FOREVER = 10 * 365 * 86400.0

log = logging.getLogger(__name__)


class Canary:
    """Asks each node in turn. ``streams`` tells how many requests run on a node, None where nobody knows."""

    def __init__(
        self,
        fleet: Fleet,
        settings: CanarySettings,
        policies: Mapping[str, ModelPolicy],
        streams: Callable[[str], Awaitable[int | None]],
    ) -> None:
        self._fleet, self._settings, self._policies, self._streams = fleet, settings, policies, streams
        self._running: dict[str, asyncio.Task[None]] = {}
        self._embeds: set[str] = set()

    async def run(self) -> None:
        """Ask until cancelled."""
        if not self._settings.interval:
            return
        async with http_client() as client:
            try:
                while True:
                    self._begin(client, time.monotonic())
                    await asyncio.sleep(TICK)
            finally:
                tasks = list(self._running.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, client: httpx.AsyncClient, now: float) -> None:
        for member in list(self._fleet.members.values()):
            if member.up and member.name not in self._running:
                model = due(member.measured.residents, now, self._settings.interval)
                if model is not None:
                    task = asyncio.get_running_loop().create_task(self._ask(client, member, model))
                    self._running[member.name] = task
                    task.add_done_callback(partial(self._ended, member.name))

    def _ended(self, node: str, task: asyncio.Task[None]) -> None:
        self._running.pop(node, None)

    async def _ask(self, client: httpx.AsyncClient, member: Member, model: str) -> None:
        residence = member.measured.residents[model]
        residence.tried = time.monotonic()
        try:
            running = await self._streams(member.name)
            if running is not None and running >= member.slots:
                return
            async with member.loads:
                for entry in (await answers.resident(client, member.url, model, self._settings.timeout))[:1]:
                    await self._prove(client, member, entry, residence)
                    pace = member.measured.paces.get(model)
                    if pace is not None and pace.fallen and not residence.failing:
                        await self._time(client, member, entry, pace, 1 + (running or 0))
        except (httpx.HTTPError, TimeoutError, ValueError):
            return  # it does not even say what is resident: the prober's to judge

    async def _prove(
        self, client: httpx.AsyncClient, member: Member, entry: dict[str, Any], residence: Residence
    ) -> None:
        model = entry["name"]
        patience = LOADING if residence.fresh and not residence.proven else self._settings.timeout
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await self._generate(client, member, entry)
        except Exception as error:
            if member.measured.elsewhere.keys() - {canonical_name(model)}:
                return  # the load has what its tokens need
            if member.up and member.measured.residents.get(model) is residence:
                if not residence.failing:
                    log.warning("%s: no token from %s: %r", member.name, model, error)
                residence.failing = True
            return
        member.measured.canary_duration = time.monotonic() - began
        member.measured.canary_success = time.time()
        residence.proven, residence.failing = True, False

    async def _time(
        self, client: httpx.AsyncClient, member: Member, entry: dict[str, Any], pace: Pace, beside: int
    ) -> None:
        """See how fast a model is that has become slow: it gets no streams that would tell, where others have it."""
        # What takes twice as long is none that is as fast as it was.
        seconds = LEAST + 2 * SAMPLE_MIN * RESTORED / pace.good
        try:
            async with asyncio.timeout(seconds):
                said = await self._generate(client, member, entry, SAMPLE_MIN)
        except (httpx.HTTPError, TimeoutError, ValueError):
            return
        tokens, spent = number(said.get("eval_count")), number(said.get("eval_duration")) / 1e9
        if tokens > 1 and spent > 0:
            pace.note(tokens / spent, beside, time.time())

    async def _generate(
        self, client: httpx.AsyncClient, member: Member, entry: dict[str, Any], tokens: int = 1
    ) -> dict[str, Any]:
        """Have it generate; what it says of that. ValueError where the answer is none."""
        model = entry["name"]
        policy = self._policies.get(canonical_name(model), NO_POLICY)
        wanted = {"num_predict": tokens, "temperature": 0.0}
        options = check({name: value for name, value in wanted.items() if name not in policy.refused}, policy)
        body = {"model": model, "keep_alive": stays(entry.get("expires_at"), time.time()), "options": options}
        if model not in self._embeds:
            whole = body | {"prompt": "a", "raw": True, "stream": False}
            status, content = await answers.fetch(client, "POST", member.url + "/api/generate", whole)
            if status == 400 and b"does not support" in content:
                self._embeds.add(model)
        if model in self._embeds:
            options.pop("num_predict", None)
            status, content = await answers.fetch(client, "POST", member.url + "/api/embed", body | {"input": "a"})
        if status != 200:
            raise ValueError(f"status {status}: {answers.shown(content)}")
        said = answers.value(content)
        if said.get("error"):
            raise ValueError(f"no answer: {answers.shown(content)}")
        return said


def due(residents: Mapping[str, Residence], now: float, interval: float) -> str | None:
    """The model to ask: one that has just come, else the one that waits longest if `interval` is over; None for none.

    Times are monotonic seconds.
    """
    fresh = [name for name, residence in residents.items() if not residence.tried]
    if fresh:
        return fresh[0]
    if not residents or now - max(residence.tried for residence in residents.values()) < interval:
        return None
    return min(residents, key=lambda name: residents[name].tried)


def stays(expires_at: object, now: float) -> str | int:
    """`keep_alive` that leaves a model's end where it is: the rest of its time, or -1 where it has none."""
    try:
        left = datetime.fromisoformat(str(expires_at)).timestamp() - now
    except (ValueError, OverflowError):
        return -1
    return -1 if left > FOREVER else f"{max(left, 1.0):.3f}s"


def policies(catalogue: list[Mapping[str, Any]]) -> dict[str, ModelPolicy]:
    """Canonical name → policy of a catalogue's entries."""
    return {canonical_name(entry["name"]): ModelPolicy.from_entry(entry) for entry in catalogue}
