"""A leader whose look at the fleet takes long or does not end: a real control and Valkey, a planner that is held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import FakeNode, Running, until
from support.leader import Leader
from support.servers import valkey

from corral.control import leading as module
from corral.control import placement as hand
from corral.control.leading import KEY_MS
from corral.control.placement import Placement
from corral.control.prober import Member
from corral.fleet.placement import Action, Planner, Step
from corral.store import lease
from corral.store.database import configured
from corral.store.keeper import LEADER, TERM

GONE = -2
STEP = Step(Action.LOAD, "node-1", "m:latest", "said by a test")


class Held:
    """Holds each plan while ``hold`` is set; the plan has one step then. ``begun``: steps that control began.

    ``looks``: what each look did that has ended.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hold, self.held = threading.Event(), threading.Event()
        self.over = threading.Event()
        self.plans = 0
        self.begun: list[Step] = []
        self.looks: list[list[Step]] = []
        held, begin, tick = self, Placement._begin, Placement.tick

        class Slow(Planner):
            def plan(self) -> list[Step]:
                held.plans += 1
                if held.hold.is_set():
                    held.held.set()
                    held.over.wait()
                    self.steps.append(STEP)
                return super().plan()

        def begins(self: Placement, member: Any, step: Step, now: float) -> None:
            held.begun.append(step)
            begin(self, member, step, now)

        async def ticks(self: Placement, members: Iterable[Member], now: float) -> list[Step]:
            held.looks.append(await tick(self, members, now))
            return held.looks[-1]

        patch.setattr(hand, "Planner", Slow)
        patch.setattr(Placement, "tick", ticks)
        patch.setattr(Placement, "_begin", begins)

    def until_held(self) -> None:
        self.hold.set()
        until("a plan is held", self.held.is_set)
        self.hold.clear()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(monkeypatch)
    yield made
    made.over.set()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    with valkey(tmp_path) as server:
        yield server.url


@pytest.fixture
def led(tmp_path: Path, node: FakeNode, store: str, held: Held) -> Iterator[Running]:
    made = Running(tmp_path / "state", nodes=[{"url": node.url}], store={"valkey": store})
    yield made
    held.over.set()
    made.close()


def test_a_leader_whose_plan_takes_long_is_believed_in_and_answers(led: Running, store: str, held: Held) -> None:
    """Its key outlives its own time while the plan goes on, and gateways have their snapshots."""
    asked = Leader(store)
    until("it leads", lambda: int(asked.ask(b"GET", LEADER) or 0))
    until("the node is ready", lambda: led.node()["state"] == "ready")
    held.until_held()
    plans = held.plans

    def renewed() -> bool:
        ends = int(asked.ask(b"PEXPIRETIME", LEADER))
        assert ends != GONE
        assert led.snapshot("gateway-1").status_code == 200
        return ends >= first + KEY_MS

    first = int(asked.ask(b"PEXPIRETIME", LEADER))
    until("the key is renewed beyond its time", renewed)
    assert held.plans == plans and not held.begun, "all in one plan"
    held.over.set()
    until("what it decided is done", lambda: held.begun == [STEP])
    until("the next plan", lambda: held.plans > plans)


def test_a_leader_whose_plan_does_not_end_leads_no_more(
    tmp_path: Path, node: FakeNode, store: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key and its lease lapse, another may lead, and what it decided in the end is not done."""
    for name, value in {"HUNG": 1.0, "LEASE": 1.5, "RENEW": 0.2, "KEY_MS": 1000}.items():
        monkeypatch.setattr(module, name, value)
    led = Running(tmp_path / "state", nodes=[{"url": node.url}], store={"valkey": store})
    database = configured(led.settings.store, led.state)
    asked = Leader(store)
    try:
        until("it leads", lambda: int(asked.ask(b"GET", LEADER) or 0))
        until("the node is ready", lambda: led.node()["state"] == "ready")
        held.until_held()
        plans = held.plans
        until("nobody is said to lead", lambda: asked.ask(b"GET", LEADER) is None)
        term = until("the lease runs out", lambda: database.write_now(lease.take, "another", time.time(), 1000.0) or 0)
        assert term == 2
        asked.ask(b"SET", TERM, b"2")
        assert led.snapshot("gateway-1").status_code == 200
        assert held.plans == plans
        asked.ask(b"SET", LEADER, b"2")
        looks = len(held.looks)
        held.over.set()
        until("the look ends", lambda: len(held.looks) > looks)
        assert held.looks[looks:] == [[]] and not held.begun
        assert int(asked.ask(b"GET", LEADER)) == 2
    finally:
        held.over.set()
        led.close()
        database.close()
