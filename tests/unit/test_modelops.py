"""Loads and unloads on a node that does as Ollama does: an unload is answered at once and done later."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from corral.config.settings import CanarySettings, MirrorSettings
from corral.control import modelops
from corral.control.canary import Canary
from corral.control.measured import Residence
from corral.control.operations import Operation, StepFailed, Work
from corral.control.prober import Member
from corral.fleet.catalogue import LOAD, REMOVE, UNLOAD, Step, Wanted

OLD, NEW = "sha256:" + "1" * 64, "sha256:" + "2" * 64


class Node:
    """Memory that holds `digest`, and after an unload for `lingers` more looks at it. A load within them is given the
    runner that is about to go."""

    def __init__(self, digest: str, lingers: int) -> None:
        self.resident: str | None = digest
        self.leaving: int | None = None
        self.lingers = lingers

    def answer(self, request: httpx.Request) -> httpx.Response:
        entry = {"name": "m:latest", "digest": self.resident, "context_length": 4096}
        if request.url.path == "/api/tags":
            return said(models=[{**entry, "digest": NEW}])
        if request.url.path == "/api/ps":
            listed = [entry] if self.resident else []
            if self.leaving is not None:
                self.leaving -= 1
                if self.leaving < 0:
                    self.resident, self.leaving = None, None
            return said(models=listed)
        body = json.loads(request.content)
        if body["keep_alive"] == 0:
            if self.resident and body["model"] == "m:latest":
                self.leaving = self.lingers
        elif self.resident is None:
            self.resident = NEW
        return said(done=True)


def said(**answer: Any) -> httpx.Response:
    """An answer as a stream, which is how control reads."""
    return httpx.Response(200, stream=httpx.ByteStream(json.dumps(answer).encode()))


async def looked(member: Member, fresh: bool) -> None:
    """The prober's look at the node is not what is tested."""


async def perform(action: str, member: Member, client: httpx.AsyncClient) -> Work:
    fleet: Any = SimpleNamespace(members={"n": member}, client=client, probe=looked, on_change=print)
    catalogue: Any = SimpleNamespace(options=lambda name: {}, want=Wanted)
    work = Work(Step(action, "n", "m:latest", digest=NEW))
    worker = modelops.Worker(fleet, catalogue, MirrorSettings())
    await worker.perform(Operation(action, SimpleNamespace(), [work]), work)  # type: ignore[arg-type]
    return work


def load(node: Node) -> Work:
    client = httpx.AsyncClient(transport=httpx.MockTransport(node.answer))
    return asyncio.run(perform(LOAD, Member("n", "http://n"), client))


def test_a_load_waits_until_the_version_that_was_in_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelops, "POLL", 0.0)
    node = Node(OLD, lingers=3)
    assert load(node).detail.endswith("context 4096")
    assert node.resident == NEW


def test_one_that_does_not_leave_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelops, "POLL", 0.0)
    monkeypatch.setattr(modelops, "UNLOADED", 0.0)
    with pytest.raises(StepFailed, match="still in memory"):
        load(Node(OLD, lingers=1000))


def test_the_version_that_is_wanted_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelops, "UNLOADED", 0.0)
    node = Node(NEW, lingers=1000)
    load(node)
    assert (node.resident, node.leaving) == (NEW, None)


@pytest.mark.parametrize("action", [UNLOAD, REMOVE])
def test_what_is_unloaded_is_not_brought_back_by_the_canary(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen that the model is there, and asks it: the unload comes after its answer, not between."""
    monkeypatch.setattr(modelops, "POLL", 0.0)
    node, seen = Node(NEW, lingers=3), list[str]()

    async def run() -> None:
        asked, released = asyncio.Event(), asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.method == "DELETE":
                return said()
            body = json.loads(request.content) if request.content else {}
            if "prompt" in body:
                seen.append("canary")
                asked.set()
                await released.wait()
                seen.append("answered")
                node.resident = NEW  # as Ollama does for every request
            elif body.get("keep_alive") == 0:
                seen.append("unload")
            return node.answer(request)

        client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        member = Member("n", "http://n", up=True)
        member.measured.residents["m:latest"] = Residence(since=0.0, fresh=False)

        async def nobody(name: str) -> int | None:
            return None

        canary = Canary(SimpleNamespace(), CanarySettings(), {}, nobody)  # type: ignore[arg-type]
        asking = asyncio.create_task(canary._ask(client, member, "m:latest"))
        await asked.wait()
        working = asyncio.create_task(perform(action, member, client))
        for _ in range(100):
            await asyncio.sleep(0)
        released.set()
        await asyncio.gather(asking, working)

    asyncio.run(run())
    assert seen[:3] == ["canary", "answered", "unload"]
    assert node.resident is None


def test_a_record_tells_of_so_many_models_and_counts_the_others() -> None:
    """Of a fleet with many nodes, whose catalogue is applied at once, an operation's record stays a record."""
    member = Member("n", "http://n")
    member.tags = [{"name": "m1:latest", "digest": NEW.removeprefix("sha256:")}]
    member.ps = [{"name": "m1:latest"}]
    worker = modelops.Worker(SimpleNamespace(members={"n": member}), None, MirrorSettings())  # type: ignore[arg-type]
    works = [Work(Step(LOAD, "n", f"m{number}:latest")) for number in range(modelops.SEEN_MAX + 3)]
    seen = worker.seen(Operation(LOAD, SimpleNamespace(), [*works, Work(Step(UNLOAD, "gone", "m1:latest"))]))  # type: ignore[arg-type]
    assert seen["left_out"] == 4
    assert len(seen["models"]["n"]) == modelops.SEEN_MAX
    assert seen["models"]["n"]["m1:latest"] == {"digest": NEW, "resident": True}
    assert seen["models"]["n"]["m2:latest"] is None
    few = worker.seen(Operation(LOAD, SimpleNamespace(), [Work(Step(UNLOAD, "gone", "m1:latest"))]))  # type: ignore[arg-type]
    assert few == {"models": {"gone": {"m1:latest": None}}}, "of a node that was removed nothing is known"
