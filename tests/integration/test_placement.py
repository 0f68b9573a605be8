"""The leader's hand: real nodes (simulated models), a real Valkey, gateways' slots; more models than room."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from support.limits import flush
from support.servers import Server, embedded_node, valkey
from support.slots import Gateway, gateways, granting

from corral.control import known
from corral.control import placement as hand
from corral.control.ollama import Ollama
from corral.control.placement import FRESH, Placement, Spot
from corral.control.prober import Fleet, Member
from corral.fleet.placement import Demand
from corral.fleet.slots import PlaceState
from corral.fleet.tickets import NEVER, PICKY
from corral.store import keeper
from corral.store.demand import TERM_BITS, generation
from corral.store.lua import PREFIX
from corral.store.slots import Wanted
from corral.store.valkey import Valkey

LOAD = 0.5
MODELS = ("a:latest", "b:latest", "c:latest")
SIMULATION = {"models": [{"name": name, "load": LOAD, "prefill": 1e6} for name in MODELS], "max_loaded": 1}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        made = []
        for number in range(2):
            folder: Path = tmp_path_factory.mktemp(f"node-{number}")
            (folder / "simulation.json").write_text(json.dumps(SIMULATION))
            extra = ("--simulated", str(folder / "simulation.json"))
            made.append(stack.enter_context(embedded_node(folder, None, None, "simulated", *extra)))
        yield made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey(tmp_path_factory.mktemp("store")) as server:
        yield server


class Leader:
    """Ticks until it is ended."""

    def __init__(self, url: str, fleet: Fleet, term: int = 1, catalogue: Callable[[str], Demand] = Demand) -> None:
        self.store = Valkey(url, timeout=5.0)
        self.client = httpx.AsyncClient()
        node = lambda member: Ollama(self.client, member.url)  # noqa: E731
        self.placement = Placement(self.store, node, lambda model: {}, catalogue, term=term)
        self.fleet = fleet
        self.task = asyncio.create_task(self._run())
        self.connection = asyncio.create_task(self.store.run())

    async def _run(self) -> None:
        while True:
            if self.store.connected:
                await self.placement.tick(self.fleet.members.values(), time.monotonic())
            await asyncio.sleep(0.1)

    async def end(self) -> None:
        for task in (self.task, self.connection):
            task.cancel()
        (ended, _) = await asyncio.gather(self.task, self.connection, return_exceptions=True)
        await self.placement.close()
        await self.client.aclose()
        assert isinstance(ended, asyncio.CancelledError), ended


@asynccontextmanager
async def led(
    nodes: list[Server], store: Server, catalogue: Callable[[str], Demand] = Demand
) -> AsyncIterator[tuple[Fleet, Leader, Gateway]]:
    """A fleet of two nodes with room for a model each, its leader, and a gateway."""
    async with gateways(store.url, 1) as (gateway,), httpx.AsyncClient() as client:
        for node in nodes:
            for entry in (await client.get(node.url + "/api/ps")).json()["models"]:
                await Ollama(client, node.url).unload(entry["name"])
        fleet = Fleet()
        await fleet.start([Member(f"n{at}", node.url, slots=2, max_models=1) for at, node in enumerate(nodes)])
        leader = Leader(store.url, fleet, catalogue=catalogue)
        try:
            yield fleet, leader, gateway
        finally:
            await leader.end()
            await fleet.close()


async def served(gateway: Gateway, fleet: Fleet, name: str, model: str) -> str:
    """Ask for a slot, see that the model is in its node's memory, give it back; the node's name."""
    answer, more = await gateway.ask(Wanted(name, model))
    if not answer.node:
        assert answer.position >= 1
        answer = await asyncio.wait_for(more, 120)
    async with httpx.AsyncClient() as client:
        found = (await client.get(fleet.members[answer.node].url + "/api/ps")).json()["models"]
        assert model in [entry["name"] for entry in found], f"a slot on {answer.node}, which has {found}"
        await asyncio.sleep(0.05)
    gateway.slots.end(name)
    return answer.node


def test_the_faster_node_gets_more(store: Server) -> None:
    """Both have the model; one makes four times as many tokens a second, as streams show."""

    async def work() -> None:
        async with gateways(store.url, 1) as (gateway,), httpx.AsyncClient() as client:
            fleet = Fleet()
            for name in ("n0", "n1"):
                fleet.members[name] = member = Member(name, "http://127.0.0.1:9", slots=8)
                member.up, member.tags, member.ps = True, [{"name": "a:latest"}], [{"name": "a:latest"}]
            node = lambda member: Ollama(client, member.url)  # noqa: E731
            placement = Placement(gateway.store, node, lambda model: {}, term=1, speeds=fleet.speeds)
            await placement.tick(fleet.members.values(), time.monotonic())
            before = await gateway.store.request(b"HGETALL", PREFIX + b"places:a:latest")
            for name, speed in (("n0", 20), ("n1", 80)):
                fleet.speeds.note(name, "a:latest", speed, 1.0)
            await placement.tick(fleet.members.values(), time.monotonic())
            assert await gateway.store.request(b"HGETALL", PREFIX + b"places:a:latest") != before
            given = [(await gateway.ask(Wanted(f"r{number}", "a:latest")))[0].node for number in range(10)]
            assert given.count("n1") == 8 and given.count("n0") == 2
            # And nothing is told again while nothing changes.
            after = await gateway.store.request(b"HGETALL", PREFIX + b"places:a:latest")
            fleet.speeds.note("n1", "a:latest", 90, 1.0)
            await placement.tick(fleet.members.values(), time.monotonic())
            assert await gateway.store.request(b"HGETALL", PREFIX + b"places:a:latest") == after

    asyncio.run(work())


def test_models_come_and_go_with_who_waits_for_them(nodes: list[Server], store: Server) -> None:
    """Three models on two nodes with room for one each: every request runs where its model is in memory."""

    async def work() -> None:
        async with led(nodes, store) as (fleet, leader, gateway):
            asked = (served(gateway, fleet, f"r{number}", MODELS[number % 3]) for number in range(30))
            async with asyncio.timeout(120):
                assert set(await asyncio.gather(*asked)) == {"n0", "n1"}
            reasons = [text for model in MODELS for _, text in leader.placement.why(model)]
            assert any("load on" in text for text in reasons)
            assert any("makes room" in text for text in reasons), reasons
            async with asyncio.timeout(120):
                while True:  # its next look at the store: nobody waits any more
                    told = [leader.placement.about(model, time.monotonic()) for model in MODELS]
                    if {one["waits"] for one in told} == {None}:
                        break
                    await asyncio.sleep(0.05)
            assert 1 <= sum(place["state"] == "resident" for one in told for place in one["places"]) <= 2
            assert all(decision["ago"] >= 0 for one in told for decision in one["decisions"])

    asyncio.run(work())


def test_a_new_leader_goes_on_and_a_flushed_store_is_told(nodes: list[Server], store: Server) -> None:
    async def work() -> None:
        async with led(nodes, store) as (fleet, leader, gateway):
            async with asyncio.timeout(120):
                where = await served(gateway, fleet, "r1", MODELS[0])
            await leader.end()
            await flush(int(store.url.rpartition(":")[2].partition("/")[0]))
            await granting(gateway)
            _, more = await gateway.ask(Wanted("r2", MODELS[0]))
            await asyncio.sleep(0.3)
            assert not more.done(), "nobody has told where it is"
            second = Leader(store.url, fleet, 2)
            try:
                assert (await asyncio.wait_for(more, 120)).node == where
                assert not any("load on" in text for _, text in second.placement.why(MODELS[0]))
                # A leader that stays tells a store that forgets, too.
                gateway.slots.end("r2")
                await flush(int(store.url.rpartition(":")[2].partition("/")[0]))
                await granting(gateway)
                async with asyncio.timeout(120):
                    assert await served(gateway, fleet, "r3", MODELS[0]) == where
                # What the first one says now is heard no more.
                first = await generation(second.store, 1)
                assert not await keeper.place(second.store, where, MODELS[0], "absent", first, 1, 1e6)
            finally:
                leader.task = leader.connection = asyncio.create_task(asyncio.sleep(600))
                leader.client = httpx.AsyncClient()
                await second.end()

    asyncio.run(work())


def test_a_node_that_goes_has_no_slots(nodes: list[Server], store: Server) -> None:
    async def work() -> None:
        async with led(nodes, store) as (fleet, leader, gateway):
            async with asyncio.timeout(120):
                where = await served(gateway, fleet, "r1", MODELS[0])
            member = fleet.members[where]
            await fleet.remove(where)
            async with asyncio.timeout(120):
                while (where, MODELS[0]) in leader.placement.spots:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            async with asyncio.timeout(120):
                assert await served(gateway, fleet, "r2", MODELS[0]) != where
            await fleet.add(member)

    asyncio.run(work())


def test_a_copy_that_does_not_answer_control_spares_nobody_a_load(nodes: list[Server], store: Server) -> None:
    async def work() -> None:
        async with led(nodes, store) as (fleet, _, gateway):
            first = await served(gateway, fleet, "r1", "a:latest")
            # It is the last copy, so it is not put out of use; but gateways do not reach it either.
            fleet.members[first].spared = "as no other has a:latest"
            wanted = Wanted("r2", "a:latest", PICKY, preferred=(NEVER + first,))
            answer, more = await gateway.ask(wanted)
            assert not answer.node
            answer = await asyncio.wait_for(more, 120)
            assert answer.node in fleet.members.keys() - {first}

    asyncio.run(work())


def test_what_a_probe_found_before_a_load_or_an_unload_undoes_neither() -> None:
    member = Member("n1", "http://127.0.0.1:9", up=True, tags=[{"name": "a:latest"}])
    placement = Placement(
        Valkey("redis://127.0.0.1:9"), lambda member: Ollama(httpx.AsyncClient(), ""), lambda model: {}
    )
    placement.spots["n1", "a:latest"] = Spot(PlaceState.RESIDENT, 100.0)
    placement.finished("n1", "a:latest", PlaceState.RESIDENT, 100.0)
    placement.look([member], {}, 100.5)
    assert placement.spots["n1", "a:latest"].state is PlaceState.RESIDENT
    placement.look([member], {}, 100.1 + FRESH)
    assert placement.spots["n1", "a:latest"].state is PlaceState.ABSENT
    placement.finished("n1", "a:latest", PlaceState.ABSENT, 200.0)
    member.ps = [{"name": "a:latest"}]
    placement.look([member], {}, 200.5)
    assert placement.spots["n1", "a:latest"].state is PlaceState.ABSENT
    del placement.spots["n1", "a:latest"]  # the store has heard
    placement.look([member], {}, 200.6)
    assert ("n1", "a:latest") not in placement.spots
    placement.look([member], {}, 200.1 + FRESH)
    assert placement.spots["n1", "a:latest"].state is PlaceState.RESIDENT


async def stands(fleet: Fleet, leader: Leader, model: str, *names: str) -> None:
    """Wait until a model is resident on just these nodes, as they say and as the leader has it."""
    async with asyncio.timeout(120):
        while True:
            said = {name for name, member in fleet.members.items() if model in member.resident}
            spots = leader.placement.spots.items()
            known = {node for (node, name), spot in spots if name == model and spot.state is PlaceState.RESIDENT}
            if said == known == set(names):
                return
            await asyncio.sleep(0.05)


def test_least_copies_come_back(nodes: list[Server], store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an unload by hand, and after a node was lost; not where an operator unloaded it, before somebody asks
    for it; never more than nodes that hold it."""
    monkeypatch.setattr(known, "SHORT", 0.3)
    monkeypatch.setattr(hand, "FRESH", 0.3)

    async def work() -> None:
        catalogue = lambda name: Demand(name, copies=2 if name == MODELS[0] else 0)  # noqa: E731
        async with led(nodes, store, catalogue) as (fleet, leader, gateway):
            await stands(fleet, leader, MODELS[0], "n0", "n1")
            assert any("of 2 copies" in text for _, text in leader.placement.why(MODELS[0]))
            await Ollama(leader.client, nodes[0].url).unload(MODELS[0])
            await stands(fleet, leader, MODELS[0], "n1")
            await stands(fleet, leader, MODELS[0], "n0", "n1")
            lost = fleet.members["n0"]
            await fleet.remove("n0")
            await stands(fleet, leader, MODELS[0], "n1")
            await Ollama(leader.client, nodes[0].url).unload(MODELS[0])
            await fleet.add(lost)
            await stands(fleet, leader, MODELS[0], "n0", "n1")
            for member in fleet.members.values():
                member.released.add(MODELS[0])
                await Ollama(leader.client, member.url).unload(MODELS[0])
            await stands(fleet, leader, MODELS[0])
            await asyncio.sleep(1.5)
            await stands(fleet, leader, MODELS[0])
            async with asyncio.timeout(120):
                assert await served(gateway, fleet, "r1", MODELS[0]) in ("n0", "n1")

    asyncio.run(work())


