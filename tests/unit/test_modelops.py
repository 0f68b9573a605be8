"""Loads and unloads on a node that does as Ollama does: an unload is answered at once and done later."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from corral.config.settings import MirrorSettings
from corral.control import modelops
from corral.control.operations import Operation, StepFailed, Work
from corral.control.prober import Member
from corral.fleet.catalogue import LOAD, Step, Wanted

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
            if self.resident and body["model"] == "m":
                self.leaving = self.lingers
        elif self.resident is None:
            self.resident = NEW
        return said(done=True)


def said(**answer: Any) -> httpx.Response:
    """An answer as a stream, which is how control reads."""
    return httpx.Response(200, stream=httpx.ByteStream(json.dumps(answer).encode()))


async def looked(member: Member, fresh: bool) -> None:
    """The prober's look at the node is not what is tested."""


def load(node: Node) -> Work:
    client = httpx.AsyncClient(transport=httpx.MockTransport(node.answer))
    fleet: Any = SimpleNamespace(members={"n": Member("n", "http://n")}, client=client, probe=looked, on_change=print)
    catalogue: Any = SimpleNamespace(options=lambda name: {}, want=Wanted)
    work = Work(Step(LOAD, "n", "m", digest=NEW))
    worker = modelops.Worker(fleet, catalogue, MirrorSettings())
    asyncio.run(worker.perform(Operation("load", SimpleNamespace(), [work]), work))  # type: ignore[arg-type]
    return work


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
