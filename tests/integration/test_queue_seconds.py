"""How long a request waited for nodes, as its record has it: all its waits, however it ended, and nothing else."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway, says
from support.held import MODEL, Held, hold, leading, led, placed
from support.leader import Leader
from support.process import until

from corral.store import usage
from corral.store.database import Database, resolve
from corral.store.ingest import ingest
from corral.store.spool import encode_frame
from corral.wire.lines import RENDERED

TAG = {"name": MODEL, "model": MODEL, "modified_at": "2026-11-23T15:00:00Z", "size": 1, "digest": "sha256:" + "a" * 64}
TRUNCATED = 0.01
"""Times are cut to whole microseconds (ms)."""


@pytest.fixture
def gw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    wait = getattr(request, "param", "30s")
    with gateway(tmp_path, gateway={"queue": {"length": 8, "wait": wait}}, limits=limits) as made:
        yield made


def counted(gw: Gateway, record: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds in the queue and on nodes that usage has of a request."""
    made = Database(resolve("sqlite:///usage.db", gw.folder))
    made.migrate()
    both = [one for one in gw.control.records if one["id"] == record["id"]]
    data = b"".join(encode_frame(one) for one in both)
    made.write_now(ingest, "gateway-1", "0000000000000001.seg", 0, data)
    (sums,) = made.read_now(usage.report, 0.0, 4e9, ["key"])
    made.close()
    return sums["queue_seconds"] * 1e3, sums["node_seconds"] * 1e3


def progress(gw: Gateway, record_id: str) -> list[Any]:
    """The last row of how far a request was."""
    rows = [row for note in gw.control.notes if note["t"] == "progress" for row in note["rows"]]
    return next((row for row in reversed(rows) if row[0] == record_id), [])