def test_an_unload_that_gets_no_turn_is_given_up_and_tried_again(
    nodes: list[Server], store: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand, "UNLOAD", 0.3)

    async def work() -> None:
        async with led(nodes[:1], store) as (fleet, leader, gateway):
            async with asyncio.timeout(120):
                assert await served(gateway, fleet, "r1", MODELS[0]) == "n0"
            await fleet.members["n0"].loads.acquire()  # somebody loads or unloads there, and does not end
            asked = asyncio.create_task(served(gateway, fleet, "r2", MODELS[1]))
            async with asyncio.timeout(120):
                while not any("did not unload it" in text for _, text in leader.placement.why(MODELS[0])):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            fleet.members["n0"].loads.release()
            assert await asyncio.wait_for(asked, 120) == "n0"

    asyncio.run(work())


def test_what_a_leader_of_the_past_still_wants_is_not_done(
    nodes: list[Server], store: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """It stood still between its decision and what it does at a node: another leads meanwhile."""

    async def work() -> None:
        async with led(nodes[:1], store) as (fleet, leader, gateway):
            member, refused = fleet.members["n0"], "its {} goes no further: another control leads, or led, in term 2"

            async def until_refused(what: str) -> None:
                async with asyncio.timeout(120):
                    while refused.format(what) not in caplog.text:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)

            async with asyncio.timeout(120):
                assert await served(gateway, fleet, "r1", MODELS[0]) == "n0"
            async with httpx.AsyncClient() as client:
                node = Ollama(client, member.url)
                await member.loads.acquire()
                asked = asyncio.create_task(served(gateway, fleet, "r2", MODELS[1]))
                async with asyncio.timeout(120):
                    while ("n0", MODELS[0]) not in leader.placement._work:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                await leader.store.request(b"SET", keeper.TERM, b"2")
                member.loads.release()
                await until_refused("unload")
                assert await node.resident(MODELS[0])
                await node.unload(MODELS[0])
                await until_refused("load")
                assert not await node.resident(MODELS[1])
            # Nor is its word heard on a place that the one who leads has not spoken of.
            late = await generation(leader.store, 1)
            assert not await keeper.place(leader.store, "n1", MODELS[2], "resident", late, 1, 1e6)
            await leader.store.request(b"DEL", keeper.TERM)
            await asyncio.wait_for(asked, 120)

    asyncio.run(work())


