"""Whose tokens usage has: those of an answer that its caller was sent, or left; not what nodes did beside that."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gateway import HEAD, LINE, Behaviour, Gateway, chunk, gateway, well
from support.process import until

WORDS = HEAD + chunk(LINE % b"one ") * 5


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[Gateway]:
    with gateway(tmp_path) as made:
        yield made


def cut(connection: socket.socket) -> None:
    """A node that says five words, and is gone."""
    connection.sendall(WORDS)
    connection.shutdown(socket.SHUT_RDWR)


def acts(gw: Gateway, *behaviours: Behaviour) -> None:
    """Have the nodes do one after the other, whichever of them is asked."""
    left = list(behaviours)
    for node in gw.nodes:
        node.script = [lambda connection: left.pop(0)(connection)] * len(left)


def counts(record: dict[str, Any]) -> tuple[str, int, int, int, bool]:
    return record["outcome"], *(record[name] for name in ("attempts", "prompt_tokens", "tokens", "estimated"))


def test_an_answer_that_is_begun_anew_counts_once(gw: Gateway) -> None:
    acts(gw, cut, well)
    answer = gw.post()
    assert answer.json()["message"]["content"] == "w0 w1 w2 "
    assert counts(gw.control.settled(answer.headers["X-Request-ID"])) == ("ok", 2, 7, 3, False)


def test_an_answer_of_which_nothing_was_sent_counts_nothing(gw: Gateway) -> None:
    acts(gw, cut, cut)
    answer = gw.post()
    assert answer.status_code == 502
    assert counts(gw.control.settled(answer.headers["X-Request-ID"])) == ("upstream_error", 2, 0, 0, False)


def test_of_a_stream_that_was_cut_what_was_sent_counts(gw: Gateway) -> None:
    acts(gw, cut)
    answer = gw.post(body=gw.chat())
    assert answer.text.count("one ") == 5 and "error" in answer.text
    outcome, _, prompt, tokens, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    assert (outcome, prompt > 0, tokens, estimated) == ("upstream_error", True, 5, True)


def test_who_has_a_deadline_that_passes_pays_for_what_was_made_until_then(gw: Gateway) -> None:
    acts(gw, lambda connection: (connection.sendall(WORDS), gw.nodes[0].wait_for_close(connection))[1])
    answer = gw.post(headers={"X-Corral-Deadline-Ms": "1000"})
    assert answer.status_code == 504
    outcome, attempts, prompt, made, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    # Or a caller with a short one could have nodes work without end.
    assert (outcome, attempts, prompt > 0, made, estimated) == ("timeout", 1, True, 5, True)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_pays_for_what_was_made_for_him_until_then(gw: Gateway, stream: bool) -> None:
    said, killed = threading.Event(), threading.Event()

    def speaks(connection: socket.socket) -> None:
        connection.sendall(WORDS)
        said.set()
        gw.nodes[0].wait_for_close(connection)
        killed.set()

    acts(gw, speaks)
    caller = http.client.HTTPConnection("127.0.0.1", gw.port)
    caller.request("POST", "/api/chat", json.dumps(gw.chat(stream=stream)), {**gw.auth, "X-Request-ID": "leaves"})
    assert said.wait(20)

    def tokens() -> list[Any]:
        rows = [row for note in gw.control.notes if note["t"] == "progress" for row in note["rows"]]
        return rows[-1] if rows else []

    until(lambda: tokens(), "how far it is, is recorded")
    # Should the gateway be killed now, its callers have what was sent.
    assert (tokens()[3] > 0, tokens()[4]) == ((True, 5) if stream else (False, 0))
    caller.close()
    outcome, attempts, prompt, made, estimated = counts(gw.control.settled("leaves"))
    assert (outcome, attempts, prompt > 0, made, estimated) == ("client_gone", 1, True, 5, True)
    assert killed.wait(20)
