"""Slots and tickets at a real gateway: who runs where, who waits, and what is counted in the store."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.gateway import Gateway, says
from support.held import MODEL, Held, hold, led, placed, queueing, waited
from support.leader import Leader
from support.process import until


@pytest.fixture
def gw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, *getattr(request, "param", ("30s", 3))) as made:
        yield made


def test_no_more_run_than_there_are_slots_and_the_others_have_their_turn(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 2, "node-1", "node-2")
    held = Held()
    hold(gw, held)
    asked = [callers.submit(gw.post) for _ in range(7)]
    until(lambda: held.running == 4 and leader.waiting() == 3, "four run, three wait")
    assert leader.used() == {"node-1": 2, "node-2": 2}
    refused = gw.post()
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert "3 requests wait for 'm' already" in refused.json()["error"]
    assert refused.headers["X-Corral-Queue-Position"] == "4" and int(refused.headers["X-Corral-Queue-Estimate-Ms"]) > 0
    assert gw.metric("corral_queue_length") == 3 and gw.metric("corral_queue_full_total") == 1
    for began in (5, 6, 7):
        held.release()
        until(lambda began=began: held.began == began, "the next one has its turn")  # type: ignore[misc]
    held.release(4)
    assert [one.result().status_code for one in asked] == [200] * 7
    places = [one.result().headers.get("X-Corral-Queue-Position", "-") for one in asked]
    assert sorted(places) == ["-"] * 4 + ["1", "2", "3"], "who did not wait had none"
    assert held.most == 4
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_a_model_that_is_placed_while_somebody_waits(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    leader.place("node-1", MODEL, 1)
    led(gw, leader)
    leader.place("node-1", MODEL, 1, "draining")
    asked = callers.submit(gw.post)
    until(lambda: leader.waiting() == 1, "it waits")
    assert not any(node.requests for node in gw.nodes[1:])
    leader.place("node-2", MODEL, 1)
    answer = asked.result()
    assert (answer.status_code, answer.headers["X-Corral-Node"]) == (200, "node-2")
    assert float(answer.headers["X-Corral-Queue-Ms"]) > 0


@pytest.mark.parametrize("gw", [("2s", 3)], indirect=True)
def test_who_waits_too_long_hears_how_long_it_takes(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    late = gw.post()
    assert late.status_code == 503 and int(late.headers["Retry-After"]) >= 1
    assert "no slot for 'm' within" in late.json()["error"]
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    assert gw.metric("corral_queue_length") == 0 and gw.metric("corral_queue_overdue_total") == 1
    held.release()
    assert runs.result().status_code == 200


def test_who_leaves_gives_the_ticket_up_and_the_slot_cools_down(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = httpx.Client(timeout=60)
    with runs.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth) as stream:
        pieces = stream.iter_raw()
        next(pieces)  # held on to: a response whose reader is let go is closed, and the caller has left
        waits: Future[httpx.Response] = callers.submit(gw.post)
        until(lambda: leader.waiting() == 1, "one waits")
        leaves = socket.create_connection(("127.0.0.1", gw.port))
        body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
        head = f"POST /api/chat HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(body)}"
        leaves.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: leader.waiting() == 2, "two wait")
        leaves.close()
        until(lambda: leader.waiting() == 1, "it left, and gave its ticket up")
        assert held.began == 1
    # The stream is left: the next one has its turn once the node has had a moment to notice.
    held.release()
    until(lambda: held.began == 2, "the next one runs")
    held.release()
    assert waits.result().status_code == 200
    until(lambda: not leader.used(), "nothing is held")


def test_a_further_attempt_has_a_slot_of_its_own(gw: Gateway, leader: Leader) -> None:
    leader.place("node-1", MODEL, 1)
    leader.place("node-2", MODEL, 1)
    led(gw, leader)
    for node in gw.nodes:
        node.script = [says(500, {"error": "out of luck"})]
    # Whichever is first fails, and the other one too; then the first, where no other is left.
    answer = gw.post()
    assert answer.status_code == 200 and answer.headers["X-Corral-Attempts"] == "3"
    until(lambda: not leader.used(), "nothing is held")


def test_without_the_store_a_gateway_goes_on_with_its_share_and_tells_it_later(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """What runs counts on, what waits is served, and what was given meanwhile is counted when the store is back."""
    placed(gw, leader, 4, "node-1", "node-2")
    held = Held()
    hold(gw, held)
    asked = [callers.submit(gw.post) for _ in range(9)]
    until(lambda: held.running == 8 and leader.waiting() == 1, "eight run, one waits")
    gw.valkey.process.send(signal.SIGSTOP)
    try:
        held.release(2)
        until(lambda: held.began == 9 and held.running == 7, "a slot of its share is used again")
        asked += [callers.submit(gw.post) for _ in range(2)]
        until(lambda: held.running == 8, "another one")
    finally:
        gw.valkey.process.send(signal.SIGCONT)
    until(lambda: sum(leader.used().values()) == 8 and leader.waiting() == 1, "the store knows of all")
    held.release(12)
    assert [one.result().status_code for one in asked] == [200] * 11
    assert held.most == 8
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_a_key_that_is_revoked_waits_no_more(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    key = gw.new_key()
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    waits = callers.submit(gw.post, headers={"Authorization": f"Bearer {key}"})
    until(lambda: leader.waiting() == 1, "one waits")
    gw.revoke_last_key()
    assert waits.result().status_code == 401 and "revoked" in waits.result().text
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    held.release()
    assert runs.result().status_code == 200 and held.began == 1


def test_a_model_that_is_removed_is_waited_for_no_more(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    waits = callers.submit(gw.post)
    until(lambda: leader.waiting() == 1, "one waits")
    gw.publish(tags=[{"name": "other:latest", "model": "other:latest", "size": 1}])
    assert waits.result().status_code == 404
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    held.release()
    assert runs.result().status_code == 200


def test_who_may_not_use_every_node_passes_nobody(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    """However long it waits: what it avoids is looked at again, and its ticket stays."""
    counted = f"{MODEL}|node-1"
    leader.place("node-1", MODEL, 1)
    led(gw, leader)
    leader.place("node-2", counted, 1)
    wide, narrow = ({"Authorization": f"Bearer {gw.new_key(tenant=name)}"} for name in ("wide", "narrow"))
    gw.control.publish(dedicated={"wide": ["node-1", "node-2"], "narrow": ["node-2"]})
    gw.control.until_known()
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post, headers=wide)
    until(lambda: held.running == 1, "one runs")
    first = callers.submit(gw.post, headers=wide)
    until(lambda: leader.waiting(counted) == 1, "one waits")
    second = callers.submit(gw.post, headers=narrow)
    until(lambda: leader.waiting(counted) == 2, "another one")
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 2.5, "it was looked at several times")
    held.release()
    until(lambda: held.began == 2, "the next one runs")
    held.release()
    assert first.result(60).status_code == 200 and not second.done()
    held.release()
    assert [one.result().status_code for one in (runs, second)] == [200] * 2
    until(lambda: not leader.used(counted), "nothing is held")


def test_a_conversation_goes_on_where_it_was(gw: Gateway, leader: Leader) -> None:
    """Whatever is least busy by name or number: the node has read all but the last turn."""
    leader.place("node-1", MODEL, 4)
    leader.place("node-2", MODEL, 4)
    led(gw, leader)
    long = "x" * 2000

    def say(*texts: str) -> str:
        said = [{"role": "user", "content": text} for text in texts]
        answer = httpx.post(gw.url + "/api/chat", json={"model": "m", "messages": said}, headers=gw.auth, timeout=60)
        assert answer.status_code == 200
        until(lambda: not leader.used(), "nothing runs")
        return answer.headers["X-Corral-Node"]

    first = say("a" + long)
    leader.place(first, MODEL, 4, "draining")
    second = say("b" + long)
    assert second != first
    leader.place(first, MODEL, 4)
    for turns in range(3):
        assert say("b" + long, *["more"] * turns) == second
        assert say("a" + long, *["more"] * turns) == first


def test_a_bulk_of_embeddings_lets_others_have_their_turn(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """Its batches have a slot each, of the one that does embeddings; a node that fails one of them is asked again."""
    placed(gw, leader, 4, "node-1")
    node = gw.nodes[0]
    free = threading.Semaphore(0)

    def embeds(connection: socket.socket) -> None:
        given = node.requests[-1]["body"]["input"]
        free.acquire()
        says(200, {"model": "m", "embeddings": [[int(text)] for text in given], "prompt_eval_count": 3})(connection)

    node.script = [embeds, embeds, says(500, {"error": "out of luck"}), embeds, embeds]
    bulk = {"model": "m", "input": [str(number) for number in range(130)]}
    first = callers.submit(httpx.post, gw.url + "/api/embed", json=bulk, headers=gw.auth, timeout=60)
    until(lambda: len(node.requests) and node.requests[-1]["line"].startswith("POST /api/embed"), "the first batch")
    one = {"model": "m", "input": ["7"]}
    other = callers.submit(httpx.post, gw.url + "/api/embed", json=one, headers=gw.auth, timeout=60)
    until(lambda: leader.waiting() == 1, "it waits for the slot")
    free.release(2)
    assert other.result().json()["embeddings"] == [[7]], "between two batches"
    free.release(2)
    answer = first.result()
    assert [vector[0] for vector in answer.json()["embeddings"]] == list(range(130))
    assert answer.json()["prompt_eval_count"] == 9
    assert answer.headers["X-Corral-Attempts"] == "2", "of one of them"
    sizes = [len(request["body"]["input"]) for request in node.requests if "input" in request["body"]]
    assert sizes == [64, 1, 64, 64, 2]
    record = gw.control.settled(answer.headers["X-Request-ID"])
    assert (record["outcome"], record["prompt_tokens"]) == ("ok", 9)
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_an_answer_tells_one_place_in_the_queue_though_each_of_its_batches_had_to_wait(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 4, "node-1")
    node = gw.nodes[0]
    free = threading.Semaphore(0)

    def embeds(connection: socket.socket) -> None:
        given = node.requests[-1]["body"]["input"]
        free.acquire()
        says(200, {"model": "m", "embeddings": [[1]] * len(given), "prompt_eval_count": 3})(connection)

    node.script = [embeds] * 5

    def ask(count: int) -> Future[httpx.Response]:
        body = {"model": "m", "input": ["x"] * count}
        return callers.submit(httpx.post, gw.url + "/api/embed", json=body, headers=gw.auth, timeout=60)

    bulk = ask(130)
    for number in (1, 3):
        until(lambda at=number: len([1 for one in node.requests if "input" in one["body"]]) == at, "a batch runs")  # type: ignore[misc]
        between = ask(1)
        until(lambda: leader.waiting() == 1, "one waits for the slot")
        free.release()
        until(lambda at=number: len([1 for one in node.requests if "input" in one["body"]]) == at + 1, "it runs")  # type: ignore[misc]
        until(lambda: leader.waiting() == 1, "the next batch waits")
        free.release()
        assert between.result().status_code == 200
    free.release()
    assert bulk.result().headers.get_list("X-Corral-Queue-Position") == ["1"]


def test_a_deadline_ends_the_wait_and_what_runs(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)

    def by(text: str) -> httpx.Response:
        return gw.post(headers=gw.auth | {"X-Corral-Deadline-Ms": text})

    for past in ("0", "-5"):
        answer = by(past)
        assert (answer.status_code, answer.json()["error"]) == (503, "the request's deadline is past")
        assert int(answer.headers["Retry-After"]) >= 1
    for nonsense in ("soon", "nan", "1.5", "9" * 5000):
        assert by(nonsense).status_code == 400
    assert held.began == 0
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    began = time.monotonic()
    late = by("1000")
    took = time.monotonic() - began
    assert took >= 1.0
    assert late.status_code == 503 and 1 <= waited(late.json()["error"]) <= round(took)
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    held.release()
    assert runs.result().status_code == 200
    said = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    headers = gw.auth | {"X-Corral-Deadline-Ms": "1500"}
    cut = httpx.post(gw.url + "/api/chat", json=said, headers=headers, timeout=60)
    assert cut.status_code == 200 and "longer than 1.5 s" in cut.text, "in band, as it had begun"
    held.release()
    until(lambda: not leader.used(), "nothing is held")


def test_a_model_that_no_node_has_the_memory_for(gw: Gateway, leader: Leader) -> None:
    def declare(memory: int) -> None:
        tags = [{"name": MODEL, "model": MODEL, "size": 3 << 30}]
        gw.control.publish(nodes=[node | {"tags": tags, "memory": memory} for node in gw.control.snapshot["nodes"]])
        gw.control.until_known()

    leader.place("node-1", MODEL, 1)
    led(gw, leader)
    declare(2 << 30)
    answer = gw.post()
    assert answer.status_code == 507
    assert "needs 3.0 GiB" in answer.json()["error"] and "has 2.0 GiB" in answer.json()["error"]
    declare(4 << 30)
    assert gw.post().status_code == 200


def test_without_a_leader_nodes_load_by_themselves(gw: Gateway, leader: Leader) -> None:
    leader.place("node-1", MODEL, 1, "absent")
    leader.leaves()
    until(lambda: gw.post().status_code == 200, "it is served where nobody says that it stands")


def test_a_tenant_s_nodes_are_counted_apart(gw: Gateway, leader: Leader) -> None:
    leader.place("node-1", MODEL, 1)
    leader.place("node-2", f"{MODEL}|node-2", 1)
    led(gw, leader)
    key = gw.new_key(tenant="acme")
    gw.control.publish(dedicated={"acme": ["node-2"]})
    until(lambda: gw.post().headers["X-Corral-Node"] == "node-1", "node-2 serves no other")
    own = {"Authorization": f"Bearer {key}"}
    until(lambda: gw.post(headers=own).headers["X-Corral-Node"] == "node-2", "the tenant has a node of its own")
    assert {gw.post(headers=own).headers["X-Corral-Node"] for _ in range(3)} == {"node-2"}
    assert {gw.post().headers["X-Corral-Node"] for _ in range(3)} == {"node-1"}
    until(lambda: not leader.used() and not leader.used(f"{MODEL}|node-2"), "nothing is held")


def test_a_node_that_died_is_left_for_the_other(gw: Gateway, leader: Leader) -> None:
    placed(gw, leader, 4, "node-1", "node-2")
    gw.nodes[0].stop()
    try:
        seen = [gw.post() for _ in range(8)]
        assert {one.status_code for one in seen} == {200}
        assert {one.headers["X-Corral-Node"] for one in seen} == {"node-2"}
        assert sum(int(one.headers["X-Corral-Attempts"]) > 1 for one in seen) <= 3
    finally:
        gw.nodes[0].restart()
    until(lambda: not leader.used(), "nothing is held")
