"""What a gateway makes of silent runners beside loads of other models on their nodes."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

from corral.fleet.hanging import LOADS, SILENCE
from corral.fleet.node import Node
from corral.gateway import health as compiled
from corral.gateway.health import CANARY, Canary, Health
from corral.gateway.snapshot import HEARD, Snapshot

pytestmark = pytest.mark.skipif(
    not (compiled.__file__ or "").endswith(".py"), reason="compiled, it takes no gateway of a test's own"
)

LOOK = 0.5
MODEL, BIG, LOST = "m:latest", "big:latest", "lost:latest"


class Looking:
    """A gateway that looks each half second at its streams on node-1 of two, or more; its canaries never answer.

    ``running`` are its streams; ``eject`` looks until a runner is ejected.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 2) -> None:
        monkeypatch.setattr(Canary, "ask", self._asked)
        monkeypatch.setattr(Canary, "close", lambda canary: setattr(canary, "until", 0.0))
        self.nodes = {name: Node(name, f"http://{name}", 4) for name in [f"node-{at + 1}" for at in range(size)]}
        for node in self.nodes.values():
            node.update(self._entry())
        self.running: list[Any] = []
        self.snapshot = snapshot = Snapshot({})
        snapshot.nodes, snapshot.heard = self.nodes, inf
        gateway: Any = SimpleNamespace(
            name="gateway-1",
            snapshot=snapshot,
            running=self.running,
            between_tokens=600.0,
            suspects=SimpleNamespace(suspects=()),
        )
        self.health = Health(gateway)
        self.now = 100.0

    @staticmethod
    def _asked(canary: Canary, now: float) -> None:
        canary.until, canary.open = now + CANARY, True

    @staticmethod
    def _entry(**more: Any) -> dict[str, Any]:
        models = [{"name": name} for name in (MODEL, BIG, LOST)]
        entry = {"url": "http://x", "state": "ready", "tags": models, "ps": [{"name": MODEL}, {"name": BIG}]}
        return entry | more

    def loads(self, **models: float) -> None:
        """Control says that node-1 loads these (by their short names), and what that excuses."""
        loading = {f"{name}:latest": seconds for name, seconds in models.items()}
        self.nodes["node-1"].update(self._entry(loading=loading))

    def hears(self, node: str, **suspects: list[str]) -> None:
        """Control says which gateways suspect these (by their short names) on a node."""
        self.nodes[node].update(self._entry(suspects={f"{name}:latest": by for name, by in suspects.items()}))

    def stream(self, model: str = MODEL, node: str = "node-1") -> Any:
        """A request that is sent to a node."""
        decoded = SimpleNamespace(upstream_path="/api/chat", responder=None, body=b"", reads=0)
        made = SimpleNamespace(model=model, decoded=decoded, paused=False, deadline=1e9, record_id="r")
        self.health.sent(made, self.nodes[node], self.now)  # type: ignore[arg-type]
        self.running.append(made)
        return made

    def look(self, seconds: float) -> None:
        """Look for so long."""
        for _ in range(round(seconds / LOOK)):
            self.now += LOOK
            self.health.look(self.now)

    def ejected_after(self, most: float = 200.0) -> float:
        """Seconds until a runner is ejected."""
        began, before = self.now, self.health.ejections
        while self.health.ejections == before and self.now - began < most:
            self.look(LOOK)
        return self.now - began


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Looking:
    return Looking(monkeypatch)


ALONE = SILENCE + CANARY + 2 * LOOK
"""Seconds until a runner is ejected that hangs beside nothing."""


def test_a_runner_that_hangs_alone_is_ejected_after_its_budget_and_its_canary(looking: Looking) -> None:
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_a_runner_beside_a_load_is_ejected_after_the_bound_alone(looking: Looking) -> None:
    looking.loads(big=40.0)
    looking.stream()
    looking.look(40.0)
    assert not looking.health.canaries, "it is not even doubted"
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_a_load_of_its_own_excuses_no_runner(looking: Looking) -> None:
    looking.loads(m=40.0)
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_a_load_on_another_node_excuses_none(looking: Looking) -> None:
    looking.nodes["node-2"].update(looking._entry(loading={BIG: 40.0}))
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_a_control_that_is_away_says_no_more_that_a_load_is_over(looking: Looking) -> None:
    looking.loads(big=600.0)
    looking.snapshot.heard = looking.now
    looking.stream()
    assert looking.ejected_after() == pytest.approx(HEARD + ALONE, abs=2 * LOOK)


def test_a_canary_that_was_answered_badly_is_not_waited_for_beside_a_load(looking: Looking) -> None:
    looking.stream()
    looking.look(SILENCE + LOOK)
    (canary,) = looking.health.canaries.values()
    canary.open = False  # the node has closed the connection
    looking.loads(big=600.0)
    assert looking.ejected_after() <= CANARY + LOOK


def test_a_load_that_begins_while_a_canary_is_asked_excuses_it(looking: Looking) -> None:
    stream = looking.stream()
    looking.look(SILENCE + 3.0)
    assert looking.health.canaries and "m:latest" in looking.nodes["node-1"].suspects
    looking.loads(big=40.0)
    looking.look(30.0)
    assert looking.health.ejections == 0
    stream.runner.token = looking.now
    looking.look(LOOK)
    assert not looking.health.canaries and not looking.nodes["node-1"].suspects


def test_a_canary_beside_a_load_that_hangs_is_excused_up_to_the_bound(looking: Looking) -> None:
    looking.stream()
    looking.look(SILENCE + 3.0)
    looking.loads(big=40.0)
    assert looking.ejected_after() == pytest.approx(40.0 + CANARY, abs=CANARY + LOOK)


