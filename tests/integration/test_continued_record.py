"""What is kept of an answer that another node went on with: hash, text and usage are of the whole of it, once."""

from __future__ import annotations

import json
import socket
import threading
from base64 import b64decode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pyrage
import pytest
from support.gateway import END, HEAD, Behaviour, FakeNode, Gateway, chunk, gateway
from support.gateway import says as answers

from corral.gateway.content import open_content
from corral.store.content import Hashes
from corral.wire.lines import RENDERED

ME = pyrage.x25519.Identity.generate()
FULL = {"content": "full", "content_recipient": str(ME.to_public())}
MESSAGES = [{"role": "user", "content": "Guten Tag!"}]
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "Guten Tag!"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Guten Tag!"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}
LAST_LINE = {"model": "m", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
SHOWN = "<u>Guten Tag!<a>"
DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def lines(words: list[str], chat: bool, prompt: int = 0) -> bytes:
    """Lines of a node that say these words; `prompt`: and the last one, with its counts."""
    said = [{"message": {"role": "assistant", "content": word}} if chat else {"response": word} for word in words]
    told: list[dict[str, Any]] = [{"model": "m", **one, "done": False} for one in said]
    if prompt:
        end = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
        counts = {"done": True, "done_reason": "stop", "prompt_eval_count": prompt, "eval_count": len(words)}
        told.append({"model": "m", **end, **counts})
    return b"".join(chunk(json.dumps(one).encode() + b"\n") for one in told)


def cut(words: list[str], chat: bool) -> Behaviour:
    """A node that says these words and half a line, and is gone."""

    def behaviour(connection: socket.socket) -> None:
        connection.sendall(HEAD + lines(words, chat) + chunk(b'{"model":"m","response":"never sent'))
        connection.close()

    return behaviour


def renders(connection: socket.socket) -> None:
    """A node that shows the prompt as its model gets it."""
    shown = json.dumps({"model": "m", RENDERED: {"rendered_template": SHOWN}}).encode()
    connection.sendall(HEAD + chunk(shown) + END)


def counts(tokens: int) -> Behaviour:
    """A node that says how many tokens a text has."""
    return answers(200, {"model": "m", "response": "x", "done": True, "prompt_eval_count": tokens, "eval_count": 1})


def says(words: list[str], prompt: int) -> Behaviour:
    """A node that goes on, to the end."""
    return lambda connection: connection.sendall(HEAD + lines(words, False, prompt) + END)


def text(answer: bytes) -> str:
    """What the model said in a stream, by any API."""
    said: list[Any] = []
    for line in answer.decode().splitlines():
        line = line.removeprefix("data: ")
        event = json.loads(line) if line.startswith("{") else {}
        for part in (event.get("message"), event, *(event.get("choices") or ()), event.get("delta")):
            if isinstance(part, dict):
                said += [part.get("response"), part.get("text"), (part.get("delta") or {}).get("content")]
                said += [part.get("content")]
    return "".join(part for part in said if isinstance(part, str))


class Stage:
    """A gateway whose nodes do one after the other what a test says, whichever of them is asked."""

    def __init__(self, gw: Gateway, acts: list[Behaviour]) -> None:
        self.gw = gw
        for node in gw.nodes:
            node.script = [lambda connection: acts.pop(0)(connection)] * len(acts)
        self.tag = {"name": "m:latest", "model": "m:latest", "modified_at": "2026-11-23T15:00:00Z", "digest": DIGEST}
        gw.control.publish(continuable={"m:latest": DIGEST})
        self.headers = {"Authorization": f"Bearer {gw.new_key(content=True)}"}
        gw.publish(tags=[self.tag])

    def kept(self, request_id: str, body: bytes) -> tuple[str, dict[str, Any]]:
        """The text that is kept of the answer, and the one settle record, whose hashes are of this text."""
        last = self.gw.control.settled(request_id)
        of_it = [one for one in self.gw.control.records if one["id"] == last["id"]]
        assert [one["t"] for one in of_it] == ["admit", "settle"]
        told = open_content(b64decode(last["content"]), [ME])
        hashes = Hashes(self.gw.pepper)
        assert of_it[0]["prompt_hash"] == hashes.prompt.of(sha256(body).digest())
        assert last["answer_hash"] == hashes.answer.of(sha256(told["answer"].encode()).digest())
        return told["answer"], last


def ask(stage: Stage, path: str) -> tuple[httpx.Response, bytes]:
    body = json.dumps({"model": "m", "stream": True, **BODIES[path]}).encode()
    return httpx.post(stage.gw.url + path, content=body, headers=stage.headers, timeout=60), body


@pytest.mark.parametrize("path", BODIES)
def test_it_is_of_the_whole_text_that_the_caller_got(tmp_path: Path, path: str) -> None:
    chat = "chat" in path or "messages" in path
    with gateway(tmp_path, audit=FULL) as gw:
        # What was sent is in the next node's prompt: 7 tokens and 5 in those two lines.
        counted = [renders, counts(7), counts(12)]
        stage = Stage(gw, [cut(["wörd ", "two "], chat), *counted, says(["three ", "four"], 12)])
        answered, body = ask(stage, path)
        assert text(answered.content) == "wörd two three four"
        kept, settled = stage.kept(answered.headers["x-request-id"], body)
        asked = [one["body"] for node in gw.nodes for one in node.requests if one["body"].get("raw")]
    assert kept == "wörd two three four"
    behind = SHOWN + "wörd two "
    assert [one["prompt"] for one in asked] == [SHOWN, behind, behind]
    rest = BODIES[path]["max_tokens"] - 5 if "max_tokens" in BODIES[path] else None
    assert [one.get("options", {}).get("num_predict") for one in asked] == [1, 1, rest]
    assert (settled["outcome"], settled["estimated"], settled["continued"].count(",")) == ("ok", False, 1)
    assert (settled["prompt_tokens"], settled["tokens"]) == (7, 5 + 2)
    assert settled["model_digest"] == DIGEST.removeprefix("sha256:"), "which both have"


@pytest.mark.parametrize("path", BODIES)
def test_what_came_in_one_piece_with_the_error_of_its_node_is_sent_once(tmp_path: Path, path: str) -> None:
    chat = "chat" in path or "messages" in path
    heard = threading.Event()

    def dies(connection: socket.socket) -> None:
        connection.sendall(HEAD + lines(["one "], chat))
        assert heard.wait(60)
        died = {"error": "an error was encountered while running the model: unexpected EOF"}
        connection.sendall(lines(["two "], chat) + chunk(json.dumps(died).encode() + b"\n") + END)

    with gateway(tmp_path, audit=FULL) as gw:
        stage = Stage(gw, [dies, renders, counts(7), counts(9), says(["three ", "four"], 9)])
        body, got = json.dumps({"model": "m", "stream": True, **BODIES[path]}).encode(), b""
        with httpx.stream("POST", gw.url + path, content=body, headers=stage.headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                heard.set()
                got += piece
        kept, settled = stage.kept(answer.headers["x-request-id"], body)
    assert kept == text(got) == "one two three four"
    assert (settled["outcome"], settled["prompt_tokens"], settled["tokens"]) == ("ok", 7, 4)


def dies(words: list[str], chat: bool, heard: threading.Event) -> Behaviour:
    """A node that says these words, and whose runner crashes once they are heard."""

    def behaviour(connection: socket.socket) -> None:
        connection.sendall(HEAD + lines(words, chat))
        assert heard.wait(60)
        died = {"error": "an error was encountered while running the model: unexpected EOF"}
        connection.sendall(chunk(json.dumps(died).encode() + b"\n") + END)

    return behaviour


def test_a_prompt_that_crashes_who_goes_on_too_is_refused_though_it_was_counted_between(tmp_path: Path) -> None:
    first, second = threading.Event(), threading.Event()
    with gateway(tmp_path, audit=FULL) as gw:
        gw.valkey.process.comes_first()  # a crash that it is not told of within 50 ms is no crash
        stage = Stage(gw, [dies(["one "], True, first), renders, counts(7), counts(8), dies(["two "], False, second)])
        body, got = {"model": "m", "stream": True, "messages": MESSAGES}, b""
        with httpx.stream("POST", gw.url + "/api/chat", json=body, headers=stage.headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                got += piece
                for word, heard in ((b"one ", first), (b"two ", second)):
                    if word in got:
                        heard.set()
        assert "error" in json.loads(got.splitlines()[-1]), got
        again = httpx.post(gw.url + "/api/chat", json=body, headers=stage.headers, timeout=60)
        assert (again.status_code, "present at 2 crashes" in again.text) == (400, True), again.text


def test_an_answer_whose_end_came_with_nonsense_is_not_begun_anew(tmp_path: Path) -> None:
    heard = threading.Event()

    def ends(connection: socket.socket) -> None:
        connection.sendall(HEAD + lines(["one "], True))
        assert heard.wait(60)
        end = b"".join(json.dumps(one).encode() + b"\n" for one in (LAST_LINE, {"model": "m"}))
        connection.sendall(chunk(end) + END)

    with gateway(tmp_path, audit=FULL) as gw:
        stage = Stage(gw, [ends, renders, counts(7), counts(8), says(["two "], 8)])
        got = b""
        body = {"model": "m", "stream": True, "messages": MESSAGES}
        with httpx.stream("POST", gw.url + "/api/chat", json=body, headers=stage.headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                heard.set()
                got += piece
        assert "error" in json.loads(got.splitlines()[-1]), got
        assert sum(len(node.requests) for node in gw.nodes) == 1


@pytest.mark.parametrize(
    "rest",
    [
        [renders, counts(7), counts(9), cut(["three "], False)],
        [renders, counts(7), cut([], False)],
        [renders, cut([], False)],
        [cut([], False)],
    ],
)
def test_where_the_next_node_fails_too_it_is_of_what_was_sent(tmp_path: Path, rest: list[Callable[..., None]]) -> None:
    with gateway(tmp_path, audit=FULL) as gw:
        # No third node: nobody is left after that.
        stage = Stage(gw, [cut(["one ", "two "], True), *rest])
        answered, body = ask(stage, "/api/chat")
        assert b'"error"' in answered.content
        kept, settled = stage.kept(answered.headers["x-request-id"], body)
    assert kept == text(answered.content) == ("one two three " if len(rest) == 4 else "one two ")
    assert (settled["outcome"], settled["estimated"]) == ("upstream_error", True)
    assert settled["tokens"] == len(kept.split())


@pytest.mark.parametrize("more", ["three ", ""])
def test_each_node_that_goes_on_counts_anew(tmp_path: Path, more: str) -> None:
    """What one counted that failed in between is true no more, and may have been false."""
    fails = [renders, counts(7), counts(9), cut([more], False)] if more else [renders, counts(99), cut([], False)]
    with gateway(tmp_path, [FakeNode(f"node-{number}") for number in (1, 2, 3)], audit=FULL) as gw:
        acts = [cut(["one ", "two "], True), *fails, renders, counts(7), counts(15), says(["four"], 15)]
        stage = Stage(gw, acts)
        answered, body = ask(stage, "/api/chat")
        kept, settled = stage.kept(answered.headers["x-request-id"], body)
    assert kept == text(answered.content) == f"one two {more}four"
    assert (settled["prompt_tokens"], settled["tokens"], settled["estimated"]) == (7, 8 + 1, False)
    assert settled["continued"].count(",") == 2


def test_where_the_caller_leaves_while_it_goes_on_it_is_of_what_was_sent(tmp_path: Path) -> None:
    with gateway(tmp_path, audit=FULL) as gw:

        def never_ends(connection: socket.socket) -> None:
            connection.sendall(HEAD + lines(["three "], False))
            gw.nodes[0].wait_for_close(connection)

        stage = Stage(gw, [cut(["one ", "two "], True), renders, counts(7), counts(9), never_ends])
        body = json.dumps({"model": "m", "stream": True, **BODIES["/api/chat"]}).encode()
        got = b""
        with httpx.stream("POST", gw.url + "/api/chat", content=body, headers=stage.headers, timeout=60) as answer:
            for piece in answer.iter_bytes():
                got += piece
                if b"three" in got:
                    break
        kept, settled = stage.kept(answer.headers["x-request-id"], body)
    assert kept == text(got) == "one two three "
    assert (settled["outcome"], settled["tokens"], settled["estimated"]) == ("client_gone", 3, True)


@pytest.mark.parametrize("first_is", ["there", "down", "there with another file too"])
def test_no_node_goes_on_whose_file_of_the_model_is_another_one(tmp_path: Path, first_is: str) -> None:
    """Neither where the node that wrote the beginning fails again, nor where it is down, nor where all have another."""
    ready = threading.Event()
    with gateway(tmp_path, audit=FULL) as gw:
        first, other = gw.nodes

        def leaves(connection: socket.socket) -> None:
            connection.sendall(HEAD + lines(["one ", "two "], True))
            assert ready.wait(60)
            connection.sendall(chunk(b'{"model":"m","message":{"content":"never sent'))
            connection.close()

        stage = Stage(gw, [])
        first.script = [leaves] + [cut([], False)] * 9
        gw.states[other.name] = "down"
        gw.publish(tags=[stage.tag])
        body, got = json.dumps({"model": "m", "stream": True, **BODIES["/api/chat"]}).encode(), b""
        with httpx.stream("POST", gw.url + "/api/chat", content=body, headers=stage.headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                if not got:
                    states = {first.name: "down" if first_is == "down" else "ready", other.name: "ready"}
                    replaced = stage.tag | {"digest": OTHER}
                    all_new = first_is == "there with another file too"
                    tags = {first.name: [replaced if all_new else stage.tag], other.name: [replaced]}
                    nodes = gw.control.snapshot["nodes"]
                    gw.control.publish(
                        nodes=[one | {"state": states[one["name"]], "tags": tags[one["name"]]} for one in nodes],
                        continuable={"m:latest": OTHER if all_new else DIGEST},
                    )
                    gw.control.until_known()
                    ready.set()
                got += piece
        assert text(got) == "one two " and "error" in json.loads(got.splitlines()[-1]), got
        kept, settled = stage.kept(answer.headers["x-request-id"], body)
        assert other.requests == [], "it would write the rest of another answer"
        assert gw.post(headers=stage.headers).headers["X-Corral-Node"] == other.name, "though it is used"
    assert (kept, settled["outcome"], settled["tokens"]) == ("one two ", "upstream_error", 2)
