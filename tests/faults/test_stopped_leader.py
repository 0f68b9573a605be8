"""The control that leads stands still until another one leads, and comes back: what it still wants is not done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from support.fleet import SIMULATION, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.leader import Leader
from support.load import CHAT, WHOLE, Answer, body_of
from support.postgres import Postgres, name_of, postgres
from support.process import until
from support.standby import Standby, leads

from corral.store.demand import TERM_BITS
from corral.store.keeper import LEADER, TERM
from corral.store.lua import PREFIX

Matrix = Callable[[str, str, str], None]

ONE, OTHER, BIG = "one:latest", "other:latest", "big:latest"
USUAL = {"load": 0.1, "prefill": 5000.0, "decode": 20.0, "slots": 64}
MODELS = [{"name": ONE} | USUAL, {"name": OTHER} | USUAL, {"name": BIG} | USUAL | {"load": 5.0}]
ROOM = "5GiB"
"""Of each node: for one model."""
WATCHED = 3.0
"""For so long (seconds) the one that came back is watched: it has a turn each half second."""


class Two:
    """A fleet with two controls on one database."""

    def __init__(self, fleet: Fleet, standby: Standby, server: Postgres, database: str) -> None:
        self.fleet, self.standby, self.store = fleet, standby, Leader(fleet.valkey.url)
        self._server, self._database = server, database
        own = fleet.stack.admin("status")["control"]
        self._both = [(int(own["pid"]), str(own["url"])), (standby.process.pid, standby.url)]

    def leads(self, url: str) -> bool:
        return leads(url, self.fleet.stack.admin_key)

    def in_order(self) -> tuple[tuple[int, str], tuple[int, str]]:
        """The one that leads, and the other."""
        until(lambda: sum(self.leads(url) for _, url in self._both) == 1, "one of them leads")
        first, second = self._both
        return (first, second) if self.leads(first[1]) else (second, first)

    def lease(self) -> list[tuple[object, ...]]:
        """Who has it in the database, and in which term."""
        return self._server.execute("SELECT holder, term FROM leases", self._database)

    def term(self) -> int:
        return int(self.store.ask(b"GET", TERM))

    def said(self, model: str) -> dict[str, tuple[str, int]]:
        """Of each node the last word on a model, and the term that it was said in."""
        flat = self.store.ask(b"HGETALL", PREFIX + b"places:" + model.encode())
        words = [text.decode().split(" ") for text in flat[1::2]]
        return {
            node.decode(): (word[0], int(word[1]) >> TERM_BITS) for node, word in zip(flat[::2], words, strict=True)
        }

    def loads(self) -> dict[tuple[str, str], int]:
        """How often each node loaded each model."""
        nodes = self.fleet.nodes.items()
        return {(name, model): node.work(model)["loads"] for name, node in nodes for model in (ONE, OTHER, BIG)}

    def resident(self) -> dict[str, str]:
        """What each node has in memory, by its own word."""
        asked = {name: httpx.get(node.url + "/api/ps").json()["models"] for name, node in self.fleet.nodes.items()}
        return {name: entry["name"] for name, models in asked.items() for entry in models}

    def ask(self, model: str) -> Answer:
        client = self.fleet.client()
        try:
            return client.ask(CHAT, body_of(CHAT, model, 4), f"{model[:-7]}-{time.monotonic_ns()}")
        finally:
            client.close()

    def stands(self, *models: str) -> None:
        """Have these models in memory, one on each node, and nothing under way."""

        def done() -> bool:
            for model in models:
                assert self.ask(model).fate == WHOLE
            words = {model: [state for state, _ in self.said(model).values()] for model in models}
            return sorted(self.resident().values()) == sorted(models) and all(
                states.count("resident") == 1 and not {"loading", "draining"} & {*states} for states in words.values()
            )

        until(done, f"{models} are in memory", 120, every=0.3)

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def follows(self, url: str, before: int) -> int:
        """Wait until this one leads, and its term is known; the term."""
        until(lambda: self.leads(url) and int(self.store.ask(b"GET", LEADER) or 0) > before, "the other one leads")
        return self.term()

    def watch(self, first: str, second: str, term: int) -> None:
        """The one that is back leads no more, and nothing that is done is its doing."""
        lease, loads, resident = self.lease(), self.loads(), self.resident()
        words = {model: self.said(model) for model in (ONE, OTHER, BIG)}
        back, seen = time.monotonic(), 0
        while time.monotonic() < back + WATCHED or not seen:
            assert int(self.store.ask(b"GET", LEADER)) == self.term() == term
            assert self.resident() == resident
            assert {model: self.said(model) for model in (ONE, OTHER, BIG)} == words
            seen += 1
        until(lambda: not self.leads(first), "it knows")
        assert self.leads(second)
        assert (self.lease(), self.loads()) == (lease, loads)
        for log in (self.fleet.folder / "state/logs/control.log", self.standby.process.log):
            assert "Traceback" not in log.read_text(), "callers that left meanwhile are no fault of its own"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("two")
    with ExitStack() as exits:
        server = exits.enter_context(postgres())
        database = server.database()
        simulation = {"models": [*SIMULATION["models"], *MODELS], "max_loaded": 1}
        nodes = [SimulatedNode(name, folder, simulation) for name in ("node-1", "node-2")]
        # A self-test of each model would load it now and then.
        more = {"memory": ROOM, "database": database, "continuation": False}
        fleet = exits.enter_context(run_fleet(folder, "20s", nodes=nodes, slots=4, **more))
        standby = Standby(fleet.folder / "state", folder / "standby")
        exits.callback(standby.close)
        yield Two(fleet, standby, server, name_of(database))


def whole(answers: list[Future[Answer]]) -> list[str]:
    """Those that are not."""
    return [str(one.result()) for one in answers if one.result().fate != WHOLE]


BAR = "what it still wants is refused, one leads, 0 requests lost"


def test_a_leader_that_is_stopped_in_mid_load(two: Two, matrix: Matrix) -> None:
    """When it comes back and hears that the model is loaded, that has left the memory again."""
    two.fleet.all_ready()
    (pid, first), (_, second) = two.in_order()
    two.stands(ONE, OTHER)
    before, loads = two.term(), two.loads()
    with ThreadPoolExecutor(4) as pool, two.fleet.load(ONE, clients=2, paths=[CHAT], think=0.2, name="beside") as load:
        load.more(4)
        asked = [pool.submit(two.ask, BIG) for _ in range(4)]
        until(
            lambda: (
                sum(count for (_, model), count in two.loads().items() if model == BIG)
                > sum(count for (_, model), count in loads.items() if model == BIG)
            ),
            "it is being loaded",
        )
        (node,) = [name for (name, model), count in two.loads().items() if model == BIG and count > loads[name, BIG]]
        with two.stopped(pid):
            stopped = time.monotonic()
            term = two.follows(second, before)
            led = time.monotonic() - stopped
            assert whole(asked) == []
            until(lambda: two.said(BIG)[node] == ("resident", term), "the next one knows where it is")
            asked.append(pool.submit(two.ask, OTHER))
            until(lambda: two.said(BIG)[node] == ("absent", term), "and has it unloaded for another", 120)
            assert whole(asked) == []
            load.more(4)
        two.watch(first, second, term)
        load.more(4)
        assert two.ask(OTHER).fate == WHOLE
    assert load.unlike(WHOLE) == []
    answered = len(load.answers) + len(asked) + 1
    seen = f"term {before} -> {term} after {led:.1f} s; 0 of {answered} lost, its word on the load not heard"
    matrix("leader stopped (-STOP) in mid-load, comes back", BAR, seen)