def test_a_runner_that_is_ejected_stays_so_whatever_is_loaded_beside_it(looking: Looking) -> None:
    stream = looking.stream()
    looking.ejected_after()
    looking.loads(big=40.0)
    other = looking.stream()
    looking.look(2 * CANARY)
    assert max(stream.deadline, other.deadline) <= looking.now, "who came since waits for the load"


def test_a_model_that_a_request_has_loaded_excuses_the_others(looking: Looking) -> None:
    """Nobody leads: control has begun no load, and Ollama loads what it is asked for."""
    looking.stream(LOST)
    looking.stream()
    assert looking.ejected_after() == pytest.approx(LOADS + ALONE, abs=CANARY)


def test_what_gives_tokens_though_control_does_not_see_it_in_memory_excuses_none(looking: Looking) -> None:
    looking.stream(LOST).token = looking.now
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_how_fast_a_prompt_was_read_beside_a_load_is_not_learned(looking: Looking) -> None:
    looking.loads(big=40.0)
    stream = looking.stream()
    stream.decoded.reads = 1000
    looking.look(10.0)
    looking.health.token(stream, True, looking.now)
    assert looking.health.rates(stream.decoded).needs(MODEL, 1000) == 30.0, "what it is until it is known"
    looking.loads()
    looking.look(LOOK)
    again = looking.stream()
    again.decoded.reads = 1000
    looking.health.token(again, True, looking.now + 2.0)
    assert looking.health.rates(again.decoded).needs(MODEL, 1000) == 6.0


def test_two_gateways_that_suspect_a_node_each_eject_none_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears what the other suspects before its own canary is over."""
    one, other = Looking(monkeypatch), Looking(monkeypatch)
    one.stream(node="node-1")
    other.stream(node="node-2")
    for _ in range(40):
        one.look(LOOK)
        other.look(LOOK)
        for here, there in ((one, other), (other, one)):
            for node in ("node-1", "node-2"):
                known = there.health.canaries
                here.hears(node, **({"m": ["gateway-2"]} if (node, MODEL) in known else {}))
    assert (one.health.ejections, other.health.ejections) == (0, 0)
    assert one.health.frozen and other.health.frozen


@pytest.mark.parametrize("model", ["m", "big"])
def test_a_runner_is_ejected_once_no_other_gateway_suspects_the_other_node(looking: Looking, model: str) -> None:
    """Nor are more than half of the nodes out together, whatever the models."""
    looking.hears("node-2", **{model: ["gateway-1", "gateway-2"]})
    looking.stream()
    looking.look(30.0)
    assert (looking.health.ejections, looking.health.frozen > 0) == (0, True)
    looking.hears("node-2", **{model: ["gateway-1"]})
    assert looking.ejected_after() <= CANARY + 2 * LOOK, "its own word of before counts for nothing"


def test_who_suspects_more_than_half_of_the_nodes_is_not_believed(looking: Looking) -> None:
    for node in ("node-1", "node-2"):
        looking.hears(node, m=["gateway-2"])
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_what_others_suspect_of_the_same_runner_holds_nobody_back(looking: Looking) -> None:
    looking.hears("node-1", m=["gateway-2", "gateway-3"])
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_a_control_that_is_away_says_no_more_what_others_suspect(looking: Looking) -> None:
    looking.hears("node-2", m=["gateway-2"])
    looking.snapshot.heard = looking.now
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)


def test_nodes_that_are_down_count_with_those_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Looking(monkeypatch, 6)
    down = [looking.nodes[name] for name in ("node-4", "node-5", "node-6")]
    for node in down:
        node.update(looking._entry(state="down", ps=[]))
    for name in ("node-1", "node-2"):
        looking.stream(node=name)
    looking.look(ALONE + 2 * CANARY)
    assert (looking.health.ejections, looking.health.frozen > 0) == (0, True)
    for node in down[:2]:
        node.update(looking._entry())
    looking.look(2 * CANARY)
    assert looking.health.ejections == 2


def test_what_was_ejected_keeps_its_streams_once_too_many_others_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever came first, and for no longer."""
    looking = Looking(monkeypatch, 4)
    looking.stream()
    looking.ejected_after()
    (canary,) = looking.health.canaries.values()
    down = [looking.nodes[name] for name in ("node-3", "node-4")]
    for node in down:
        node.update(looking._entry(state="down", ps=[]))
    looking.look(2 * CANARY)
    assert (canary.ejected, looking.health.frozen > 0) == (False, True)
    late = looking.stream()
    looking.look(2 * CANARY)
    assert late.deadline > looking.now, "nobody gives it up"
    down[0].update(looking._entry())
    looking.look(2 * CANARY)
    assert looking.health.canaries[canary.node.name, MODEL].ejected and late.deadline <= looking.now


def test_a_later_suspect_stays_itself_and_brings_back_none(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Looking(monkeypatch)
    looking.stream()
    looking.ejected_after()
    looking.stream(node="node-2")
    looking.hears("node-2", m=["gateway-2"])
    looking.look(ALONE + 2 * CANARY)
    assert (looking.health.ejections, looking.health.frozen > 0) == (1, True)
    assert [canary.ejected for canary in looking.health.canaries.values()] == [True, False]


def test_who_suspects_more_than_half_of_what_is_ready_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Looking(monkeypatch, 6)
    looking.nodes["node-6"].update(looking._entry(state="down", ps=[]))
    for name in ("node-2", "node-3", "node-4"):
        looking.hears(name, m=["gateway-2"])
    looking.stream()
    assert looking.ejected_after() == pytest.approx(ALONE, abs=LOOK)