@pytest.mark.parametrize("gw", ["1500ms"], indirect=True)
def test_who_times_out_in_the_queue_was_there_all_the_time(gw: Gateway, callers: ThreadPoolExecutor) -> None:
    placed(gw, leading(gw), 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    late = gw.post()
    assert late.status_code == 503 and "no slot for 'm' within" in late.text
    record = gw.control.settled(late.headers["X-Request-ID"])
    assert (record["outcome"], record["attempts"]) == ("overloaded", 0)
    assert record["queue_ms"] == pytest.approx(record["ms"], abs=TRUNCATED) and record["queue_ms"] >= 1500
    assert counted(gw, record) == (pytest.approx(record["ms"], abs=TRUNCATED), 0.0)
    held.release()
    assert runs.result().status_code == 200


def test_who_leaves_the_queue_was_there_all_the_time_and_so_says_each_word_on_the_way(
    gw: Gateway, callers: ThreadPoolExecutor
) -> None:
    leader = leading(gw)
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    leaves = http.client.HTTPConnection("127.0.0.1", gw.port)
    leaves.request("POST", "/api/chat", json.dumps(gw.chat()), {**gw.auth, "X-Request-ID": "leaves"})
    until(lambda: leader.waiting() == 1, "one waits")

    def admitted() -> str:
        return next((one["id"] for one in gw.control.records if one["request_id"] == "leaves"), "")

    until(lambda: progress(gw, admitted()), "how far it is, is recorded")
    _, _, attempts, *_, queue_ms, ttft_ms, ms = progress(gw, admitted())
    assert (attempts, ttft_ms) == (0, None) and queue_ms == pytest.approx(ms, abs=TRUNCATED)
    leaves.close()
    record = gw.control.settled("leaves")
    assert (record["outcome"], record["attempts"]) == ("client_gone", 0)
    assert record["queue_ms"] == pytest.approx(record["ms"], abs=TRUNCATED) and record["queue_ms"] >= queue_ms
    held.release()
    assert runs.result().status_code == 200


def test_who_is_refused_before_it_may_ask_for_a_node_has_not_waited(gw: Gateway) -> None:
    for refused in (gw.post(headers={"Authorization": "Bearer crl_x"}), gw.post("/api/nothing")):
        assert refused.status_code in (401, 404)
        assert gw.control.settled(refused.headers["X-Request-ID"])["queue_ms"] == 0.0


def test_what_needs_no_node_is_admitted_in_the_record_and_has_not_waited(gw: Gateway) -> None:
    for path in ("/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/m"):
        answer = httpx.get(gw.url + path, headers=gw.auth)
        assert answer.status_code == 200, path
        settled = gw.control.settled(answer.headers["X-Request-ID"])
        admitted, last = [record for record in gw.control.records if record["id"] == settled["id"]]
        assert (admitted["t"], last) == ("admit", settled), path
        assert (settled["outcome"], settled["attempts"], settled["queue_ms"]) == ("ok", 0, 0.0), path
        assert admitted["prompt_hash"] is None, "there is no prompt"


def busy(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> tuple[Held, Any]:
    """One slot on each node, node-1's held by somebody else until he is let go."""
    gw.slots = 1
    gw.control.publish(continuable={MODEL: TAG["digest"]})
    gw.publish(tags=[TAG])
    leader.place("node-1", MODEL, 1)
    led(gw, leader)
    holds = Held()
    gw.nodes[0].script = [holds]
    other = callers.submit(gw.post)
    until(lambda: holds.running == 1, "another one has node-1")
    leader.place("node-2", MODEL, 1)
    return holds, other


def waited(gw: Gateway, leader: Leader, fails: Held, holds: Held) -> tuple[float, float]:
    """Have a request that runs on node-2 fail there and wait for node-1; the least that it ran and waited (ms)."""
    until(lambda: fails.running == 1, "it runs on node-2")
    began = time.monotonic()
    leader.place("node-2", MODEL, 1, "draining")
    until(lambda: time.monotonic() - began > 0.4, "it runs for a while")
    ran = time.monotonic() - began
    fails.release()
    until(lambda: leader.waiting() == 1, "it waits for node-1")
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 0.8, "it waits for a while")
    waits = time.monotonic() - began
    holds.release()
    return ran * 1e3, waits * 1e3


def holds_true(gw: Gateway, record: dict[str, Any], ran: float, waits: float) -> None:
    """The second wait is in the queue's time, and the first attempt is not."""
    assert (record["outcome"], record["attempts"], record["node"]) == ("ok", 2, "node-1")
    assert waits <= record["queue_ms"] <= record["ms"] - ran
    queue, node = counted(gw, record)
    assert queue == pytest.approx(record["queue_ms"], abs=TRUNCATED)
    assert node == pytest.approx(record["ms"] - record["queue_ms"], abs=TRUNCATED) and node >= ran


class Fails(Held):
    """Node behaviour: what is said at once, and a connection that ends when it is let go."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self._said = said

    def __call__(self, connection: Any) -> None:
        with self._lock:
            self.running += 1
        connection.sendall(self._said)
        self._free.acquire()
        connection.close()


def test_a_second_wait_before_a_retry_is_no_time_of_nodes(gw: Gateway, callers: ThreadPoolExecutor) -> None:
    leader = leading(gw)
    holds, other = busy(gw, leader, callers)
    fails = Fails(HEAD)
    gw.nodes[1].script = [fails]
    asked = callers.submit(gw.post)
    ran, waits = waited(gw, leader, fails, holds)
    answer = asked.result()
    assert (answer.status_code, other.result().status_code) == (200, 200)
    record = gw.control.settled(answer.headers["X-Request-ID"])
    holds_true(gw, record, ran, waits)
    assert answer.headers["X-Corral-Queue-Ms"] == str(int(record["queue_ms"]))


def test_a_second_wait_before_a_continuation_is_no_time_of_nodes(gw: Gateway, callers: ThreadPoolExecutor) -> None:
    leader = leading(gw)
    holds, other = busy(gw, leader, callers)
    fails = Fails(HEAD + chunk(LINE % b"one ") + chunk(LINE % b"two "))
    gw.nodes[1].script = [fails]
    shown = json.dumps({"model": "m", RENDERED: {"rendered_template": "<u>Guten Tag!<a>"}}).encode()
    rest = b'{"model":"m","response":"three","done":false}\n'
    gw.nodes[0].script = [
        lambda connection: connection.sendall(HEAD + chunk(shown) + END),
        says(200, {"done": True, "prompt_eval_count": 5}),
        says(200, {"done": True, "prompt_eval_count": 7}),
        lambda connection: connection.sendall(HEAD + chunk(rest) + chunk(LAST % 1) + END),
    ]
    asked = callers.submit(httpx.post, gw.url + "/api/chat", json=gw.chat(), headers=gw.auth, timeout=60)
    ran, waits = waited(gw, leader, fails, holds)
    answer = asked.result()
    assert other.result().status_code == 200 and b"three" in answer.content
    record = gw.control.settled(answer.headers["X-Request-ID"])
    holds_true(gw, record, ran, waits)
    assert record["continued"] == "node-2,node-1"
    assert int(answer.headers["X-Corral-Queue-Ms"]) <= record["queue_ms"] - waits, "its head was sent before that wait"
