"""`kill -9` of gateways (and with them their shippers), control and PostgreSQL at random moments under load.

Each request that a client saw answered has its record and is counted once, and so has each that a gateway refused;
none is twice, and none stays open. What an operator changes meanwhile is recorded as often as it is done.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml
from click.testing import CliRunner
from support.fleet import MODEL, QUICK, SimulatedNode
from support.load import LEFT, REFUSED, TOLD, WHOLE, Answer
from support.mixed import WAYS, Mixed, counts, leaving, pieces
from support.postgres import Postgres
from support.postgres import postgres as run_postgres
from support.process import NotReady, until
from support.stack import Stack
from support.stack import stack as run_stack

from corral.cli.main import cli
from corral.stack import supervisor
from corral.stack.state import StateFolder

KILLS = int(os.environ.get("CORRAL_KILLS", "100"))
"""No fewer than there are victims."""
VICTIMS = ("gateway-1", "gateway-2", "control", "postgres")
BETWEEN = 0.1, 1.2
"""Seconds from one kill to the next."""

UNCHANGED = 1_000_000
INFERENCE = "FROM audit WHERE api <> 'admin'"


@pytest.fixture
def server() -> Iterator[Postgres]:
    with run_postgres() as made:
        yield made


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[SimulatedNode]]:
    made = [SimulatedNode(name, tmp_path) for name in ("node-1", "node-2")]
    yield made
    for node in made:
        node.process.end(signal.SIGKILL)


def pid_of(up: Stack, name: str) -> int:
    known = supervisor.processes(StateFolder(up.state)).get(name)
    return int(known["pid"]) if known and known["statename"] in ("RUNNING", "STARTING") else 0


def kill(pid: int) -> bool:
    """kill -9; False where it has just ended by itself, as control does whose database goes while it starts."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Changes:
    """An operator who changes a key again and again while the block runs, to another limit each time.

    ``done``: the limits that control said it has now; ``asked``: how many it was asked for.
    """

    def __init__(self, url: str, admin_key: str, key: str) -> None:
        self.done: list[int] = []
        self.asked = 0
        self._url, self._headers = f"{url}/admin/keys/{key}", {"Authorization": f"Bearer {admin_key}"}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.asked += 1
            headers = self._headers | {"X-Request-ID": f"change-{self.asked}"}
            with suppress(httpx.TransportError):
                answer = httpx.patch(self._url, json={"rpm": self.asked}, headers=headers, timeout=30)
                if answer.status_code == 200:
                    self.done.append(answer.json()["rpm"])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(40)


def beyond(one: Answer, asked: int, prompt: int, tokens: int, outcome: str, estimated: bool) -> str:
    """What is wrong with the tokens that are counted of an answer that did not come whole; empty where nothing is.

    Who was cut off has used what he saw at least; what a node wrote meanwhile may have come or not. Of a gateway that
    was killed only what it had recorded by then is known.
    """
    least = 0 if outcome == "interrupted" else pieces(one)
    # A guess is a token for four bytes of the body, or up to four times as many (docs/audit.md).
    known = one.sent // 4 <= prompt <= one.sent if estimated and prompt else bool(prompt or not least)
    if least <= tokens <= asked and known:
        return ""
    return f"{one}: {prompt} and {tokens} tokens of {asked}, {outcome}, after {pieces(one)} were seen"


