"""A caller leaves: the node's work ends at once, the node is not to blame, and what was used is on record."""

from __future__ import annotations

import http.client
import itertools
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from support.fleet import MODEL, SINGLE, Fleet
from support.limits import unused
from support.load import CHAT, PROMPT, WHOLE, body_of
from support.mixed import WRITTEN
from support.process import until

CANCELLED_WITHIN = 1.0
EXACT = "the answer's tokens counted exactly, the prompt's guessed and marked as an estimate"
"""Who leaves does so before the node has said how many tokens his prompt has."""
LONG = 15
"""Times the usual prompt: some three seconds of reading."""
_numbers = itertools.count(1)


def leave(fleet: Fleet, path: str, model: str, after_bytes: int, wait: float = 0.2) -> tuple[str, str]:
    """Ask for a long answer and close the connection in the midst of it: the request's id and its node."""
    request_id = f"left-{next(_numbers)}"
    connection = http.client.HTTPConnection(urlsplit(fleet.stack.url).netloc, timeout=10)
    headers = fleet.stack.headers() | {"X-Request-ID": request_id, "Content-Type": "application/json"}
    connection.request("POST", path, body_of(path, model, 2000), headers)
    node = ""
    if after_bytes:
        response = connection.getresponse()
        assert response.status == 200
        node = response.headers["X-Corral-Node"]
        read = 0
        while read < after_bytes:
            read += len(response.read1(1000))
        response.close()
    else:
        time.sleep(wait)
    connection.close()
    return request_id, node


@pytest.mark.parametrize("path", WRITTEN)
def test_the_node_stops_within_a_second(fleet: Fleet, path: str, matrix: Callable[[str, str, str], None]) -> None:
    request_id, name = leave(fleet, path, SINGLE, after_bytes=600)
    left = time.monotonic()
    # The model runs one request at a time: this one is answered when the other has ended.
    body = {"model": SINGLE, "prompt": "a", "options": {"num_predict": 1}, "stream": False}
    answer = httpx.post(fleet.nodes[name].url + "/api/generate", json=body, timeout=30)
    assert answer.status_code == 200
    took = time.monotonic() - left
    assert took < CANCELLED_WITHIN
    matrix(f"caller leaves, {path}", "upstream cancelled <= 1 s", f"{took:.2f} s")

    (record,) = fleet.records(request_id)
    assert (record["outcome"], record["status"], record["node"], record["route"]) == ("client_gone", 499, name, path)
    assert record["estimated"] is True
    exact = httpx.post(fleet.nodes[name].url + "/api/chat", content=body_of(CHAT, SINGLE, 1, stream=False)).json()
    assert exact["prompt_eval_count"] / 3 < record["prompt_tokens"] < exact["prompt_eval_count"] * 3
    assert 1 <= record["tokens"] < 100


