"""Asks each node what it is and holds: `/api/ps` each second, `/api/tags` and `/api/version` as they may change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from corral.control.measured import HEARD, Measured, gpu_shares, overbooked
from corral.control.reached import TIMEOUT, UNREACHED, reason
from corral.fleet.brakes import Standing, spared
from corral.fleet.catalogue import is_own
from corral.fleet.dispatch import Speeds
from corral.store import answers
from corral.store.asking import http_client

INTERVAL = 1.0
TAGS_INTERVAL = 5.0
MISSES = 2

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """A node of the fleet. ``up`` is the prober's verdict; ``tags`` and ``ps`` are as the node sent them.

    ``wrong``: what it said last made no sense. ``spared``: why it is up though it does not answer (`fleet.brakes`).
    ``suspected``: the runners that gateways suspect, by gateway, and when they said so (monotonic seconds).
    ``crowded``, in the same way: those that run fewer requests at once than the node has slots.

    ``preloading``: it is kept out of service until its models are there, and how far that is; ``warning`` is what went
    wrong with that. ``answered``: it was up before. ``withheld`` models are held but not to be used; ``released`` ones
    were unloaded by an operator, and come back for who asks, not for the catalogue's copies. ``memory`` is bytes,
    as configured; ``loads`` is held by who loads or unloads, and by who asks what is resident there and then has it
    generate: a request that arrives behind an unload would bring the model back.
    """

    name: str
    url: str
    slots: int = 4
    memory: int | None = None
    max_models: int | None = None
    accelerator: str | None = None
    source: str = "api"
    draining: bool = False
    up: bool = False
    misses: int = 0
    error: str | None = "not asked yet"
    version: str = ""
    tags: list[dict[str, Any]] = field(default_factory=list)
    ps: list[dict[str, Any]] = field(default_factory=list)
    tags_at: float = 0.0
    preloading: str | None = None
    warning: str | None = None
    answered: bool = False
    wrong: bool = False
    spared: str = ""
    suspected: dict[str, tuple[float, frozenset[str]]] = field(default_factory=dict)
    crowded: dict[str, tuple[float, frozenset[str]]] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    probing: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    loads: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    measured: Measured = field(default_factory=Measured)

    @property
    def state(self) -> str:
        """draining if told so or not in service yet, else ready or down."""
        if self.draining or (self.up and self.preloading is not None):
            return "draining"
        return "ready" if self.up else "down"

    @property
    def condition(self) -> str:
        """Its state as people see it: suspect is one that is in use while something about it is doubted."""
        state = self.state
        return "suspect" if state == "ready" and (self.spared or self.suspects) else state

    @property
    def answers(self) -> bool:
        """Whether it answers control."""
        return self.up and not self.spared

    @property
    def suspects(self) -> dict[str, list[str]]:
        """Models whose runners gateways suspect here, and those gateways, both sorted."""
        since = time.monotonic() - HEARD
        said = sorted((gateway, models) for gateway, (at, models) in self.suspected.items() if at >= since)
        names = sorted({model for _, models in said for model in models})
        return {name: [gateway for gateway, models in said if name in models] for name in names}

    @property
    def reason(self) -> str | None:
        """Why it is in this state, where there is more to say; of a node that is up, what else is wrong with it."""
        if not self.up:
            return "; ".join(filter(None, (self.error, self.warning))) or None
        if self.spared:
            return f"it does not answer control ({self.error}), and is used all the same, {self.spared}"
        if suspects := self.suspects:
            said = (f"{name} gives no tokens there, says {', '.join(by)}" for name, by in suspects.items())
            return "; ".join(said)
        found, slow = self.on_cpu, self.measured.slow
        told = [name for name in found if name not in slow]
        parts = [f"{', '.join(told)} runs on its CPU"] if told else []
        on_cpu = "; ".join([*parts, *(slow[name] for name in found if name in slow)])
        silent = [name for name, residence in self.measured.residents.items() if residence.failing]
        canary = f"its canary gets no token from {', '.join(sorted(silent))}" if silent else None
        return self.preloading or self.warning or on_cpu or canary or overbooked(self.crowded, self.slots)

    @property
    def usable(self) -> list[dict[str, Any]]:
        """Its tags without what no caller may use: versions kept aside, and pulls that are not verified yet."""
        return [entry for entry in self.tags if entry["name"] not in self.withheld and not is_own(entry["name"])]

    @property
    def resident(self) -> list[str]:
        """Names of the models in its memory, sorted."""
        return sorted({entry["name"] for entry in self.ps if not is_own(entry["name"])})

    @property
    def removed(self) -> list[dict[str, Any]]:
        """What is in its memory, and on its disk no more: Ollama keeps that, for ever with what gateways ask, and says
        404 to who asks for it, or would unload it."""
        listed = {entry["name"] for entry in self.tags} if self.ps else set()
        return [entry for entry in self.ps if entry["name"] not in listed and not is_own(entry["name"])]

    @property
    def on_cpu(self) -> list[str]:
        """Models most of which are in main memory, though a GPU was declared; else, of which less than half as much as
        once is on one; and such as are far slower than they were, whatever the node says. Sorted. Where nothing was
        declared and none was ever on a GPU, nothing is at fault."""
        if self.accelerator == "cpu" or not self.up:
            return []
        seen, declared = self.measured.on_gpu, self.accelerator == "gpu"
        shares = gpu_shares(self.ps).items()
        found = [name for name, share in shares if share < (1.0 if declared else seen.get(name, 0.0)) / 2]
        return sorted(name for name in {*found, *self.measured.slow} if not is_own(name))

    def entry(self) -> dict[str, Any]:
        """The node in the gateways' snapshot."""
        return {
            "name": self.name,
            "url": self.url,
            "slots": self.slots,
            "memory": self.memory,
            "state": self.state,
            "version": self.version,
            "tags": self.usable,
            "ps": [entry for entry in self.ps if not is_own(entry["name"])] if self.up else [],
            "on_cpu": self.on_cpu,
            "loading": self.measured.loading,
            "suspects": self.suspects,
        }

    def describe(self) -> dict[str, Any]:
        """The node in the admin API."""
        return {
            "name": self.name,
            "url": self.url,
            "slots": self.slots,
            "memory": self.memory,
            "max_models": self.max_models,
            "accelerator": self.accelerator,
            "state": self.condition,
            "version": self.version,
            "source": self.source,
            "models": sorted(entry["name"] for entry in self.usable),
            "resident": self.resident if self.up else [],
            "error": self.error,
            "reason": self.reason,
        }


