"""Loads that take from a node what its other models need: the disk, the bus, the memory's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.fleet import MODEL, SIMULATION, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.load import CHAT, WHOLE, Client, body_of
from support.process import until

from corral.fleet.hanging import LOADS

EJECTED, FROZEN = "corral_ejections_total", "corral_ejections_frozen_total"
BUDGET, CANARY, EJECTED_WITHIN = 5.0, 4.0, 10.0
LOAD, LONG = 13.0, 40.0


@pytest.fixture(scope="module")
def starved(tmp_path_factory: pytest.TempPathFactory, runs: int) -> Iterator[Fleet]:
    """A fleet whose first node gives no token while it loads; the large models, two for each run, are there alone."""
    more = [{"name": f"big-{turn}:latest", "load": LOAD} for turn in range(1, runs + 1)]
    more += [{"name": f"huge-{turn}:latest", "load": LONG} for turn in range(1, runs + 1)]
    first = {"models": [*SIMULATION["models"], *more], "stalls": True, "max_loaded": 3 + len(more)}
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    pairs = zip(("node-1", "node-2"), folders, (first, SIMULATION), strict=True)
    nodes = [SimulatedNode(name, folder, simulation) for name, folder, simulation in pairs]
    with run_fleet(tmp_path_factory.mktemp("starved"), patience="60s", nodes=nodes) as made:
        made.all_ready()
        made.stack.until_continued(MODEL)
        yield made


def test_a_stream_that_stands_still_beside_a_load_goes_on_behind_it(
    starved: Fleet, turn: int, matrix: Callable[[str, str, str], None]
) -> None:
    before = starved.sum_of(EJECTED), starved.sum_of(FROZEN)
    client = starved.client()
    with starved.load(clients=8, paths=[CHAT], tokens=[20], name="beside") as load:
        load.more(8, "node-1")
        answer = client.ask(CHAT, body_of(CHAT, f"big-{turn}:latest", 2), "loads")
        load.more(8, "node-1")
    client.close()
    assert (answer.fate, answer.node) == (WHOLE, "node-1"), str(answer)
    assert [str(one) for one in load.answers if one.fate != WHOLE or one.attempts != 1] == []
    longest = max(one.ended - one.began for one in load.answers)
    assert longest > BUDGET + CANARY + 1, "none stood still for as long as an ejection takes"
    assert (starved.sum_of(EJECTED), starved.sum_of(FROZEN)) == before
    assert set(starved.states().values()) == {"ready"}
    matrix("decodes starved by a load beside them", "0 ejections, streams whole", f"0, stood still for {longest:.0f} s")


def test_a_runner_that_hangs_beside_a_load_is_ejected_once_that_excuses_it_no_more(
    starved: Fleet, turn: int, matrix: Callable[[str, str, str], None]
) -> None:
    node, huge = starved.nodes["node-1"], f"huge-{turn}:latest"
    before = starved.sum_of(EJECTED)
    most = LOADS + BUDGET + CANARY + EJECTED_WITHIN
    clients = [Client(starved.stack.url, starved.stack.key, timeout=2 * most) for _ in range(13)]
    with ThreadPoolExecutor(13) as pool:
        # Refused or answered: the leader loads it either way.
        loads = pool.submit(clients[0].ask, CHAT, body_of(CHAT, huge, 2), "loads")
        try:
            until(lambda: node.work(huge)["loads"], "it loads", every=0.05)
            node.fault(kind="hang", model=MODEL)
            began = time.monotonic()
            # Each its own prompt: where all begin alike, one node may have all of them.
            asked = [
                pool.submit(each.ask, CHAT, body_of(CHAT, MODEL, 8, f"{at} horses"), f"hangs-{at}")
                for at, each in enumerate(clients[1:])
            ]
            until(lambda: node.work()["running"], "it has work", every=0.05)
            until(lambda: starved.sum_of(EJECTED) > before, "it is ejected", most, every=0.2)
            took = time.monotonic() - began
            answers = [each.result() for each in asked]
        finally:
            node.well()
        loads.result()
    for client in clients:
        client.close()
    assert [str(answer) for answer in answers if answer.fate != WHOLE] == []
    assert LOADS + BUDGET < took < most
    until(lambda: starved.residents(huge) == {"node-1"}, "it is loaded", 60)
    until(lambda: set(starved.states().values()) == {"ready"}, "it is suspect no more")
    matrix("runner hung beside a load", "ejected <= 10 s after its budget (5 s) and the load's (15 s)", f"{took:.1f} s")
