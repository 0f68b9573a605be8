"""A model that is disabled, and a key that is revoked, while requests are under way: what no node has ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, says
from support.held import MODEL, Held, hold, placed, queueing
from support.leader import Leader
from support.process import until

DIGEST = "sha256:" + "a" * 64
SAID: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
FORMS: dict[str, dict[str, Any]] = {
    "/api/chat": SAID | {"stream": False},
    "/api/embed": {"model": "m", "input": ["x"]},
    "/v1/chat/completions": SAID,
    "/v1/messages": SAID | {"max_tokens": 9, "stream": True},
}


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, "30s", 9) as made:
        yield made


def disable(gw: Gateway) -> None:
    """Have the gateway know that the model is disabled."""
    gw.control.publish(disabled=[MODEL])
    gw.control.until_known()


def told(answer: httpx.Response) -> tuple[int, Any]:
    """What a caller hears, but for what is its request's own."""
    said = answer.json()
    said.pop("request_id", None)
    return answer.status_code, said


class Node:
    """Answers of a node that a test lets go, whole; ``bodies`` is what was asked."""

    def __init__(self, gw: Gateway) -> None:
        self._node = gw.nodes[0]
        self._free = threading.Semaphore(0)
        self.bodies: list[dict[str, Any]] = []

    def does(self, *what: Callable[[socket.socket], None]) -> None:
        """Have it do so at its next requests, each once it is let go."""
        self._node.script = [self._held(one) for one in what]

    def asked(self, count: int) -> None:
        """Wait until it was asked as often."""
        until(lambda: len(self.bodies) == count, f"it was asked {count} times")

    def release(self) -> None:
        """Let one go."""
        self._free.release()

    def embeds(self, connection: socket.socket) -> None:
        """Answer a batch."""
        given = self.bodies[-1]["input"]
        says(200, {"model": "m", "embeddings": [[1]] * len(given), "prompt_eval_count": 3})(connection)

    def _held(self, what: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
        def behaviour(connection: socket.socket) -> None:
            self.bodies.append(self._node.requests[-1]["body"])
            self._free.acquire()
            what(connection)

        return behaviour


def fails(connection: socket.socket) -> None:
    """Answer that the node is at fault."""
    says(500, {"error": "out of luck"})(connection)


def test_a_model_that_is_disabled_is_waited_for_no_more(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """Who waits hears what a new request hears, in the form of its API; what a node has goes on."""
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post, body=SAID)
    until(lambda: held.running == 1, "one runs")
    waits = {path: callers.submit(gw.post, path, body) for path, body in FORMS.items()}
    until(lambda: leader.waiting() == len(FORMS), "they wait")
    disable(gw)
    for path, waiting in waits.items():
        assert told(waiting.result()) == told(gw.post(path, FORMS[path])), path
        assert waiting.result().status_code == 403 and "disabled by its operator" in waiting.result().text
    assert waits["/v1/chat/completions"].result().json()["error"]["code"] == "model_disabled"
    until(lambda: leader.waiting() == 0, "their tickets are given up")
    record = gw.control.settled(waits["/api/chat"].result().headers["X-Request-ID"])
    assert (record["status"], record["outcome"]) == (403, "refused")
    held.release()
    assert json.loads(runs.result().text.splitlines()[-1])["done"] is True
    assert held.began == 1
    until(lambda: not leader.used(), "nothing is held")


@pytest.mark.parametrize("switch", ["model", "key"])
def test_a_bulk_of_embeddings_ends_between_two_batches(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor, switch: str
) -> None:
    key = {"Authorization": f"Bearer {gw.new_key()}"}
    placed(gw, leader, 4, "node-1")
    node = Node(gw)
    node.does(node.embeds, node.embeds, node.embeds)
    bulk: Future[httpx.Response] = callers.submit(
        gw.post, "/v1/embeddings", {"model": "m", "input": ["x"] * 130}, headers=key
    )
    node.asked(1)
    node.release()
    node.asked(2)
    if switch == "model":
        disable(gw)
    else:
        gw.revoke_last_key()
    node.release()
    status, said = told(bulk.result())
    if switch == "model":
        assert (status, said) == told(gw.post("/v1/embeddings", FORMS["/api/embed"], headers=key)) and status == 403
    else:
        assert status == 401 and "revoked" in said["error"]["message"]
    assert len(node.bodies) == 2
    record = gw.control.settled(bulk.result().headers["X-Request-ID"])
    assert (record["outcome"], record["prompt_tokens"]) == ("refused", 0)
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


@pytest.mark.parametrize("path", ["/api/chat", "/api/embed"])
def test_a_request_whose_node_fails_is_not_tried_again(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor, path: str
) -> None:
    """Nor is a batch of embeddings, of which the ones before it are kept."""
    placed(gw, leader, 4, "node-1")
    node = Node(gw)
    bulk = path == "/api/embed"
    before = [node.embeds] if bulk else []
    node.does(*before, fails, fails, fails)
    body = {"model": "m", "input": ["x"] * 130} if bulk else FORMS[path]
    asked = callers.submit(gw.post, path, body)
    for number, _ in enumerate(before, 1):
        node.asked(number)
        node.release()
    node.asked(len(before) + 1)
    disable(gw)
    node.release()
    assert told(asked.result()) == told(gw.post(path, FORMS[path])) and asked.result().status_code == 403
    assert len(node.bodies) == len(before) + 1
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_a_stream_goes_on_at_its_node_and_at_no_other(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    """Of two whose model is disabled in the midst, one whole, and one whose node is lost."""
    placed(gw, leader, 2, "node-1", "node-2")
    tag = {"name": MODEL, "model": MODEL, "modified_at": "2026-11-23T15:00:00Z", "digest": DIGEST, "size": 1}
    gw.control.publish(continuable={MODEL: DIGEST})
    gw.publish(tags=[tag])
    gw.forget()
    go_on = threading.Event()
    begun: list[str] = []

    def goes_on(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"w0"))
        begun.append("whole")
        assert go_on.wait(60)
        connection.sendall(chunk(LINE % b"w1") + chunk(LAST % 2) + END)

    def dies(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"w0"))
        begun.append("lost")
        assert go_on.wait(60)
        connection.close()

    for behaviour in (goes_on, dies):
        for node in gw.nodes:
            node.script = [behaviour]
        count = len(begun)
        asked = callers.submit(gw.post, "/api/chat", SAID)
        until(lambda count=count: len(begun) == count + 1, "it has begun")  # type: ignore[misc]
        if behaviour is goes_on:
            whole = asked
    disable(gw)
    requests = sum(len(node.requests) for node in gw.nodes)
    go_on.set()
    assert json.loads(whole.result().text.splitlines()[-1])["done"] is True
    lost = asked.result()
    assert lost.status_code == 200 and "disabled by its operator" in lost.text.splitlines()[-1]
    assert sum(len(node.requests) for node in gw.nodes) == requests, "no node was asked to go on with it"
