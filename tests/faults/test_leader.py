"""The control that leads is killed while a model is being loaded: nobody has a slot of it before it is there."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
from support.fleet import Fleet
from support.leader import Leader
from support.load import CHAT, WHOLE, Answer, body_of
from support.process import until

from corral.control.leading import KEY_MS
from corral.store.keeper import LEADER, TERM

EVERY = 0.02
SAID = 0.5
"""A leader says each half second that there is one."""


class Look:
    """Looks at slots and nodes again and again: when a node still had not the model, and slots of it that were given
    while that was so."""

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._model = model
        self.away: dict[str, float] = {}
        self.there: set[str] = set()
        self.early: list[tuple[float, str]] = []
        self._fleet, self._store, self._over = fleet, Leader(fleet.valkey.url), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Look:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._over.wait(EVERY):
                used, at = self._store.used(self._model), time.monotonic()
                for name, node in self._fleet.nodes.items():
                    asked = time.monotonic()
                    listed = client.get(node.url + "/api/ps").json()["models"]
                    if self._model in [entry["name"] for entry in listed]:
                        self.there.add(name)
                    else:
                        self.away[name] = asked
                self.early += [(at, name) for name in used if name not in self.there]


def test_a_leader_that_is_killed_in_mid_load(
    contended: Fleet, turn: int, matrix: Callable[[str, str, str], None]
) -> None:
    fleet, store, model = contended, Leader(contended.valkey.url), f"fresh-{turn}:latest"
    pid, before = fleet.stack.corral("status")["control"]["pid"], int(store.ask(b"GET", TERM))

    def loads() -> list[int]:
        return [node.work(model)["loads"] for node in fleet.nodes.values()]

    def ask(number: int) -> Answer:
        client = fleet.client()
        try:
            return client.ask(CHAT, body_of(CHAT, model, 4), f"big-{number}")
        finally:
            client.close()

    with Look(fleet, model) as look, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        until(lambda: sum(loads()) == 1, "it is being loaded")
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        answers = [one.result() for one in asked]
        until(lambda: int(store.ask(b"GET", LEADER) or 0) > before, "the next one leads")
        led = time.monotonic() - killed
        # It goes on with what stands: this one needs no load.
        until(lambda: store.counts(model) == (0, 0), "nothing is held")
        answers.append(ask(6))
    term = int(store.ask(b"GET", TERM))
    assert [str(answer) for answer in answers if answer.fate != WHOLE] == []
    assert term > before
    # Then nobody leads, and gateways let nodes load by themselves.
    believed = KEY_MS / 1e3 - SAID
    early = [round(at - killed, 2) for at, _ in look.early]
    seen = (
        f"{len(answers)} answered, loads by node {loads()}, no slot in {believed:g} s, the next leads after {led:.1f} s"
    )
    bar = "nobody answered before it is there, no slot while the leader is believed in; a greater term"
    matrix("leader killed (-9) in mid-load", bar, f"{seen}, term {before} -> {term}")
    assert [at for at in early if at < believed] == []
    # One ended with the leader that had begun it.
    assert sorted(loads()) in ([0, 2], [1, 2]), "each node loads it once"
    assert [str(answer) for answer in answers if answer.first < look.away[answer.node]] == []
