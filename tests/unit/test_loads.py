"""Loads that are under way: what control tells its gateways of them, and what controls tell each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.servers import Server, valkey

from corral.control.loads import KEY, SILENT, Loads
from corral.control.prober import Fleet, Member
from corral.fleet.hanging import LOADS
from corral.store.valkey import Valkey


def fleet() -> Fleet:
    made = Fleet()
    made.members = {name: Member(name, f"http://{name}") for name in ("node-1", "node-2")}
    return made


def said(beat: int, **nodes: dict[str, float]) -> bytes:
    return msgspec.json.encode((beat, {name.replace("_", "-"): models for name, models in nodes.items()}))


def test_gateways_hear_of_a_load_while_it_lasts_and_what_it_excuses() -> None:
    member = Member("a", "http://a:1")
    with member.measured.loads_now("big"):
        assert member.entry()["loading"] == {"big:latest": LOADS}
    assert member.entry()["loading"] == {}
    with pytest.raises(RuntimeError), member.measured.loads_now("big"):
        raise RuntimeError
    assert member.entry()["loading"] == {}, "one that fails is over"
    member.measured.loaded("big:latest", 40.0)
    with member.measured.loads_now("big"):
        assert member.entry()["loading"] == {"big:latest": 60.0}, "as long as it took the last time"
    with member.measured.loads_now("big", 100.0):
        assert member.entry()["loading"] == {"big:latest": 150.0}


def test_loads_of_another_control_are_its_nodes_too() -> None:
    made = fleet()
    loads = Loads(None, made)  # type: ignore[arg-type]
    loads.hear({b"other": said(1, node_1={"big:latest": 40.0}, gone={"x": 9.0}), b"newer": b"{}"}, 100.0)
    assert made.members["node-1"].measured.loading == {"big:latest": 40.0}
    with made.members["node-1"].measured.loads_now("small"):
        assert made.members["node-1"].measured.loading == {"big:latest": 40.0, "small:latest": LOADS}
    loads.hear({}, 101.0)
    assert made.members["node-1"].measured.loading == {}


def test_a_control_that_says_nothing_new_is_not_believed() -> None:
    made = fleet()
    loads = Loads(None, made)  # type: ignore[arg-type]
    for at in (100.0, 100.0 + SILENT):
        loads.hear({b"other": said(1, node_1={"big:latest": 40.0})}, at)
        assert made.members["node-1"].measured.loading
    loads.hear({b"other": said(1, node_1={"big:latest": 40.0})}, 100.5 + SILENT)
    assert not made.members["node-1"].measured.loading
    loads.hear({b"other": said(2, node_1={"big:latest": 40.0})}, 101.0 + SILENT)
    assert made.members["node-1"].measured.loading


def test_a_load_of_another_control_that_hangs_excuses_no_longer_than_it_says() -> None:
    made = fleet()
    loads = Loads(None, made)  # type: ignore[arg-type]
    seen = []
    for second in range(60):
        loads.hear({b"other": said(second, node_1={"big:latest": 40.0})}, 100.0 + second)
        seen.append(bool(made.members["node-1"].measured.loading))
    assert seen == [True] * 41 + [False] * 19


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("store")
    with valkey(folder) as server:
        yield server


def test_controls_tell_each_other_through_the_store(store: Server) -> None:
    async def run() -> None:
        client, connected = Valkey(store.url, timeout=5.0), asyncio.Event()
        client.on_connect = connected.set
        task = asyncio.create_task(client.run())
        await connected.wait()
        one, other = fleet(), fleet()
        first, second = Loads(client, one), Loads(client, other)
        measured = other.members["node-2"].measured
        with one.members["node-2"].measured.loads_now("big", 20.0):
            await first.turn(100.0)
            await second.turn(100.0)
            assert measured.loading == {"big:latest": 30.0}
            assert one.members["node-2"].measured.elsewhere == {}, "its own it knows"
        await first.turn(101.0)
        await second.turn(101.0)
        assert measured.loading == {}
        assert await client.request(b"HLEN", KEY) == 0
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(asyncio.wait_for(run(), 60))


def test_without_a_store_nothing_is_known_of_others(store: Server) -> None:
    async def run() -> None:
        made = fleet()
        loads = Loads(Valkey(store.url, timeout=5.0), made)
        loads.hear({b"other": said(1, node_1={"big:latest": 40.0})}, 100.0)
        task = asyncio.create_task(loads.run())
        await asyncio.sleep(0)
        assert made.members["node-1"].measured.loading == {}
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())
