"""`gateway.queue.heartbeat`: who waits for a stream of events has its head and comments, and hears all else in band."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from support.gateway import END, HEAD, Behaviour, Gateway, chunk, gateway, says
from support.held import Held, leading, placed, queueing, waited
from support.leader import Leader
from support.process import until

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
WAITING = ": waiting"
SAID = {"messages": [{"role": "user", "content": "Guten Tag!"}], "max_tokens": 9}
BEATS = {"queue": {"heartbeat": "1s"}}
EVERY = 1000.0  # ms


@pytest.fixture
def gw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, getattr(request, "param", "30s"), 3, heartbeat="1s") as made:
        yield made


def body(path: str, stream: bool = True) -> dict[str, Any]:
    said = {"prompt": "Guten Tag!"} if path == COMPLETIONS else SAID
    return {"model": "m", "stream": stream} | said


def both(connection: socket.socket, rest: threading.Event | None = None) -> None:
    """A node's whole answer; its lines do for a chat and for a completion. `rest`: what the second one waits for."""
    connection.sendall(HEAD)
    for word in ("one ", "two ", ""):
        assert word != "two " or rest is None or rest.wait(60)
        line = {"model": "m:latest", "message": {"role": "assistant", "content": word}, "response": word}
        line |= {"done": not word}
        if not word:
            line |= {"done_reason": "stop", "prompt_eval_count": 7, "eval_count": 2}
        connection.sendall(chunk(json.dumps(line).encode() + b"\n"))
    connection.sendall(END)


def after(gate: threading.Event, then: Behaviour) -> Behaviour:
    """A node that is silent until the gate is open."""

    def waits(connection: socket.socket) -> None:
        assert gate.wait(60)
        then(connection)

    return waits


@contextmanager
def streamed(url: str, gw: Gateway, path: str, **headers: str) -> Iterator[tuple[httpx.Response, Iterator[str]]]:
    """The head of a stream and its lines, as they come; a body that is framed wrong, or has no end, is an error."""
    asked = httpx.stream("POST", url + path, json=body(path), headers=gw.auth | headers, timeout=60)
    with asked as response:
        yield response, response.iter_lines()


def beats(lines: Iterator[str], count: int) -> None:
    """So many comments come next, and nothing else."""
    assert [next(lines) for _ in range(2 * count)] == [WAITING, ""] * count


def events(lines: list[str]) -> list[str]:
    """What stands behind the comments; no comment comes later."""
    while lines[:2] == [WAITING, ""]:
        lines = lines[2:]
    assert not [line for line in lines if line.startswith(":")]
    return lines


def alike(lines: list[str]) -> list[str]:
    """The lines of a stream, whenever it was and whatever its answer is called."""
    return [re.sub(r'"(created":|id":"[a-z]+[-_])\w+', r'"\1', line) for line in lines]


def told(lines: list[str], path: str) -> dict[str, Any]:
    """The error that is all of a stream, in the form of its API."""
    kind, data = ("event: error", lines[1]) if path == MESSAGES else ("", lines[0])
    assert lines == ([kind, data, ""] if kind else [data, ""])
    value: dict[str, Any] = json.loads(data.removeprefix("data: "))
    if path == MESSAGES:
        assert value["type"] == "error" and value["request_id"].startswith("req_")
    return dict(value["error"])


