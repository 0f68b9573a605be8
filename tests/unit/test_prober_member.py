"""What gateways are told of a node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from corral.control.gateways import Told
from corral.control.prober import Fleet, Member
from corral.control.reached import TIMEOUT
from corral.control.snapshot import Hub
from corral.fleet.catalogue import aside


def member(**more: object) -> Member:
    names = ("m:1", "new:1", aside("m:1", "previous"))
    return Member("n1", "http://n1", up=True, tags=[{"name": name} for name in names], **more)  # type: ignore[arg-type]


def test_what_is_not_verified_or_kept_aside_is_nobodys_to_use() -> None:
    assert [tag["name"] for tag in member().entry()["tags"]] == ["m:1", "new:1"]
    assert [tag["name"] for tag in member(withheld={"new:1"}).entry()["tags"]] == ["m:1"]
    assert member(withheld={"new:1"}).describe()["models"] == ["m:1"]
    loaded = member(ps=[{"name": "m:1"}, {"name": aside("m:1", "aside")}])
    assert ([one["name"] for one in loaded.entry()["ps"]], loaded.resident) == (["m:1"], ["m:1"])


def test_a_node_that_is_preloaded_is_not_in_service() -> None:
    held = member(preloading="preloading m:1 (42%)")
    assert (held.state, held.entry()["state"], held.reason) == ("draining", "draining", "preloading m:1 (42%)")
    held.up = False
    held.error = "no connection: connection refused"
    assert (held.state, held.reason) == ("down", "no connection: connection refused")
    assert (member(warning="preloading failed").state, member().state) == ("ready", "ready")


def test_a_node_says_why_it_is_down_in_the_system_s_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens: a connection is refused
        nodes = [Member("a", f"http://127.0.0.1:{taken.getsockname()[1]}"), Member("b", "http://no-such-host.invalid")]

        async def ask() -> None:
            fleet = Fleet()
            await fleet.start(nodes)
            await fleet.close()

        asyncio.run(ask())
    refused, unknown = (node.describe() for node in nodes)
    assert (refused["state"], refused["reason"]) == ("down", "no connection: connection refused")
    assert unknown["state"] == "down" and unknown["reason"].startswith(("no connection: ", "no answer within"))


def test_a_node_that_is_far_away_is_no_node_that_is_down() -> None:
    """Its answers take long, each less than a probe waits for one, and all together more."""
    body = {"/api/ps": b'{"models":[]}', "/api/tags": b'{"models":[]}', "/api/version": b'{"version":"1"}'}
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                asked.append(head.split()[1].decode())
                await asyncio.sleep(TIMEOUT * 0.4)
                said = body[asked[-1]]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    async def probe() -> Member:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            far = Member("n1", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            fleet = Fleet()
            await fleet.start([far])
            await fleet.close()
        return far

    far = asyncio.run(probe())
    assert asked == list(body)
    assert (far.state, far.reason, far.version) == ("ready", None, "1")


def test_a_node_whose_canary_fails_says_so_while_it_is_up() -> None:
    held = member()
    held.measured.resident({"m:1", "new:1"}, time.monotonic())
    assert held.reason is None
    held.measured.residents["m:1"].failing = True
    assert (held.state, held.reason) == ("ready", "its canary gets no token from m:1")


def test_the_memory_of_a_node_is_as_configured() -> None:
    held = member(memory=22 << 30)
    assert held.describe()["memory"] == 22 << 30
    assert member().describe()["memory"] is None
    assert not held.loads.locked()


def on_gpu(*shares: float, **more: object) -> Member:
    """A node that held m:1 on its GPU, by these shares of it one after the other."""
    made = member(**more)
    for share in shares:
        made.ps = [{"name": "m:1", "size": 1000, "size_vram": int(share * 1000)}]
        made.measured.holds(made.ps)
    return made


@pytest.mark.parametrize(
    ("accelerator", "shares", "expected"),
    [
        ("gpu", (1.0,), []),
        ("gpu", (0.6,), []),
        ("gpu", (0.4,), ["m:1"]),
        ("cpu", (1.0, 0.0), []),
        (None, (0.0,), []),
        (None, (1.0, 0.0), ["m:1"]),
        (None, (1.0, 0.0, 1.0), []),
        (None, (0.4, 0.3), []),
    ],
)
def test_a_model_that_is_on_the_cpu_is_told_where_a_gpu_is_declared_or_was_seen(
    accelerator: str | None, shares: tuple[float, ...], expected: list[str]
) -> None:
    held = on_gpu(*shares, accelerator=accelerator)
    assert held.on_cpu == held.entry()["on_cpu"] == expected
    assert held.reason == ("m:1 runs on its CPU" if expected else None)
    held.up = False
    assert held.on_cpu == []


def test_a_node_is_suspect_while_a_gateway_says_so_of_a_runner() -> None:
    fleet, held = Fleet(), member()
    fleet.members = {"n1": held}
    assert fleet.suspect("gateway-1", {"n1": frozenset({"m:1"}), "gone": frozenset({"x"})}, {})
    assert fleet.suspect("gateway-2", {"n1": frozenset({"m:1"})}, {})
    assert not fleet.suspect("gateway-2", {"n1": frozenset({"m:1"})}, {}), "it has said so"
    assert (held.state, held.condition, held.describe()["state"]) == ("ready", "suspect", "suspect")
    assert held.reason == "m:1 gives no tokens there, says gateway-1, gateway-2"
    assert held.entry()["state"] == "ready", "its other models are served"
    assert held.entry()["suspects"] == {"m:1": ["gateway-1", "gateway-2"]}
    fleet.suspect("gateway-1", {}, {})
    held.suspected["gateway-2"] = time.monotonic() - 60, frozenset({"m:1"})
    assert (held.condition, held.reason) == ("ready", None)
    held.spared = "as more than half of the nodes do not"
    assert (held.condition, held.answers, held.up) == ("suspect", False, True)
    held.draining = True
    assert held.condition == "draining"


def test_what_a_gateway_suspects_is_told_to_all_as_soon_as_it_is_heard() -> None:
    fleet = Fleet()
    fleet.members = {"n1": member()}
    hub = Hub(None, fleet, SimpleNamespace(connected=False), [], 600.0)  # type: ignore[arg-type]
    hub.refresh()
    suspects: list[object] = []
    for said in ({"n1": frozenset({"m:1"})}, {"n1": frozenset({"m:1"})}, {}):
        asyncio.run(hub.heard("gateway-1", hub.version, Told(suspects=said)))
        suspects.append((hub.number, json.loads(hub.content())["nodes"][0]["suspects"]))
    assert suspects == [(2, {"m:1": ["gateway-1"]}), (2, {"m:1": ["gateway-1"]}), (3, {})]


def test_a_node_with_too_many_slots_is_told_of() -> None:
    fleet, held = Fleet(), member()
    fleet.members = {"n1": held}
    fleet.suspect("gateway-1", {}, {"n1": frozenset({"m:1"})})
    assert held.condition == "ready"
    assert held.reason is not None and "m:1 wait at it though they have a slot" in held.reason
    fleet.suspect("gateway-1", {}, {})
    assert held.reason is None


def test_what_does_not_answer_goes_as_far_as_the_brakes_let_it() -> None:
    dead: set[str] | None = None

    async def second() -> set[str] | None:
        return dead

    async def run() -> None:
        nonlocal dead
        looked = asyncio.Event()
        fleet = Fleet(looked.set)
        fleet.second = second

        async def until(holds: Callable[[], bool]) -> None:
            while not holds():
                looked.clear()
                await looked.wait()

        nodes = [Member(name, f"http://127.0.0.1:1/{name}", answered=True, up=True) for name in "abc"]
        await fleet.start(nodes)
        assert [node.up for node in nodes] == [True] * 3, "one miss is none"
        await asyncio.gather(*(fleet.probe(node) for node in nodes))
        assert [(node.up, node.condition) for node in nodes] == [(True, "suspect")] * 3
        assert nodes[0].entry()["state"] == "ready"
        dead = {"a", "b"}
        await until(lambda: not nodes[0].up)
        assert [node.condition for node in nodes] == ["down", "suspect", "suspect"]
        dead = {"a", "b", "c"}
        await until(lambda: not nodes[2].up)
        assert [node.condition for node in nodes] == ["down"] * 3, "none is left"
        await fleet.close()

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("reached", [True, False, None])
def test_the_second_word_is_heard_before_a_node_goes_not_after(reached: bool | None) -> None:
    async def second() -> set[str] | None:
        return None if reached is None else set() if reached else {"a"}

    async def run() -> None:
        fleet, node = Fleet(), Member("a", "http://127.0.0.1:1", answered=True, up=True)
        fleet.second, fleet.members = second, {"a": node}
        await fleet.start([node])
        await fleet.probe(node)
        assert (node.misses, node.up, node.condition) == (2, bool(reached), "suspect" if reached else "down")
        await fleet.close()

    asyncio.run(run())


def test_a_node_that_answers_nonsense_is_down_whatever_else_it_holds() -> None:
    async def run() -> None:
        fleet = Fleet()
        tags = [{"name": "rare:1"}]
        lying, silent = (Member(name, "http://x", answered=True, up=True, tags=tags) for name in ("lying", "silent"))
        for member, wrong in ((lying, True), (silent, False)):
            member.misses, member.wrong = 2, wrong
        fine = Member("fine", "http://x", answered=True, up=True, tags=[{"name": "m:1"}])
        for member, up in ((lying, False), (silent, True)):
            fleet.members = {
                one.name: one for one in (member, fine, Member("other", "http://x", answered=True, up=True))
            }
            fleet._judge()
            assert member.up is up

    asyncio.run(run())
