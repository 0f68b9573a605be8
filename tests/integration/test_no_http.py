"""Nodes whose answers are no HTTP, behind a real HAProxy: another node answers, and such a one is ejected.

HAProxy has one word for all that it cannot read, its own 502, which is also that for a node that closed; or, once the
head is passed on, it cuts. Either is a node's failure that counts (`corral.gateway.recover.FAILED`).
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.gateway import HEAD, LINE, Behaviour, Gateway, chunk, gateway
from support.held import leading, placed
from support.process import until

from corral.gateway.recover import Failure

EJECTIONS = "corral_ejections_total"


def endless(connection: socket.socket) -> None:
    """Headers until HAProxy has enough."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in itertools.count():
        connection.sendall(b"X-%d: one more\r\n" % number)


def dripping(connection: socket.socket) -> None:
    """A header each half second, for longer than anybody waits."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(90):
        connection.sendall(b"X-%d: one more\r\n" % number)
        time.sleep(0.5)


def ends_after(*pieces: bytes) -> Behaviour:
    """Sends that, each piece a packet of its own, and closes."""

    def behave(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)  # not for luck: whichever way HAProxy reads them, what follows holds
        connection.shutdown(socket.SHUT_RDWR)

    return behave


GARBAGE = {
    "endless headers": endless,
    "a header that is too large": ends_after(b"HTTP/1.1 200 OK\r\nX-Large: " + b"a" * 70_000 + b"\r\n\r\n"),
    "another protocol": ends_after(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a status that is no number": ends_after(b"HTTP/1.1 fine OK\r\n\r\n"),
    "JSON without a head": ends_after(LINE % b"one"),
    "a line that is no header": ends_after(b"HTTP/1.1 200 OK\r\nwhatever\r\n\r\n"),
    "two lengths": ends_after(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
    "another protocol from here on": ends_after(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "interim heads, no answer": ends_after(b"HTTP/1.1 100 Continue\r\n\r\n" * 3000),
    "half a head": ends_after(b"HTTP/1.1 200 OK\r\nContent-"),
    "a body shorter than its length": ends_after(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b'{"model":"m'),
    "a chunk's length that is no number": ends_after(HEAD, b"what\r\n" + LINE % b"one"),
    "a chunk without its end": ends_after(HEAD, chunk(LINE % b"one")[:20]),
}


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("no_http")) as started:
        yield started


@pytest.mark.parametrize("name", GARBAGE)
def test_another_node_answers_for_one_that_sends_no_http(gw: Gateway, name: str) -> None:
    gw.forget()
    before = gw.retries("reset")
    # Whichever is asked first.
    gw.nodes[0].script = gw.nodes[1].script = [GARBAGE[name]]
    answer = gw.post()
    assert (answer.status_code, answer.headers["X-Corral-Attempts"]) == (200, "2"), answer.text
    assert answer.json()["message"]["content"] == "w0 w1 w2 "
    assert gw.retries("reset") == before + 1


def test_where_no_node_sends_http_the_caller_hears_of_it(gw: Gateway) -> None:
    gw.forget()
    for node in gw.nodes:
        node.script = [endless] * 2
    answer = gw.post()
    assert (answer.status_code, answer.json()["error"]) == (502, f"{Failure.RESET.value} (2 attempts)")
    assert [len(node.requests) for node in gw.nodes] == [1, 1]


@pytest.mark.parametrize("script", [list(GARBAGE.values()) * 9, [dripping] * 99], ids=["at once", "dripping"])
def test_a_node_that_sends_no_http_is_ejected(tmp_path: Path, script: list[Behaviour]) -> None:
    with gateway(tmp_path) as gw, ThreadPoolExecutor(8) as pool:
        placed(gw, leading(gw), 4, "node-1", "node-2")
        gw.control.publish(nodes=[node | {"ps": node["tags"]} for node in gw.control.snapshot["nodes"]])
        gw.control.until_known()
        node = gw.nodes[0]
        node.script = script  # its canaries meet that too
        answers: list[httpx.Response] = []

        def ejected() -> bool:
            turn = len(answers)
            bodies = [gw.chat(stream=False, messages=[{"role": "user", "content": f"{turn}-{n}"}]) for n in range(8)]
            answers.extend(pool.map(lambda body: gw.post(body=body), bodies))
            return gw.metric(EJECTIONS) == 1

        until(ejected, "it is ejected")
        assert {(answer.status_code, answer.headers["X-Corral-Node"]) for answer in answers} == {(200, "node-2")}
        assert "2" in {answer.headers["X-Corral-Attempts"] for answer in answers}, "nobody met it"
        node.requests.clear()
        assert ejected()
        assert {answer.headers["X-Corral-Attempts"] for answer in answers[-8:]} == {"1"}
        assert all(asked["body"]["options"]["num_predict"] == 1 for asked in node.requests), "but for its canaries"