def first_runs(gw: Gateway, callers: ThreadPoolExecutor, *then: Behaviour) -> tuple[Held, Future[httpx.Response]]:
    """Have one request hold the only slot, and the node do so at the next ones."""
    held = Held()
    gw.nodes[0].script = [held, *then]
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    return held, runs


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
def test_who_waits_has_the_head_and_comments_and_then_the_very_same_stream(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor, path: str
) -> None:
    """Comments come while it has a ticket, and while its node reads the prompt or loads the model."""
    placed(gw, leader, 1, "node-1")
    node, gate, rest = gw.nodes[0], threading.Event(), threading.Event()
    node.script = [both]
    with streamed(gw.url, gw, path, **{"X-Request-ID": "quick"}) as (quick, lines):
        expected = list(lines)
    held, runs = first_runs(gw, callers, after(gate, lambda connection: both(connection, rest)))
    with streamed(gw.edge, gw, path, **{"X-Request-ID": "late"}) as (late, lines):
        beats(lines, 2)
        held.release()
        until(lambda: node.requests[-1]["headers"][b"x-request-id"] == b"late", "the node has it")
        beats(lines, 2)
        gate.set()
        came = [next(lines)]
        while not came[-1].startswith("data: "):
            came.append(next(lines))
        rest.set()
        assert alike(events(came + list(lines))) == alike(expected)
    assert runs.result().status_code == 200
    assert (late.status_code, late.headers["Content-Type"]) == (200, quick.headers["Content-Type"])
    assert (late.headers["X-Request-ID"], late.headers["X-Corral-Queue-Position"]) == ("late", "1")
    unknown = {"x-corral-node", "x-corral-attempts", "x-corral-queue-ms"}
    assert quick.headers.keys() - late.headers.keys() == unknown, "what nobody knew by then"
    soon, record = (gw.control.settled(name) for name in ("quick", "late"))
    same = ("status", "outcome", "node", "attempts", "prompt_tokens", "tokens", "estimated")
    assert [record[name] for name in same] == [soon[name] for name in same]
    assert record["queue_ms"] >= 2 * EVERY and record["ttft_ms"] >= 4 * EVERY, "a comment is no token"


def test_a_try_on_another_node_is_as_invisible_as_without(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway=BEATS) as gw:
        gate = threading.Event()
        for node in gw.nodes:
            node.script = [after(gate, says(500, {"error": "out of luck"}))]
        with streamed(gw.url, gw, CHAT, **{"X-Request-ID": "late"}) as (_, lines):
            beats(lines, 1)
            gate.set()
            found = events(list(lines))
        assert [one["delta"]["content"] for one in choices(found)] == ["w0 ", "w1 ", "w2 ", ""]
        assert found[-2] == "data: [DONE]" and not [line for line in found if '"error"' in line]
        record = gw.control.settled("late")
        assert (record["status"], record["outcome"], record["attempts"]) == (200, "ok", 3)


def choices(lines: list[str]) -> list[dict[str, Any]]:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return [one["choices"][0] for one in chunks if one["choices"]]


@pytest.mark.parametrize("gw", ["3s"], indirect=True)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_who_waited_too_long_is_told_in_band_and_each_byte_is_counted(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor, path: str
) -> None:
    placed(gw, leader, 1, "node-1")
    held, runs = first_runs(gw, callers)
    sent = json.dumps(body(path)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {gw.key}\r\nX-Request-ID: late\r\n"
    with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as caller, caller.makefile("rb") as answer:
        caller.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(sent), sent))
        data = answer.read()  # to the end of the connection
    assert data.startswith(b"HTTP/1.1 200 ") and data.count(b"HTTP/1.") == 1, "one head"
    chunks = re.findall(rb"[0-9a-f]+\r\n((?:.+\n)+\n)\r\n", data.partition(b"\r\n\r\n")[2])
    assert chunks[:-1] and set(chunks[:-1]) == {b": waiting\n\n"}
    error = told(chunks[-1].decode().split("\n")[:-1], path)
    assert "s; retry in" in error["message"]
    assert error["type"] == ("overloaded_error" if path == MESSAGES else "api_error")
    record = gw.control.settled("late")
    assert (record["status"], record["outcome"], record["tokens"]) == (503, "overloaded", 0)
    # What is overdue is looked for now and then.
    assert 3 <= waited(error["message"]) <= round(record["queue_ms"] / 1e3)
    assert data.endswith(b"0\r\n\r\n") and record["resp_bytes"] == sum(map(len, chunks))
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    held.release()
    assert runs.result().status_code == 200