class Fleet:
    """The nodes and the tasks that ask them. ``on_change`` is called after every probe, ``on_up`` before it with a node
    that was down and answers again. ``speeds``: as their streams show them. ``second``: the nodes that somebody else
    does not reach either, None where nobody can say; it is asked while a node does not answer.

    ``changing`` is held by who adds, removes or drains a node.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.members: dict[str, Member] = {}
        self.speeds = Speeds()
        self.on_change = on_change
        self.on_up: Callable[[Member], None] = lambda member: None
        self.second: Callable[[], Awaitable[Collection[str] | None]] = _nobody
        self.changing = asyncio.Lock()
        self._dead: Collection[str] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._client: httpx.AsyncClient | None = None
        self._told: set[tuple[str, str]] = set()

    async def start(self, members: list[Member]) -> None:
        """Ask all nodes once, so that the first snapshot does not call a working fleet down, and go on asking."""
        self._client = http_client(TIMEOUT)
        self.members = {member.name: member for member in members}
        await asyncio.gather(*(self.probe(member) for member in members))
        for member in members:
            self._watch(member)
        self._looking = asyncio.get_running_loop().create_task(self._look_twice())

    async def add(self, member: Member, first: Callable[[Member], None] = lambda member: None) -> None:
        """Take a node in, asked once already; ``first`` is called before anybody hears of it."""
        if not member.answered and not member.misses:
            await self.probe(member)
        self.members[member.name] = member
        first(member)
        self._watch(member)
        self.on_change()

    async def remove(self, name: str) -> None:
        """Forget a node."""
        self.members.pop(name, None)
        await self._end(self._tasks.pop(name, None))
        self.on_change()

    def suspect(
        self, gateway: str, suspects: Mapping[str, frozenset[str]], crowded: Mapping[str, frozenset[str]]
    ) -> bool:
        """Note which runners a gateway suspects, and finds to run too few at once: models by node. Whether it suspected
        others before."""
        now = time.monotonic()
        before = [member.suspects for member in self.members.values()]
        for member in self.members.values():
            for said, told in ((suspects, member.suspected), (crowded, member.crowded)):
                if models := said.get(member.name):
                    told[gateway] = now, models
                else:
                    told.pop(gateway, None)
        return before != [member.suspects for member in self.members.values()]

    async def close(self) -> None:
        """Stop asking."""
        await self._end(self._looking)
        for name in list(self._tasks):
            await self._end(self._tasks.pop(name))
        if self._client is not None:
            await self._client.aclose()

    def _watch(self, member: Member) -> None:
        self._tasks[member.name] = asyncio.get_running_loop().create_task(self._run(member))

    @staticmethod
    async def _end(task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a probe ended: %r", error)

    async def _run(self, member: Member) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + INTERVAL, loop.time())
            await asyncio.sleep(due - loop.time())
            # One node must never stop being asked: what it said last would be believed for ever.
            try:
                await self.probe(member)
                self.on_change()
            except Exception as error:
                self._tell(member, error)

    def _judge(self) -> None:
        """Put what does not answer out of use, as far as the brakes let it."""
        serving = [member for member in self.members.values() if not member.draining]
        nodes = [
            Standing(
                member.name,
                member.misses > 0,
                member.misses >= MISSES,
                member.up,
                frozenset(entry["name"] for entry in member.usable),
            )
            for member in serving
            # Who can be reached, and says what makes no sense, is at fault by its own word.
            if member.answered and not (member.misses and member.wrong)
        ]
        kept = spared(nodes, self._dead)
        for member in self.members.values():
            why = kept.get(member.name, "")
            if why and not member.spared:
                log.warning("%s does not answer and is used all the same, %s", member.name, why)
            member.spared = why
            if member.misses >= MISSES:
                member.up = bool(why)

    async def _look_twice(self) -> None:
        """While a node does not answer, hear what another one that checks them says."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                # From the first miss on: at the next one it is known what to make of it.
                if any(member.answered and member.misses for member in self.members.values()):
                    self._dead = await self.second()
                    self._judge()
                    self.on_change()
                else:
                    self._dead = None
            except Exception:
                log.exception("nodes that do not answer were not looked at twice")

    def _tell(self, member: Member, error: Exception) -> None:
        """Say what should not happen, once of each node and kind."""
        if (kind := (member.name, type(error).__name__)) not in self._told:
            self._told.add(kind)
            log.error("%s: its probe failed in control", member.name, exc_info=error)

    async def probe(self, member: Member, fresh: bool = False) -> None:
        """Ask a node once and note what it says: two misses make it down, one answer ready.

        ``fresh``: its tags too, whatever is known of them.
        """
        # One at a time: what was asked first must not be noted last.
        async with member.probing:
            await self._probe(member, fresh)

    async def _probe(self, member: Member, fresh: bool) -> None:
        try:
            ps = await self._models(member, "/api/ps")
            names = {entry["name"] for entry in ps}
            now = time.monotonic()
            stale = fresh or not member.up or now - member.tags_at >= TAGS_INTERVAL or not member.tags_at
            if stale or names != {entry["name"] for entry in member.ps}:
                tags = await self._models(member, "/api/tags")
                # A node that was away may come back as another version.
                version = member.version if member.up and member.version else await self._version(member)
                member.tags, member.version, member.tags_at = tags, version, now
        except Exception as error:
            if not isinstance(error, httpx.HTTPError | TimeoutError | ValueError):
                self._tell(member, error)
            member.wrong = not isinstance(error, UNREACHED)
            member.misses += 1
            member.measured.probe_failures += 1
            member.error = reason(error)
            if member.misses >= MISSES:
                if self._dead is None and member.answered:
                    self._dead = await self.second()  # before it is put out of use, not after
                self._judge()
                if self.members.get(member.name) is not member:
                    member.up = False  # it is not of the fleet yet
            return
        returned = not member.up and self.members.get(member.name) is member and member.name in self._tasks
        member.ps = ps
        member.measured.held(entry["name"] for entry in member.usable)
        member.measured.resident(names, now)
        member.measured.holds(ps)
        silent = member.misses >= MISSES
        member.up, member.misses, member.error = True, 0, None
        if returned:
            self.on_up(member)
        member.answered = True
        if silent:
            self._judge()

    @property
    def client(self) -> httpx.AsyncClient:
        """The client that asks nodes. Its time-out is a probe's: other requests state their own."""
        if self._client is None:
            raise RuntimeError("the fleet was not started")
        return self._client

    async def _models(self, member: Member, path: str) -> list[dict[str, Any]]:
        return await self._get(member, path, answers.models)

    async def _version(self, member: Member) -> str:
        return await self._get(member, "/api/version", answers.version)

    async def _get(self, member: Member, path: str, read: Callable[[bytes], T]) -> T:
        try:
            # Each question has its own time: over a long way all of them together, and the connection, would be late.
            async with asyncio.timeout(TIMEOUT):
                status, body = await answers.fetch(self.client, "GET", member.url + path, timeout=TIMEOUT)
            if status != 200:
                raise ValueError(f"status {status}")
            return read(body)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


async def _nobody() -> None:
    return None
