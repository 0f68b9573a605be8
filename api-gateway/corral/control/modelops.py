"""The steps of an operation, carried out on a node: each looks first whether it is done already."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from corral.config.settings import MirrorSettings
from corral.control.catalogue import Catalogue, view
from corral.control.ollama import NodeFailed, Ollama
from corral.control.operations import Operation, StepFailed, Work
from corral.control.prober import Fleet, Member
from corral.fleet import catalogue as decide
from corral.fleet.catalogue import aside, digest_of, mirrored, permitted

UNLISTED = "{}: its registry is not one of mirror.registries in corral.yaml"
STALLED = 300.0
"""Seconds without one more byte after which a pull is given up: Ollama itself tries for ever."""

RATE_OVER = 3.0
SEEN_MAX = 200
"""Models on nodes that a record of an operation tells of."""
UNLOADED = 60.0
POLL = 0.2


Act = Callable[[Operation, Work, Member, Ollama], Awaitable[None]]


class Worker:
    """Performs steps. Nodes of one host change their disks one after the other: they may share a folder."""

    def __init__(self, fleet: Fleet, catalogue: Catalogue, mirror: MirrorSettings) -> None:
        self._fleet, self._catalogue, self._mirror = fleet, catalogue, mirror
        self._hosts: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._settling = asyncio.Lock()

    async def perform(self, operation: Operation, work: Work) -> None:
        """Do one step. Raises StepFailed."""
        member = self._fleet.members.get(work.step.node)
        if member is None:
            raise StepFailed("the node was removed", gone=True)
        node = Ollama(self._fleet.client, member.url)
        act = {
            decide.PULL: self._pull,
            decide.COPY: self._copy,
            decide.LOAD: self._load,
            decide.UNLOAD: self._unload,
            decide.REMOVE: self._remove,
        }[work.step.action]
        try:
            if work.step.action in (decide.LOAD, decide.UNLOAD):
                async with member.loads:
                    await act(operation, work, member, node)
            else:
                await self._alone(act, operation, work, member, node)
        except NodeFailed as error:
            raise StepFailed(str(error), error.gone) from None
        finally:
            # Gateways learn at once what has changed, and of a pull nothing before that.
            await self._look([member])

    def seen(self, operation: Operation) -> dict[str, Any]:
        """What its nodes have of its models, as they said last: by node and model its digest and whether it is in
        memory, None for one that is not there. No more than SEEN_MAX; `left_out` counts the others."""
        wanted = list(dict.fromkeys((work.step.node, work.step.model) for work in operation.works))
        members = [self._fleet.members.get(node) for node in operation.nodes]
        there = {member.name: (view(member).held, set(member.resident)) for member in members if member is not None}
        found: dict[str, dict[str, Any]] = {}
        for node, model in wanted[:SEEN_MAX]:
            held, resident = there.get(node, ({}, set()))
            here = held.get(model)
            told = None if here is None else {"digest": here.digest, "resident": model in resident}
            found.setdefault(node, {})[model] = told
        more = len(wanted) - SEEN_MAX
        return {"models": found} | ({"left_out": more} if more > 0 else {})

    async def _alone(self, act: Act, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        host = urlsplit(member.url).hostname or ""
        if self._hosts[host].locked():
            work.progress = {"status": f"waits for another node of {host}"}
            operation.touch()
        async with self._hosts[host]:
            try:
                await act(operation, work, member, node)
            finally:
                await self._look(peer for peer in self._peers(member) if peer.withheld)

    def _peers(self, member: Member) -> list[Member]:
        """The nodes that may share a folder with this one, itself among them."""
        host = urlsplit(member.url).hostname
        return [one for one in self._fleet.members.values() if urlsplit(one.url).hostname == host]

    async def _look(self, members: Iterable[Member]) -> None:
        present = [one for one in members if self._fleet.members.get(one.name) is one]
        await asyncio.gather(*(self._fleet.probe(one, fresh=True) for one in present))
        for one in present:
            one.withheld.clear()
        self._fleet.on_change()

    # -- the versions on a node's disk

    async def _pull(self, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        name = work.step.model
        before = await node.digest(name)
        # Who asks for a pull wants to know what the registry has; a plan wants the version.
        if operation.kind != "pull" and before is not None and before == work.step.digest:
            work.detail = "held already"
            return
        if not permitted(name, self._mirror.registry, self._mirror.registries):
            raise StepFailed(UNLISTED.format(name))
        source = mirrored(name, self._mirror.registry)
        kept = aside(name, "aside")
        try:
            for peer in self._peers(member):
                peer.withheld |= {name, source} - {entry["name"] for entry in peer.tags}
            if before is not None:
                await node.copy(name, kept)
            await self._download(operation, work, node, source)
            got = await node.digest(source)
            if got is None:
                raise StepFailed(f"the node does not have {source} after the pull")
            await self._verify(operation, work, member, got)
            if source != name:
                await node.copy(source, name)
            await self._replaced(member, node, name, kept, before, got)
            work.detail = f"{got}" if got != before else f"unchanged: {got}"
        except BaseException:
            with contextlib.suppress(NodeFailed):
                await asyncio.shield(self._restore(node, name, kept, before))
            raise
        finally:
            with contextlib.suppress(NodeFailed):
                for spare in ([kept] if before is not None else []) + ([source] if source != name else []):
                    await asyncio.shield(node.delete(spare))

    async def _copy(self, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        name, source = work.step.model, work.step.source or ""
        held = await node.held()
        before, got = held.get(name), held.get(source)
        if before is not None and before == work.step.digest:
            work.detail = "held already"
            return
        if got is None or got != work.step.digest:
            raise StepFailed(f"{source} is not there any more, or is another version: plan again")
        kept = aside(name, "aside")
        if before is not None:
            await node.copy(name, kept)
        await node.copy(source, name)
        await self._replaced(member, node, name, kept, before, got)
        if before is not None:
            await node.delete(kept)
        work.detail = f"{got}, from {source}"

    async def _replaced(self, member: Member, node: Ollama, name: str, kept: str, before: str | None, got: str) -> None:
        """The version that was in use stays as the previous one, and leaves memory once its requests have ended."""
        if before is not None and before != got:
            previous = aside(name, "previous")
            await node.copy(kept, previous)
            async with member.loads:
                await node.unload(previous)

    async def _restore(self, node: Ollama, name: str, kept: str, before: str | None) -> None:
        """Undo a pull that failed: what was in use is in use again, what was not wanted is gone."""
        now = await node.digest(name)
        if before is None:
            if now is not None:
                await node.delete(name)
        elif now != before:
            await node.copy(kept, name)

    async def _download(self, operation: Operation, work: Work, node: Ollama, source: str) -> None:
        meter = _Meter()
        private = self._mirror.registry is not None and source.startswith(f"{self._mirror.registry}/")
        async for event in node.pull(source, private and self._mirror.insecure):
            work.progress = meter.note(event)
            operation.touch()
            if meter.stalled > STALLED:
                raise StepFailed(f"the pull has not moved for {STALLED:.0f} s")

    async def _verify(self, operation: Operation, work: Work, member: Member, got: str) -> None:
        """Hold a pulled version to what it must be; the first of a model that has no digest sets it."""
        name = work.step.model
        entry = self._catalogue.entries.get(name)
        async with self._settling:
            expected = work.step.digest or operation.accepted.get(name)
            if expected is None and entry is not None:
                expected = await self._catalogue.record(name, got, member.name, anew=operation.accept)
                operation.accepted[name] = expected
        if expected is not None and got != expected:
            stated = entry is not None and entry.digest is not None
            told = "the catalogue's" if stated else "the recorded"
            advice = (
                "if that is the one you want, put it into corral.yaml"
                if stated
                else f"if that is the one you want: corral models pull {name} --accept"
            )
            raise StepFailed(f"wrong digest: got {got}, {told} is {expected}; what was pulled is not in use ({advice})")

    # -- what is in memory

    async def _load(self, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        name = work.step.model
        member.released.discard(name)
        held = await node.digest(name)
        if held is None:
            raise StepFailed(f"the node does not hold it: corral models pull {name} --node {member.name}")
        expected = work.step.digest or operation.accepted.get(name)
        if expected is not None and held != expected:
            raise StepFailed(f"wrong digest: held {held}, expected {expected}: it is not loaded")
        await self._leave(operation, work, node, name, held)
        started = time.monotonic()
        work.progress = {"status": "loading"}
        operation.touch()
        with member.measured.loads_now(name):
            await node.load(name, self._catalogue.options(name))
        entries = [entry for entry in await node.resident(name) if digest_of(str(entry.get("digest"))) == held]
        if not entries:
            raise StepFailed("the node says that it loaded, but it is not in memory (is there room for it?)")
        context = entries[0].get("context_length")
        wanted = self._catalogue.want(name).num_ctx
        if wanted is not None and isinstance(context, int) and context != wanted:
            most = await self._catalogue.learn(member, name, held)
            if most is None or context != min(wanted, most):
                raise StepFailed(f"loaded with a context of {context}, the catalogue says {wanted}")
        seconds = time.monotonic() - started
        work.detail = f"in {seconds:.1f} s" + (f", context {context}" if context else "")

    async def _unload(self, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        name = work.step.model
        member.released.add(name)
        if not await node.resident(name):
            work.detail = "was not in memory"
            return
        await node.unload(name)
        await self._gone(operation, work, node, name, None)

    async def _leave(self, operation: Operation, work: Work, node: Ollama, name: str, held: str) -> None:
        """Other versions of a model leave memory.

        Ollama answers an unload at once and does it later. A load that comes between is given the runner that is
        about to go: it says "loaded", and nothing is. So the next step waits until they are gone.
        """
        if await _others(node, name, held):
            for other in (aside(name, "previous"), name):
                await node.unload(other)
            await self._gone(operation, work, node, name, held)

    async def _gone(self, operation: Operation, work: Work, node: Ollama, name: str, but: str | None) -> None:
        """Wait until no version of a model, or only that one, is in memory."""
        until = time.monotonic() + UNLOADED
        work.progress = {"status": "waits for its requests"}
        operation.touch()
        while await _others(node, name, but):
            if time.monotonic() > until:
                raise StepFailed(f"still in memory after {UNLOADED:.0f} s: requests run on it")
            await asyncio.sleep(POLL)

    async def _remove(self, operation: Operation, work: Work, member: Member, node: Ollama) -> None:
        name = work.step.model
        held = await node.held()
        ours = [one for one in (name, aside(name, "previous"), aside(name, "aside")) if one in held]
        if name not in held:
            work.detail = "was not held"
        async with member.loads:
            for one in ours:
                await node.unload(one)
                await node.delete(one)
            if ours:
                await self._gone(operation, work, node, name, None)


async def _others(node: Ollama, name: str, but: str | None) -> bool:
    """Whether a version of a model other than that is in memory."""
    return any(digest_of(str(entry.get("digest"))) != but for entry in await node.resident(name))


class _Meter:
    """Progress of one pull: the layer that comes in, and how fast."""

    def __init__(self) -> None:
        self._layer, self._moved = "", time.monotonic()
        self._seen: list[tuple[float, int]] = []

    @property
    def stalled(self) -> float:
        """Seconds since the last byte, or the last word that was new."""
        return time.monotonic() - self._moved

    def note(self, event: dict[str, Any]) -> dict[str, Any]:
        """Take an event of Ollama's; the progress to show."""
        now, status = time.monotonic(), str(event.get("status") or "")
        layer, total = str(event.get("digest") or ""), int(event.get("total") or 0)
        completed = int(event.get("completed") or 0)
        if (layer or status) != self._layer:
            self._layer, self._seen, self._moved = layer or status, [], now
        if not self._seen or completed > self._seen[-1][1]:
            self._moved = now
        self._seen.append((now, completed))
        while self._seen[0][0] < now - RATE_OVER and len(self._seen) > 2:
            del self._seen[0]
        (since, first), elapsed = self._seen[0], now - self._seen[0][0]
        rate = (completed - first) / elapsed if since < now else 0.0
        shown = {"status": "pulling" if layer else status, "layer": layer or None}
        return {**shown, "completed": completed, "total": total, "rate": max(0.0, rate)}
