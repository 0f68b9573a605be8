"""Nodes that are a tenant's own, at a real gateway: whatever becomes of the others, they are asked for nobody else."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import END, HEAD, FakeNode, Gateway, chunk, gateway, says
from support.held import MODEL, Held, leading
from support.process import until

from corral.fleet.pools import counted
from corral.wire.lines import RENDERED

MESSAGES = [{"role": "user", "content": "Guten Tag!"}]
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "Guten Tag!"},
    "/api/embed": {"input": "Guten Tag!"},
    "/api/embeddings": {"prompt": "Guten Tag!"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Guten Tag!"},
    "/v1/embeddings": {"input": "Guten Tag!"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}
DIGEST = "sha256:" + "a" * 64
TAG = {"name": MODEL, "model": MODEL, "modified_at": "2026-11-23T15:00:00Z", "size": 1, "digest": DIGEST}
OWN = counted(MODEL, "node-1")


class Site:
    """A gateway; node-1 is of the tenant red, the others are everybody's else. Callers are told by their tenants."""

    def __init__(self, gw: Gateway) -> None:
        self.gw = gw
        self.own, *self.shared = gw.nodes
        self.keys = {tenant: gw.new_key(tenant=tenant) for tenant in ("red", "blue")}
        gw.control.publish(dedicated={"red": ["node-1"]}, continuable={MODEL: DIGEST})
        gw.publish(tags=[TAG])
        self.well()

    def well(self) -> None:
        """Have all nodes be well."""
        for node in self.gw.nodes:
            self.do([node], functools.partial(answers, node))

    def ask(self, tenant: str, path: str = "/api/chat", stream: bool = False) -> httpx.Response:
        """A request of a tenant's; "" is a key of no tenant."""
        body = {"model": "m", **BODIES[path]} | ({} if "embed" in path else {"stream": stream})
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"} if tenant else {}
        return self.gw.post(path, body, headers=headers)

    def ask_all(self, tenant: str) -> dict[str, httpx.Response]:
        """A request by each path at once: one that no node answers is tried for seconds. The shared nodes have room
        for all of them."""
        with ThreadPoolExecutor(len(BODIES)) as callers:
            return dict(zip(BODIES, callers.map(functools.partial(self.ask, tenant), BODIES), strict=True))

    def do(self, nodes: list[FakeNode], behaviour: Callable[[socket.socket], None]) -> None:
        """Have nodes do so at all that they are asked."""
        for node in nodes:
            node.script = [behaviour] * 100

    def asked(self) -> dict[str, int]:
        """How much each node was asked for."""
        return {node.name: len(node.requests) for node in self.gw.nodes}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    fakes = [FakeNode(f"node-{number}") for number in (1, 2, 3)]
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    with gateway(tmp_path, fakes, limits=limits, gateway={"queue": {"length": 9, "wait": "30s"}}) as gw:
        yield Site(gw)


def answers(node: FakeNode, connection: socket.socket) -> None:
    """What a node that is well says, by any path that a gateway asks."""
    path = node.requests[-1]["line"].split()[1]
    if "embed" in path:
        says(200, {"model": "m", "embeddings": [[0.5]], "embedding": [0.5], "prompt_eval_count": 2})(connection)
    else:
        connection.sendall(HEAD + lines(path == "/api/chat", "one ", "two ", last=True) + END)


def lines(chat: bool, *words: str, last: bool = False) -> bytes:
    said: list[dict[str, Any]] = [{"model": "m", **_part(chat, word), "done": False} for word in words]
    if last:
        counts = {"done": True, "done_reason": "stop", "prompt_eval_count": 7, "eval_count": len(words)}
        said.append({"model": "m", **_part(chat, ""), **counts})
    return b"".join(chunk(json.dumps(one).encode() + b"\n") for one in said)