@pytest.mark.slow
def test_every_answer_is_recorded_and_counted_once(
    tmp_path: Path, server: Postgres, nodes: list[SimulatedNode], matrix: Callable[[str, str, str], None]
) -> None:
    url = server.database()
    name = url.rpartition("/")[2]
    settings = {
        "gateway": {"processes": 2},
        "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
        "store": {"database": url},
        "audit": {"checkpoint": "2s"},
    }
    (tmp_path / "corral.yaml").write_text(yaml.safe_dump(settings))
    attach = [f"--attach={node.url}" for node in nodes]
    with run_stack(tmp_path / "state", "--config", str(tmp_path / "corral.yaml"), *attach) as up:
        seed = random.randrange(1 << 32)
        print(f"seed {seed}", file=sys.stderr)
        dice = random.Random(seed)
        killed: Counter[str] = Counter()
        dead: dict[str, int] = {}
        # Each of them at least once, however few kills there are.
        to_kill = [*VICTIMS, *dice.choices(VICTIMS, k=KILLS - len(VICTIMS))]
        loads = [Mixed(up.url, up.key, QUICK, WAYS, 5, (3, 16, 40), "quick")]
        loads.append(Mixed(up.url, up.key, MODEL, WAYS, 3, (60, 120), "slow"))
        loads.append(Mixed(up.url, up.key, MODEL, leaving(1.0), 2, (60, 120), "left"))
        # What these ask for takes longer than their key's requests may: a gateway refuses them, after work of nodes.
        late = up.corral("keys", "create", "late", "--deadline", "100ms")
        loads.append(Mixed(up.url, late["key"], MODEL, WAYS, 2, (16,), "late"))
        changed = up.corral("keys", "create", "changed", "--rpm", str(UNCHANGED))["id"]
        changes = Changes(up.url, up.admin_key, changed)
        with loads[0], loads[1], loads[2], loads[3], changes:
            loads[0].more(20)
            while to_kill:
                time.sleep(dice.uniform(*BETWEEN))
                victim = dice.choice(to_kill)
                if victim == "postgres":
                    server.kill_each()
                    time.sleep(dice.uniform(0, 1))
                    server.start()
                elif (pid := pid_of(up, victim)) and pid != dead.get(victim) and kill(pid):
                    dead[victim] = pid
                else:
                    continue  # it is not back from the last time
                to_kill.remove(victim)
                killed[victim] += 1
            loads[0].more(50)
            before = len(changes.done)
            until(lambda: len(changes.done) > before, "control does what it is told", 120)
            gone = {(way.path, way.stream) for way in WAYS}
            loads[2].until(
                lambda seen: {(one.path, one.stream) for one in seen if one.fate == LEFT} >= gone, "each was left", 120
            )
            loads[2].until(
                lambda seen: any(one.fate == LEFT and pieces(one) > 1 for one in seen[-20:]), "a stream was left", 120
            )
        answers = [answer for load in loads for answer in load.answers]

        def rows(what: str) -> list[tuple[Any, ...]]:
            return server.execute(what, name)

        whole = [answer for answer in answers if answer.fate == WHOLE]
        begun = [answer for answer in answers if answer.fate in (WHOLE, TOLD) or answer.first]
        # What HAProxy answers by itself while no gateway is there has no record: no part of Corral saw the request.
        refused = [one for one in answers if one.fate == REFUSED and "x-corral-proxy" not in one.headers]
        owed = {answer.request_id for answer in (*begun, *refused)}

        def settled() -> bool:
            # The last ones may not even have been shipped: that no record is open says nothing of them.
            found = {row[0] for row in rows(f"SELECT request_id {INFERENCE}")}
            opened = rows(f"SELECT count(*) {INFERENCE} AND outcome IS NULL") != [(0,)]
            return not opened and found >= owed

        with suppress(NotReady):  # the verdict says what is missing
            until(settled, "all are there and settled", 180, 0.5)
        recorded = Counter(row[0] for row in rows(f"SELECT request_id {INFERENCE}"))
        outcomes = Counter(dict(rows(f"SELECT outcome, count(*) {INFERENCE} GROUP BY outcome")))
        fates = Counter(f"{answer.fate} {answer.status or ''}".strip() for answer in answers)
        print(f"killed {dict(killed)}; answers {dict(fates)}; records {dict(outcomes)}", file=sys.stderr)
        missing = sorted(one for one in owed if recorded[one] == 0)
        twice = sorted(one for one, count in recorded.items() if count > 1)
        told_of = f"kills {killed.total()} of {KILLS}: {len(missing)} lost, {len(twice)} twice"
        print(f"{told_of}; {len(begun)} answers and {len(refused)} refusals of gateways", file=sys.stderr)
        assert (killed.total(), killed.keys()) == (KILLS, set(VICTIMS))
        assert len(refused) > KILLS
        assert (missing, twice) == ([], [])
        assert settled(), "some stay open"
        statuses = dict(rows(f"SELECT request_id, status {INFERENCE}"))
        assert [(str(one), statuses[one.request_id]) for one in refused if statuses[one.request_id] != one.status] == []
        fine = {row[0] for row in rows(f"SELECT request_id {INFERENCE} AND outcome = 'ok'")}
        lost = [answer for answer in whole if answer.request_id not in fine]
        told = [rows(f"SELECT * {INFERENCE} AND request_id = '{answer.request_id}'") for answer in lost]
        assert not lost, [(str(answer), answer.headers, found) for answer, found in zip(lost, told, strict=True)]
        sums = "count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(tokens), 0)"
        (of_records,) = rows(f"SELECT {sums} {INFERENCE}")
        (of_usage,) = rows("SELECT sum(requests), sum(prompt_tokens), sum(tokens) FROM usage")
        assert tuple(map(int, of_usage)) == tuple(map(int, of_records))
        told_by = {one.request_id: counts(one) for one in whole}
        # None are known of who had run for less than a second when his gateway was killed.
        fields = "request_id, coalesce(prompt_tokens, 0), coalesce(tokens, 0), outcome, estimated"
        booked = {row[0]: row[1:] for row in rows(f"SELECT {fields} {INFERENCE}")}
        assert [
            (str(one), booked[one.request_id]) for one in whole if booked[one.request_id][:2] != told_by[one.request_id]
        ] == []
        assert {(one.path, one.stream) for one in whole} == {(way.path, way.stream) for way in WAYS}
        asked = {name: tokens for load in loads for name, tokens in load.asked.items()}
        cut = [one for one in answers if one.fate != WHOLE and one.request_id in booked]
        assert [wrong for one in cut if (wrong := beyond(one, asked[one.request_id], *booked[one.request_id]))] == []
        wrote = sum(node.work(model)["tokens"] for node in nodes for model in (QUICK, MODEL))
        assert of_usage[2] <= wrote, "more is counted than the nodes wrote"
        left = [one for one in cut if one.fate == LEFT and booked[one.request_id][2] == "client_gone"]
        assert len(left) > len(WAYS) and any(map(pieces, left))
        ends = Counter(booked[one.request_id][2] for one in cut if booked[one.request_id][1])
        print(f"cut with tokens: {dict(ends)}; {of_usage[2]} tokens counted of {wrote}", file=sys.stderr)
        what = "request_id, \"before\" ->> 'rpm', \"after\" ->> 'rpm'"
        steps = rows(f"SELECT {what} FROM audit WHERE api = 'admin' AND method = 'PATCH' AND status = 200 ORDER BY seq")
        print(f"{len(changes.done)} of {changes.asked} changes answered, {len(steps)} recorded", file=sys.stderr)
        # Each was made of what the one before it left: none is missing, none was recorded that was not done.
        left_by = [str(UNCHANGED), *(after for _, _, after in steps)]
        assert [before for _, before, _ in steps] == left_by[:-1]
        assert rows(f"SELECT rpm FROM keys WHERE id = '{changed}'") == [(int(left_by[-1]),)]
        assert [request for request, _, _ in steps] == [f"change-{after}" for after in left_by[1:]]
        assert len(set(left_by)) == len(left_by) and {str(limit) for limit in changes.done} <= set(left_by)
        measured = f"{sum(killed.values())} kills, {len(begun)} begun: each one record, sums of usage equal"
        matrix("gateways, control, PostgreSQL killed (-9)", "each answer recorded once", measured)
        assert outcomes["interrupted"] > 0, "none was killed in the middle of an answer"
        env = {"CORRAL_URL": up.url, "CORRAL_ADMIN_KEY": up.admin_key}
        verified = CliRunner().invoke(cli, ["audit", "verify"], env=env)
        assert verified.exit_code == 0, verified.output