def test_who_may_not_wait_any_more_is_told_in_band(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    key = gw.new_key()
    placed(gw, leader, 1, "node-1")
    held, runs = first_runs(gw, callers)
    with (
        streamed(gw.url, gw, MESSAGES, **{"X-Request-ID": "model"}) as (_, lines),
        streamed(gw.url, gw, CHAT, **{"X-Request-ID": "key", "Authorization": f"Bearer {key}"}) as (_, others),
    ):
        beats(lines, 1)
        beats(others, 1)
        gw.revoke_last_key()
        error = told(events(list(others)), CHAT)
        assert error["code"] == "invalid_api_key" and "revoked" in error["message"]
        gw.publish(tags=[{"name": "other:latest", "model": "other:latest", "size": 1}])
        assert told(events(list(lines)), MESSAGES)["type"] == "not_found_error"
    for name, status in (("key", 401), ("model", 404)):
        record = gw.control.settled(name)
        assert (record["status"], record["outcome"], record["attempts"]) == (status, "refused", 0)
    held.release()
    assert runs.result().status_code == 200


@pytest.mark.parametrize(
    ("path", "said", "status", "kind", "outcome", "attempts"),
    [
        (CHAT, says(500, {"error": "out of luck"}), 502, "api_error", "upstream_error", 3),
        (MESSAGES, says(400, {"error": "invalid option"}), 400, "invalid_request_error", "refused", 1),
    ],
)
def test_what_nodes_say_at_last_is_told_in_band(
    tmp_path: Path, path: str, said: Behaviour, status: int, kind: str, outcome: str, attempts: int
) -> None:
    """Its record says what it would have without the comments: whose fault it is does not change with them."""
    with gateway(tmp_path, gateway=BEATS) as gw:
        gate = threading.Event()
        for node in gw.nodes:
            node.script = [after(gate, said)] * 3
        with streamed(gw.url, gw, path, **{"X-Request-ID": "late"}) as (_, lines):
            beats(lines, 1)
            gate.set()
            assert told(events(list(lines)), path)["type"] == kind
        record = gw.control.settled("late")
        assert (record["status"], record["outcome"], record["attempts"]) == (status, outcome, attempts)
        assert (record["prompt_tokens"], record["tokens"], record["ttft_ms"]) == (0, 0, None)


def test_comments_are_no_progress_a_silent_node_is_given_up(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway=BEATS | {"first_token": "2s"}) as gw:
        for node in gw.nodes:
            node.script = [node.wait_for_close] * 3
        late = {"X-Request-ID": "late", "X-Corral-Deadline-Ms": "45000"}
        with streamed(gw.url, gw, CHAT, **late) as (_, lines):
            beats(lines, 4)  # of more than one attempt
            assert "silent for too long (3 attempts)" in told(events(list(lines)), CHAT)["message"]
        record = gw.control.settled("late")
        assert (record["status"], record["outcome"], record["attempts"]) == (504, "timeout", 3)


def test_a_deadline_is_told_in_band(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway=BEATS) as gw:
        for node in gw.nodes:
            node.script = [node.wait_for_close]
        late = {"X-Request-ID": "late", "X-Corral-Deadline-Ms": "4000"}
        with streamed(gw.edge, gw, MESSAGES, **late) as (_, lines):
            beats(lines, 1)
            assert "longer than 4 s" in told(events(list(lines)), MESSAGES)["message"]
        record = gw.control.settled("late")
        assert (record["status"], record["outcome"]) == (504, "timeout")
        until(lambda: any(node.ended.is_set() for node in gw.nodes), "its node has stopped")


def test_a_gateway_that_stops_tells_it_in_band(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway=BEATS | {"drain": "100ms"}) as gw:
        for node in gw.nodes:
            node.script = [node.wait_for_close]
        with streamed(gw.url, gw, CHAT, **{"X-Request-ID": "late"}) as (_, lines):
            beats(lines, 1)
            os.kill(gw.process.pid, signal.SIGTERM)
            assert "is being stopped" in told(events(list(lines)), CHAT)["message"]
        assert gw.process.end() == 0
        record = gw.control.settled("late")
        assert (record["status"], record["outcome"]) == (503, "interrupted")


@pytest.mark.parametrize("edge", [False, True])
def test_who_leaves_after_the_head_is_noticed(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor, edge: bool
) -> None:
    """While it has a ticket, and while it is at a node."""
    url = gw.edge if edge else gw.url
    placed(gw, leader, 1, "node-1")
    node = gw.nodes[0]
    held, runs = first_runs(gw, callers, node.wait_for_close)
    with streamed(url, gw, CHAT, **{"X-Request-ID": "queued"}) as (_, lines):
        beats(lines, 1)
        assert leader.waiting() == 1
    until(lambda: leader.waiting() == 0, "its ticket is given up")
    held.release()
    assert runs.result().status_code == 200
    with streamed(url, gw, CHAT, **{"X-Request-ID": "runs"}) as (_, lines):
        beats(lines, 1)
    assert node.ended.wait(60), "its node has stopped"
    for name, attempts in (("queued", 0), ("runs", 1)):
        record = gw.control.settled(name)
        assert (record["status"], record["outcome"], record["attempts"]) == (499, "client_gone", attempts)


@pytest.mark.parametrize("gw", ["3s"], indirect=True)
def test_whole_answers_and_native_streams_have_no_comments(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 1, "node-1")
    held, runs = first_runs(gw, callers)
    asked = [(CHAT, body(CHAT, stream=False)), (MESSAGES, body(MESSAGES, stream=False)), ("/api/chat", gw.chat())]
    late = [callers.submit(gw.post, path, said) for path, said in asked]
    assert [one.result().status_code for one in late] == [503] * 3
    held.release()
    assert runs.result().status_code == 200


def test_without_the_setting_nothing_is_sent_before_the_first_token(
    tmp_path: Path, callers: ThreadPoolExecutor
) -> None:
    with queueing(tmp_path, "3s", 3) as gw:
        leader = leading(gw)
        placed(gw, leader, 1, "node-1")
        held, runs = first_runs(gw, callers)
        late = [callers.submit(gw.post, path, body(path)) for path in (CHAT, COMPLETIONS, MESSAGES)]
        assert [one.result().status_code for one in late] == [503] * 3
        held.release()
        assert runs.result().status_code == 200


def test_the_official_clients_read_such_a_stream(tmp_path: Path) -> None:
    """They return with the head, which only a comment can have brought: the nodes are silent until then."""
    with gateway(tmp_path, gateway=BEATS) as gw:
        talks = openai.OpenAI(base_url=f"{gw.edge}/v1", api_key=gw.key, max_retries=0, timeout=60)
        writes = anthropic.Anthropic(base_url=gw.edge, api_key=gw.key, max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": "m", **SAID}

        def silent(then: Behaviour) -> threading.Event:
            gate = threading.Event()
            for node in gw.nodes:
                node.script = [after(gate, then)]
            return gate

        with talks, writes:
            gate = silent(both)
            with talks.chat.completions.create(**asked, stream=True) as chat:
                gate.set()
                assert "".join(one.choices[0].delta.content or "" for one in chat) == "one two "
            gate = silent(both)
            with talks.completions.create(model="m", prompt="Guten Tag!", stream=True) as completion:
                gate.set()
                assert "".join(one.choices[0].text for one in completion) == "one two "
            gate = silent(both)
            with writes.messages.stream(**asked) as message:
                gate.set()
                assert "".join(message.text_stream) == "one two "
                assert message.get_final_message().usage.output_tokens == 2
            gate = silent(says(400, {"error": "invalid option"}))
            with talks.chat.completions.create(**asked, stream=True) as chat:
                gate.set()
                with pytest.raises(openai.APIError, match="invalid option"):
                    list(chat)
            gate = silent(says(400, {"error": "invalid option"}))
            with writes.messages.stream(**asked) as message:
                gate.set()
                with pytest.raises(anthropic.APIStatusError, match="invalid option"):
                    list(message)