def _part(chat: bool, word: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": word}} if chat else {"response": word}


def gone(connection: socket.socket) -> None:
    """A node that is gone before it says a word."""
    connection.shutdown(socket.SHUT_RDWR)


def cut(connection: socket.socket) -> None:
    """A node that is gone in the middle of an answer."""
    connection.sendall(HEAD + lines(True, "one ", "two "))
    connection.shutdown(socket.SHUT_RDWR)


def renders(connection: socket.socket) -> None:
    """A node that shows the prompt as its model gets it."""
    shown = json.dumps({"model": "m", RENDERED: {"rendered_template": "<u>Guten Tag!<a>"}}).encode()
    connection.sendall(HEAD + chunk(shown) + END)


@pytest.mark.parametrize("tenant", ["blue", ""])
def test_by_no_path_a_node_of_a_tenant_s_own_is_asked_for_another(site: Site, tenant: str) -> None:
    for path in BODIES:
        seen = [site.ask(tenant, path) for _ in range(6)]
        assert {one.status_code for one in seen} == {200}, (path, seen[0].text)
    assert site.asked()["node-1"] == 0
    before = site.asked()
    assert before["node-2"] + before["node-3"] == 6 * len(BODIES)
    for path in BODIES:
        assert site.ask("red", path).status_code == 200, path
    assert site.asked() == before | {"node-1": len(BODIES)}


def test_nor_while_the_others_are_busy_or_hold_as_many_as_they_may(site: Site) -> None:
    gw, held = site.gw, Held()
    with ThreadPoolExecutor(16) as callers:
        # Nobody leads: the gateway counts by itself, from the first one on. Until then twelve are more than may wait.
        assert site.ask("blue").status_code == 200
        site.do(site.shared, held)
        asked = [callers.submit(site.ask, "blue") for _ in range(12)]
        until(lambda: held.running >= 8, "all slots are taken")
        assert site.asked()["node-1"] == 0
        held.release(12)
        assert {one.result().status_code for one in asked} == {200}

        site.well()
        leader = leading(gw)
        gw.slots = 1  # so that the gateway gives no other where it misses the store
        gw.publish(tags=[TAG])
        for node in gw.nodes:
            leader.place(node.name, OWN if node is site.own else MODEL, 1)
        until(lambda: gw_asks(site, leader), "the gateway asks the store")
        site.do(site.shared, held)
        asked = [callers.submit(site.ask, "blue") for _ in range(5)]
        until(lambda: leader.waiting() == 3, "two run, three wait, and a slot of the tenant's is free")
        assert (leader.used(OWN), site.asked()["node-1"]) == ({}, 0)
        assert site.ask("red").headers["X-Corral-Node"] == "node-1", "its own tenant has it at once"
        assert site.asked()["node-1"] == 1
        held.release(5)
        assert {one.result().status_code for one in asked} == {200}
    assert site.asked()["node-1"] == 1


def gw_asks(site: Site, leader: Any) -> bool:
    """Whether a request has its slot from the store."""
    name = MODEL.encode()
    before = int(leader.ask(b"HGET", b"corral:1:asked", name) or 0)
    assert site.ask("blue").status_code == 200
    return int(leader.ask(b"HGET", b"corral:1:asked", name) or 0) == before + 1


@pytest.mark.parametrize("known", [True, False])
def test_nor_while_the_others_are_down(site: Site, known: bool) -> None:
    """That they are is known by control, or seen by who connects."""
    for node in site.shared:
        node.stop()
    if known:
        site.gw.states |= {node.name: "down" for node in site.shared}
        site.gw.publish(tags=[TAG])
    seen = [one for _ in range(2) for one in site.ask_all("blue").values()]
    assert {one.status_code for one in seen} <= {502, 503}, [one.status_code for one in seen]
    assert site.asked() == {"node-1": 0, "node-2": 0, "node-3": 0}
    assert site.ask("red").status_code == 200
    assert site.asked()["node-1"] == 1


@pytest.mark.parametrize(
    "behaviour", [gone, says(500, {"error": "a fault"}), says(503, {"error": "busy"})], ids=["gone", "500", "503"]
)
def test_nor_when_the_others_fail_before_a_token(site: Site, behaviour: Callable[[socket.socket], None]) -> None:
    site.do(site.shared, behaviour)
    for path, seen in site.ask_all("blue").items():
        assert seen.status_code in (500, 502, 503), path
    assert site.asked()["node-1"] == 0 and all(site.asked()[node.name] for node in site.shared), "they were tried"


def test_nor_to_go_on_with_an_answer_that_was_cut(site: Site) -> None:
    counts = [says(200, {"done": True, "prompt_eval_count": count}) for count in (5, 7)]
    rest = HEAD + lines(False, "three ", last=True) + END
    acts = [cut, renders, *counts, lambda connection: connection.sendall(rest)]
    site.do(site.shared, lambda connection: acts.pop(0)(connection))
    whole = site.ask("blue", stream=True)
    assert "three" in whole.text and '"error"' not in whole.text, "another one went on"
    site.do(site.shared, cut)
    broken = site.ask("blue", stream=True)
    assert '"error"' in broken.text
    assert site.asked()["node-1"] == 0


def test_and_its_tenant_is_served_nowhere_else(site: Site) -> None:
    site.do([site.own], cut)
    assert '"error"' in site.ask("red", stream=True).text
    site.do([site.own], gone)
    for path, seen in site.ask_all("red").items():
        assert seen.status_code in (502, 503), path
    site.own.stop()
    site.gw.states["node-1"] = "down"
    site.gw.publish(tags=[TAG])
    assert {seen.status_code for seen in site.ask_all("red").values()} == {503}
    assert {name: count for name, count in site.asked().items() if name != "node-1"} == {"node-2": 0, "node-3": 0}
