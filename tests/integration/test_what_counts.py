"""Whose tokens usage has: those of an answer that its caller was sent, or left; not what nodes did beside that."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, Behaviour, Gateway, chunk, gateway, says, well
from support.held import leading, placed, queueing
from support.leader import Leader
from support.load import EMBED, EMBEDDINGS, GENERATE, LEGACY, body_of
from support.mixed import WRITTEN
from support.process import until

WORDS = HEAD + chunk(LINE % b"one ") * 5
COMPLETED = HEAD + chunk(b'{"model":"m:latest","response":"one ","done":false}\n') * 5
TEXTS = ["text"] * 100
"""To embed: two batches."""


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[Gateway]:
    with gateway(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway for requests that leave nothing behind: no node fails at them."""
    with gateway(tmp_path_factory.mktemp("shared")) as made:
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


def listened(gw: Gateway, path: str, heard: threading.Event) -> tuple[bytes, httpx.Response]:
    """All that is sent of a stream; `heard` is set once something is."""
    said = b""
    headers = {**gw.auth, "Content-Type": "application/json"}
    with httpx.stream("POST", gw.url + path, content=body_of(path, "m", 50), headers=headers, timeout=60) as answer:
        for data in answer.iter_raw():
            heard.set()
            said += data
    return said, answer


@pytest.mark.parametrize("path", WRITTEN)
def test_of_a_stream_whose_node_fails_all_that_came_before_is_sent_and_counts(gw: Gateway, path: str) -> None:
    heard = threading.Event()
    line = (COMPLETED if path in (GENERATE, LEGACY) else WORDS).removeprefix(HEAD)

    def fails(connection: socket.socket) -> None:
        connection.sendall(HEAD + line)
        assert heard.wait(60)
        # In one piece with the words before it, the last of which begins in the piece before.
        connection.sendall(line[:-20])
        connection.sendall(line[-20:] + chunk(b'{"error":"the disk is full"}\n') + END)

    acts(gw, fails)
    said, answer = listened(gw, path, heard)
    assert said.count(b"one ") == 10 and b"the disk is full" in said[-300:]
    outcome, _, prompt, tokens, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    assert (outcome, prompt > 0, tokens, estimated) == ("upstream_error", True, 10, True)


@pytest.mark.parametrize("path", WRITTEN)
def test_what_came_with_nonsense_is_not_sent_and_does_not_count(gw: Gateway, path: str) -> None:
    heard = threading.Event()
    line = (COMPLETED if path in (GENERATE, LEGACY) else WORDS).removeprefix(HEAD)

    def raves(connection: socket.socket) -> None:
        connection.sendall(HEAD + line)
        assert heard.wait(60)
        connection.sendall(line + chunk(b"nonsense\n"))

    acts(gw, raves)
    said, answer = listened(gw, path, heard)
    outcome, _, prompt, tokens, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    assert (outcome, prompt > 0, tokens, estimated) == ("upstream_error", True, said.count(b"one "), True)
    assert b"error" in said[-300:]


def test_who_has_a_deadline_that_passes_pays_for_what_was_made_until_then(gw: Gateway) -> None:
    assert gw.post().status_code == 200, "so that the next one does not wait for a leader that never comes"
    acts(gw, lambda connection: (connection.sendall(WORDS), gw.nodes[0].wait_for_close(connection))[1])
    answer = gw.post(headers={"X-Corral-Deadline-Ms": "2000"})
    assert answer.status_code == 504
    outcome, attempts, prompt, made, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    # Or a caller with a short one could have nodes work without end.
    assert (outcome, attempts, prompt > 0, made, estimated) == ("timeout", 1, True, 5, True)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", WRITTEN)
def test_who_leaves_pays_for_what_was_made_for_him_until_then(shared: Gateway, path: str, stream: bool) -> None:
    gw, name = shared, f"leaves{path.replace('/', '-')}-{stream}"
    gw.forget()
    said, killed = threading.Event(), threading.Event()

    def speaks(connection: socket.socket) -> None:
        connection.sendall(COMPLETED if path in (GENERATE, LEGACY) else WORDS)
        said.set()
        gw.nodes[0].wait_for_close(connection)
        killed.set()

    acts(gw, speaks)
    caller = http.client.HTTPConnection("127.0.0.1", gw.port)
    caller.request("POST", path, body_of(path, "m", 50, stream=stream), {**gw.auth, "X-Request-ID": name})
    assert said.wait(60)
    before = len(gw.control.notes)

    def tokens() -> list[tuple[bool, int]]:
        """How far it is, as recorded since its node has spoken; the first row may be of the time before that."""
        rows = [row for note in gw.control.notes[before:] if note["t"] == "progress" for row in note["rows"]]
        return [(row[3] > 0, row[4]) for row in rows[0 if stream else 1 :]]

    # Should the gateway be killed now, its callers have what was sent.
    until(lambda: tokens()[-1:] == [(True, 5) if stream else (False, 0)], "how far it is, is recorded")
    caller.close()
    outcome, attempts, prompt, made, estimated = counts(gw.control.settled(name))
    assert (outcome, attempts, prompt > 0, made, estimated) == ("client_gone", 1, True, 5, True)
    assert killed.wait(60)


