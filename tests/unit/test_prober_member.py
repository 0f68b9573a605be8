"""What gateways are told of a node."""

from __future__ import annotations

import asyncio
import socket
import time

from corral.control.prober import Fleet, Member
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