def test_a_leader_puts_right_what_gateways_said_while_nobody_led(nodes: list[Server], store: Server) -> None:
    """They had the model where it is not, and where it is nowhere; and a word of the store's that is later than all of
    this leader's is no end of it."""

    async def work() -> None:
        async with led(nodes, store) as (fleet, leader, gateway):
            async with asyncio.timeout(120):
                where = await served(gateway, fleet, "r1", MODELS[0])
            gateway.slots.stand(MODELS[0], [("n0", 2), ("n1", 2)])
            gateway.slots.stand(MODELS[1], [("n0", 2)])
            total = PREFIX + b"total:"
            async with asyncio.timeout(120):
                while True:
                    counts = await gateway.store.request(b"MGET", *(total + name.encode() for name in MODELS[:2]))
                    if [int(count or 0) for count in counts] == [2, 0]:
                        break
                    await asyncio.sleep(0.05)
            places = await gateway.store.request(b"HGETALL", PREFIX + b"places:" + MODELS[0].encode())
            assert [
                name.decode() for name, text in zip(places[::2], places[1::2], strict=True) if b"resident" in text
            ] == [where]
            # Flushed between the two calls that say something, the store has a generation beyond its new counter.
            await gateway.store.request(b"DEL", PREFIX + b"generation:1")
            leader.placement.spots[where, MODELS[0]].told = ""
            async with asyncio.timeout(120):
                while leader.placement.spots[where, MODELS[0]].told != "resident":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert leader.placement.spots[where, MODELS[0]].generation > (1 << TERM_BITS) + 1

    asyncio.run(work())