@pytest.mark.parametrize("when", ["while its prompt is read", "in the midst of its answer"])
def test_a_connection_that_is_reset_ends_the_work_and_is_counted_as_it_was(
    fleet: Fleet, when: str, matrix: Callable[[str, str, str], None]
) -> None:
    name = f"reset-{unused()}"
    key = fleet.key(name)
    reads = when == "while its prompt is read"
    # Three seconds of reading for one, a few hundredths for the other.
    prompt = PROMPT * (LONG if reads else 1)
    for node in fleet.nodes.values():
        node.count_anew()
    body = body_of(CHAT, MODEL, 2000, prompt)
    address = urlsplit(fleet.stack.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {key}\r\nX-Request-ID: {name}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def work(what: str) -> int:
        return sum(node.work()[what] for node in fleet.nodes.values())

    with socket.create_connection((address.hostname, address.port or 80), timeout=10) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: work("running") == 1 and (reads or work("tokens") >= 5), when, every=0.01)
        before = work("tokens")
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left = time.monotonic()
    until(lambda: work("running") == 0, "the node has stopped", every=0.01)
    took, wrote = time.monotonic() - left, work("tokens")
    (record,) = fleet.records(name)
    assert (record["outcome"], record["status"], record["estimated"]) == ("client_gone", 499, True)
    assert record["prompt_tokens"] > 0
    # What came counts, to the token: what the node wrote until it heard that the caller has left may have come or not.
    assert max(0, before - 1) <= record["tokens"] <= wrote and bool(wrote) != reads
    report = fleet.stack.corral("usage", "report")["usage"]
    (usage,) = [row for row in report if (row["key"], row["model"]) == (key.split("_")[1], MODEL)]
    assert (usage["requests"], usage["tokens"]) == (1, record["tokens"])
    assert usage["prompt_tokens"] == record["prompt_tokens"]
    counted = f"{took:.2f} s, {record['tokens']} tokens counted, the node wrote {wrote}"
    matrix(f"caller resets {when}", f"upstream closed <= 1 s, {EXACT}", counted)
    assert took <= CANCELLED_WITHIN


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("path", WRITTEN)
def test_what_the_node_wrote_until_its_caller_left_counts(
    fleet: Fleet, path: str, stream: bool, matrix: Callable[[str, str, str], None]
) -> None:
    """Also of what is put together before it is sent: nothing of it was."""
    request_id = f"left-{next(_numbers)}"
    for node in fleet.nodes.values():
        node.count_anew()

    def work(what: str) -> int:
        return sum(node.work()[what] for node in fleet.nodes.values())

    connection = http.client.HTTPConnection(urlsplit(fleet.stack.url).netloc, timeout=10)
    headers = fleet.stack.headers() | {"X-Request-ID": request_id, "Content-Type": "application/json"}
    connection.request("POST", path, body_of(path, MODEL, 2000, stream=stream), headers)
    until(lambda: work("running") == 1 and work("tokens") >= 5, "it is in the midst of its answer", every=0.01)
    before = work("tokens")
    connection.close()
    until(lambda: work("running") == 0, "the node has stopped", every=0.01)
    wrote = work("tokens")
    (record,) = fleet.records(request_id)
    assert (record["outcome"], record["status"], record["estimated"]) == ("client_gone", 499, True)
    # The last one may be on its way when the node is asked, and what came while the caller left may count or not.
    assert before - 1 <= record["tokens"] <= wrote
    assert record["prompt_tokens"] > 0
    counted = f"{record['tokens']} tokens counted, the node wrote {wrote}"
    matrix(f"caller leaves, {path}, {'streamed' if stream else 'not streamed'}", EXACT, counted)


def test_a_whole_answer_is_not_an_estimate(fleet: Fleet) -> None:
    client = fleet.client()
    answer = client.ask(CHAT, body_of(CHAT, MODEL, 4), f"stayed-{unused()}")
    client.close()
    (record,) = fleet.records(answer.request_id)
    assert (record["outcome"], record["estimated"], record["tokens"]) == ("ok", False, 4)
    assert f'"prompt_eval_count":{record["prompt_tokens"]}' in answer.body.decode()


def test_500_callers_that_leave_are_not_held_against_a_node(
    fleet: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    ejections = fleet.sum_of("corral_ejections_total")
    jobs = [(path, after_bytes) for _ in range(50) for path in WRITTEN for after_bytes in (0, 300)]
    states: list[set[str]] = []
    with fleet.load(clients=4, tokens=[30], name="unharmed") as load, ThreadPoolExecutor(12) as pool:
        left = [pool.submit(leave, fleet, path, MODEL, after_bytes) for path, after_bytes in jobs]
        while not all(each.done() for each in left):
            states.append(set(fleet.states().values()))
            time.sleep(0.1)
        load.more(10, "node-1")
        load.more(10, "node-2")
    assert load.unlike(WHOLE) == []
    assert {answer.attempts for answer in load.answers} == {1}
    assert states and all(each == {"ready"} for each in states)
    assert fleet.sum_of("corral_ejections_total") == ejections
    records = fleet.records(*(each.result()[0] for each in left[-90:]))
    for (_, after_bytes), record in zip(jobs[-90:], records, strict=True):
        assert record["outcome"] == "client_gone"
        # Who saw nothing may have left before his request was on record, which comes before a node is asked.
        asked = bool(after_bytes or record["node"])
        assert (record["estimated"], record["prompt_tokens"] > 0) == (asked, asked), record
    measured = f"{len(jobs)} left, {len(states)} looks at the nodes, {len(load.answers)} others whole"
    matrix("callers leave", "500: no node changes state", measured)
