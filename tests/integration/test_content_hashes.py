"""What is kept of prompts and answers: keyed hashes of just what was asked and said, on each API and after each end."""

from __future__ import annotations

import json
import socket
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import HEAD, LINE, Gateway, answer, chunk, gateway

from corral.store.content import Hashes

SAID = "w0 w1 w2 "


def kept(gw: Gateway, request_id: str) -> tuple[str | None, str | None]:
    """The hashes in the records of a request."""
    settled = gw.control.settled(request_id)
    (admitted,) = [r for r in gw.control.records if r["t"] == "admit" and r["id"] == settled["id"]]
    return admitted["prompt_hash"], settled["answer_hash"]


def expected(gw: Gateway, body: bytes, said: str) -> tuple[str, str]:
    hashes = Hashes(gw.pepper)
    return hashes.prompt.of(sha256(body).digest()), hashes.answer.of(sha256(said.encode()).digest())


def ask(gw: Gateway, path: str, body: bytes) -> httpx.Response:
    return httpx.post(gw.url + path, content=body, headers=gw.auth, timeout=60)


def generated(connection: socket.socket) -> None:
    lines = [b'{"model":"m","response":"%b","done":false}\n' % word.encode() for word in ("w0 ", "w1 ", "w2 ")]
    last = b'{"model":"m","response":"","done":true,"done_reason":"stop","prompt_eval_count":7,"eval_count":3}\n'
    connection.sendall(HEAD + b"".join(chunk(line) for line in (*lines, last)) + b"0\r\n\r\n")


MESSAGES = [{"role": "user", "content": "Guten Tag!"}]


@pytest.mark.parametrize("stream", [True, False])
def test_each_api_has_the_hash_of_the_body_and_of_the_text(tmp_path: Path, stream: bool) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/api/chat": {"messages": MESSAGES},
        "/api/generate": {"prompt": "Guten Tag!"},
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/completions": {"prompt": "Guten Tag!"},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    }
    with gateway(tmp_path) as gw:
        for path, fields in bodies.items():
            # As no encoder would write it: what counts is what was sent.
            body = json.dumps({"model": "m", **fields, "stream": stream}, indent=3).encode()
            if path in ("/api/generate", "/v1/completions"):
                for node in gw.nodes:
                    node.script = [generated]
            answered = ask(gw, path, body)
            assert answered.status_code == 200, answered.text
            assert kept(gw, answered.headers["x-request-id"]) == expected(gw, body, SAID), path


def test_of_an_answer_that_was_cut_it_is_of_what_was_sent(tmp_path: Path) -> None:
    def cut(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one ") + chunk(LINE % b"two"))
        connection.close()

    with gateway(tmp_path) as gw:
        body = json.dumps(gw.chat()).encode()
        for node in gw.nodes:
            node.script = [cut]
        answered = ask(gw, "/api/chat", body)
        assert '"error"' in answered.text
        assert kept(gw, answered.headers["x-request-id"]) == expected(gw, body, "one two")


def test_a_failed_first_try_leaves_nothing_in_it(tmp_path: Path) -> None:
    tried: list[int] = []

    def dies_once(connection: socket.socket) -> None:
        tried.append(1)
        connection.sendall(HEAD + chunk(b" ") if len(tried) == 1 else answer())
        if len(tried) == 1:
            connection.close()

    with gateway(tmp_path) as gw:
        body = json.dumps(gw.chat()).encode()
        for node in gw.nodes:
            node.script = [dies_once]
        answered = ask(gw, "/api/chat", body)
        assert answered.headers["x-corral-attempts"] == "2"
        assert kept(gw, answered.headers["x-request-id"]) == expected(gw, body, SAID)


def test_where_nothing_was_said_or_nothing_is_kept_there_is_none(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        refused = gw.post(body=gw.chat(model="nobody-has-it"))
        assert refused.status_code == 404
        assert gw.control.settled(refused.headers["x-request-id"])["answer_hash"] is None
        spool = b"".join(path.read_bytes() for path in tmp_path.glob("spool/**/*.seg"))
        assert b"Guten Tag" not in spool
    other = tmp_path / "none"
    other.mkdir()
    with gateway(other, audit={"content": "none"}) as gw:
        done = gw.post()
        assert kept(gw, done.headers["x-request-id"]) == (None, None)