def test_who_leaves_before_the_first_word_pays_for_the_prompt(gw: Gateway) -> None:
    for path in (*WRITTEN, EMBED, EMBEDDINGS):
        asked, ended = threading.Event(), threading.Event()

        def reads(connection: socket.socket, asked: threading.Event = asked, ended: threading.Event = ended) -> None:
            asked.set()
            gw.nodes[0].wait_for_close(connection)
            ended.set()

        acts(gw, reads)
        name, body = f"left{path.replace('/', '-')}", body_of(path, "m", 50)
        caller = http.client.HTTPConnection("127.0.0.1", gw.port)
        caller.request("POST", path, body, {**gw.auth, "X-Request-ID": name})
        assert asked.wait(60)
        caller.close()
        assert ended.wait(60)
        outcome, attempts, prompt, made, estimated = counts(gw.control.settled(name))
        assert (outcome, attempts, made, estimated) == ("client_gone", 1, 0, True), path
        assert len(body) / 8 < prompt < len(body) / 2, path


def test_a_guess_is_as_the_prompts_of_its_key_were_found_to_be(gw: Gateway) -> None:
    def four_a_byte(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LAST.replace(b'"prompt_eval_count":7', b'"prompt_eval_count":1000') % 1) + END)

    guesses = []
    for learned in (False, True):
        if learned:
            acts(gw, *[four_a_byte] * 9)
            assert {gw.post().status_code for _ in range(9)} == {200}
        acts(gw, cut)
        answer = gw.post(body=gw.chat())
        guesses.append(counts(gw.control.settled(answer.headers["X-Request-ID"]))[2])
    # No prompt is taken for more than four times what its size is.
    assert guesses[0] * 3.5 < guesses[1] <= guesses[0] * 4


@pytest.mark.parametrize("path", [EMBED, EMBEDDINGS])
def test_who_leaves_a_bulk_of_embeddings_pays_for_the_batches_that_a_node_had(gw: Gateway, path: str) -> None:
    """Of the whole ones what the node counted; of the one that it had, a guess."""
    for whole in (0, 1):
        asked, name = threading.Event(), f"left{path.replace('/', '-')}-{whole}"

        def reads(connection: socket.socket, asked: threading.Event = asked) -> None:
            asked.set()
            gw.nodes[0].wait_for_close(connection)

        vectors = {"model": "m", "embeddings": [[1]] * 64, "prompt_eval_count": 4000}
        acts(gw, *[says(200, vectors)] * whole, reads)
        caller = http.client.HTTPConnection("127.0.0.1", gw.port)
        body = json.dumps({"model": "m", "input": TEXTS})
        caller.request("POST", path, body, {**gw.auth, "X-Request-ID": name})
        assert asked.wait(60)
        caller.close()
        outcome, _, prompt, made, estimated = counts(gw.control.settled(name))
        assert (outcome, made, estimated) == ("client_gone", 0, True)
        size = (64, 36)[whole] * len('"text",')
        assert size / 4 < prompt - whole * 4000 < (size + 120) / 4


def test_who_leaves_a_bulk_of_embeddings_between_two_batches_pays_for_those_that_were_whole(
    tmp_path: Path,
) -> None:
    with queueing(tmp_path, "30s", 3) as gw, ThreadPoolExecutor(1) as callers:
        leader = leading(gw)
        placed(gw, leader, 4, "node-1")
        leave_between(gw, leader, callers)


def leave_between(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    node = gw.nodes[0]
    free = threading.Semaphore(0)

    def embeds(connection: socket.socket) -> None:
        free.acquire()
        says(200, {"model": "m", "embeddings": [[1]] * 64, "prompt_eval_count": 300})(connection)

    node.script = [embeds, embeds]
    bulk = http.client.HTTPConnection("127.0.0.1", gw.port)
    body = json.dumps({"model": "m", "input": ["x"] * 130})
    bulk.request("POST", "/api/embed", body, {**gw.auth, "X-Request-ID": "bulk"})

    def batches() -> int:
        """Of both: what has been asked before, to see that there is a leader, embeds nothing."""
        return sum("input" in request["body"] for request in node.requests)

    until(lambda: batches() == 1, "the first batch runs")
    one = {"model": "m", "input": ["7"]}
    other = callers.submit(httpx.post, gw.url + "/api/embed", json=one, headers=gw.auth, timeout=60)
    until(lambda: leader.waiting() == 1, "it waits for the slot")
    free.release()
    until(lambda: batches() == 2 and leader.waiting() == 1, "it has the slot, and the next batch waits")
    bulk.close()
    record = gw.control.settled("bulk")
    assert (record["outcome"], record["prompt_tokens"], record["estimated"]) == ("client_gone", 300, False)
    free.release()
    assert other.result().status_code == 200


def test_an_embedding_that_its_node_does_not_count_is_a_guess(gw: Gateway) -> None:
    """The older form of it answers with the vector alone: nobody is to embed for nothing."""
    acts(gw, says(200, {"embedding": [1.0]}))
    answer = gw.post("/api/embeddings", {"model": "m", "prompt": "w " * 400})
    assert answer.json() == {"embedding": [1.0]}
    outcome, _, prompt, tokens, estimated = counts(gw.control.settled(answer.headers["X-Request-ID"]))
    assert (outcome, tokens, estimated) == ("ok", 0, True)
    assert 200 <= prompt <= 220
    acts(gw, says(200, {"embedding": []}))
    answer = gw.post("/api/embeddings", {"model": "m", "prompt": ""})
    assert counts(gw.control.settled(answer.headers["X-Request-ID"])) == ("ok", 1, 0, 0, False)
