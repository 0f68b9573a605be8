"""Two real Ollama servers under load: one is killed, unloads the model, or has more callers than it takes."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from support.load import CHAT, PROMPT, REFUSED, TOLD, WHOLE, Answer, Client, Load, after, body_of, json_of
from support.pair import Pair
from support.process import until
from support.servers import MODEL

from corral.fleet.slots import ABORTED_MAX

Matrix = Callable[[str, str, str], None]
pytestmark = pytest.mark.ollama
BUDGET = 5.0
CANCELLED_WITHIN = 1.0
FREE_WITHIN = ABORTED_MAX + 0.5
"""Seconds for which a slot may stay counted whose caller left while the prompt was read, and the look at it."""
NUMBERS = 120
"""Of four digits, in a prompt: some hundreds of tokens."""
READ_FOR = 0.5
"""Seconds of a runner's CPU after which it surely reads."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as exits:
        yield Pair(tmp_path_factory.mktemp("pair"), exits, [MODEL])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Nodes that run one request at a time, which nobody can ask them: they are given four, and those wait there."""
    with ExitStack() as exits:
        made = Pair(tmp_path_factory.mktemp("single"), exits, [MODEL], parallel=1, queue={"length": 8})
        # Control's self-test would stand in a test's way.
        made.tested()
        yield made


def callers(pair: Pair, clients: int, tokens: int) -> Load:
    """Of chats that all begin otherwise, with patience for runners that share their cores."""
    return Load(pair.stack.url, pair.stack.key, MODEL, clients, [CHAT], [tokens], fresh=True, timeout=90)


def test_a_killed_ollama_loses_nothing_and_is_used_again(pair: Pair) -> None:
    with Load(pair.stack.url, pair.stack.key, MODEL, clients=8, tokens=[24], timeout=90) as load:
        load.more(8, "node-1")
        pair.kill("node-1")
        killed = time.monotonic()
        load.until(lambda _: time.monotonic() > killed + 5, "the fleet has settled")
        load.more(8, "node-2")
        pair.start("node-1", warm=False)
        load.more(4, "node-1")
    assert load.unlike(WHOLE, TOLD) == []
    assert [str(a) for a in load.answers if a.fate == TOLD and not a.text] == []
    assert load.fates[TOLD] <= 8
    assert [str(a) for a in load.answers if a.began > killed + 5 and a.fate != WHOLE] == []
    assert {a.node for a in after(load.answers, killed)} == {"node-1", "node-2"}


def test_a_model_that_leaves_the_memory_under_load_is_there_for_the_next_request(pair: Pair, matrix: Matrix) -> None:
    """Unloaded at the node itself, which nobody tells Corral: what runs ends, and who comes next has it loaded."""
    times = 2
    with callers(pair, 2, 8) as load:
        for _ in range(times):
            load.more(2, "node-1")
            old = set(pair.runners("node-1", MODEL))
            assert old

            def left(old: set[int] = old) -> bool:
                # A request that comes before the last one has ended keeps it in memory.
                pair.unload("node-1", MODEL)
                return not old & set(pair.runners("node-1", MODEL))

            until(left, "its runner has ended", 60, every=0.1)
            load.more(4, "node-1")
    assert load.unlike(WHOLE) == []
    retried = sum(answer.attempts > 1 for answer in load.answers)
    measured = f"{len(load.answers)} answers, 0 lost, {retried} retried, used again {times} times"
    matrix("real node unloads the model under load", "0 lost, the next one is answered", measured)


def test_a_runner_that_is_killed_while_idle_is_replaced_for_the_next_request(pair: Pair, matrix: Matrix) -> None:
    killed = [pid for name in pair.servers for pid in pair.loaded(name, MODEL)]
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    # Before its server has heard of that it is none that was idle: a request that comes then meets the crash.
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in killed), "their servers have buried them")
    with callers(pair, 8, 8) as load:
        for name in pair.servers:
            load.more(4, name)
    assert load.unlike(WHOLE) == []
    retried = sum(answer.attempts > 1 for answer in load.answers)
    measured = f"{len(load.answers)} answers by both, 0 lost, {retried} retried"
    matrix("real runners killed while idle", "0 lost, the next one is answered", measured)


def test_a_caller_that_leaves_has_the_runner_stop(single: Pair, matrix: Matrix) -> None:
    # What the model goes on with for long.
    body = {"model": MODEL, "prompt": " ".join(["la"] * 16), "raw": True, "stream": True}
    body["options"] = {"num_predict": 2000, "temperature": 0}
    other: dict[str, Any] = {"model": MODEL, "prompt": "a", "raw": True, "stream": False}
    other["options"] = {"num_predict": 1}
    alone = max(asked(single.servers[name].url, other) for name in 2 * list(single.servers))
    headers = single.stack.headers() | {"X-Request-ID": "left-in-mid-stream"}
    pieces, until_then = 0, 0.0
    with httpx.stream("POST", single.stack.url + "/api/generate", json=body, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        node = single.servers[answer.headers["X-Corral-Node"]]
        began = time.monotonic()
        for line in answer.iter_lines():
            assert json_of(line)["done"] is False
            pieces += 1
            if pieces == 20:
                # Nobody else is served as long as it runs.
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(node.url + "/api/generate", json=other, timeout=CANCELLED_WITHIN)
                until_then = time.monotonic() + 0.5
            if until_then and time.monotonic() > until_then:
                break
        speed = pieces / (time.monotonic() - began)
    took = asked(node.url, other)
    assert took < CANCELLED_WITHIN + alone
    rows: dict[str, dict[str, Any]] = {}

    def recorded() -> bool:
        rows.update({row["request_id"]: row for row in single.stack.corral("audit", "list")})
        return rows.get("left-in-mid-stream", {}).get("outcome") is not None

    until(recorded, "its record", every=0.3)
    record = rows["left-in-mid-stream"]
    assert (record["outcome"], record["status"], record["estimated"]) == ("client_gone", 499, True)
    assert pieces <= record["tokens"] <= pieces + speed * CANCELLED_WITHIN
    measured = f"next answer in {took:.2f} s (idle: {alone:.2f} s); {record['tokens']} tokens on record, {pieces} read"
    matrix("caller leaves a real runner", "it stops <= 1 s", measured)


def test_a_caller_that_leaves_while_its_prompt_is_read_keeps_its_slot_for_a_while(single: Pair, matrix: Matrix) -> None:
    until(single.all_ready, "both nodes are in service", every=0.3)
    store = single.store()
    until(lambda: store.counts(MODEL) == (0, 0), "nothing is held")
    other: dict[str, Any] = {"model": MODEL, "prompt": "a", "raw": True, "stream": False}
    other["options"] = {"num_predict": 1}
    for server in single.servers.values():
        asked(server.url, other)
    runners = {name: psutil.Process(single.loaded(name, MODEL)[0]) for name in single.servers}

    def computed() -> dict[str, float]:
        return {name: sum(runner.cpu_times()[:2]) for name, runner in runners.items()}

    # How long it takes whoever stays; each begins with something else, which nobody has read.
    def reads(first: int) -> dict[str, Any]:
        prompt = " ".join(str(number) for number in range(first, first + NUMBERS))
        return other | {"prompt": prompt}

    whole = asked(single.servers["node-1"].url, reads(1000))
    body = json.dumps(reads(5000) | {"stream": True}).encode()
    address = urlsplit(single.stack.url)
    head = f"POST /api/generate HTTP/1.1\r\nHost: {address.netloc}\r\nX-Request-ID: left-while-read\r\n"
    head += f"Authorization: Bearer {single.stack.key}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port or 80), timeout=10) as caller:
        before = computed()
        caller.sendall(head.encode() + body)
        until(lambda: sum(single.running().values()) == 1, "a node has it", every=0.01)
        (name,) = [node for node, count in single.running().items() if count]
        until(lambda: computed()[name] > before[name] + READ_FOR, "its prompt is being read", every=0.01)
        caller.settimeout(0)
        with pytest.raises(BlockingIOError):
            caller.recv(1)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left = time.monotonic()
    until(lambda: not single.running()[name], "the connection to the node is closed", every=0.01)
    closed, counted = time.monotonic() - left, store.used(MODEL)
    until(lambda: store.counts(MODEL) == (0, 0), "its slot is free", FREE_WITHIN + 5, every=0.02)
    free = time.monotonic() - left
    # A runner heeds nobody before it has read a prompt to its end (Ollama 0.17.4, runner.go: flushPending).
    asked(single.servers[name].url, other)
    heeds = time.monotonic() - left
    client = Client(single.stack.url, single.stack.key, timeout=60)
    after_it = client.ask(CHAT, body_of(CHAT, MODEL, 4), "after-who-left")
    client.close()
    bar = f"closed <= {CANCELLED_WITHIN:g} s; slot counted beyond that, free <= {FREE_WITHIN:g} s; the next is answered"
    seen = f"closed after {closed:.2f} s, slot free after {free:.1f} s, its prompt was read after {heeds:.1f} s"
    matrix(f"caller resets while a real node reads ({whole:.0f} s of it)", bar, seen)
    assert whole > 3 * CANCELLED_WITHIN, "it is read too fast for anything to be seen"
    assert counted == {name: 1}, "the node is busy for a while, and others are sent there"
    assert closed <= CANCELLED_WITHIN
    assert free <= FREE_WITHIN
    assert after_it.fate == WHOLE, str(after_it)


def asked(url: str, body: dict[str, Any]) -> float:
    """Ask a node itself; the seconds that it took."""
    began = time.monotonic()
    httpx.post(url + "/api/generate", json=body, timeout=60).raise_for_status()
    return time.monotonic() - began


def test_a_full_queue_of_real_nodes_that_run_one_at_a_time_ejects_nothing(single: Pair, matrix: Matrix) -> None:
    until(single.all_ready, "both nodes are in service", every=0.3)
    ejections = single.ejections()
    states: list[set[str]] = []
    count = 28

    def ask(number: int) -> Answer:
        client = Client(single.stack.url, single.stack.key, timeout=120)
        try:
            return client.ask(CHAT, body_of(CHAT, MODEL, 100, f"{number}: {PROMPT}"), f"full-{number}")
        finally:
            client.close()

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, number) for number in range(count)]

        def over() -> bool:
            states.append(set(single.states().values()))
            return all(each.done() for each in asked)

        until(over, "all have their answers", 120, every=0.5)
    answers = [each.result() for each in asked]
    whole = [answer for answer in answers if answer.fate == WHOLE]
    refused = [answer for answer in answers if answer.fate == REFUSED]
    assert len(whole) + len(refused) == count, [str(answer) for answer in answers]
    assert {answer.attempts for answer in whole} == {1}
    assert any(answer.ended - answer.began < BUDGET for answer in refused), "the queue was never full"
    assert all(answer.status == 503 and int(answer.headers["retry-after"]) >= 1 for answer in refused)
    slowest = max(answer.first - answer.began for answer in whole)
    assert slowest > BUDGET
    assert all(each == {"ready"} for each in states)
    assert single.ejections() == ejections
    measured = f"0; {len(whole)} answered in {slowest:.0f} s, {len(refused)} told to come back"
    matrix("real nodes, one request at a time, full queue", "0 ejections", measured)
