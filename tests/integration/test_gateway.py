"""The gateway for real: behind HAProxy, with Valkey, towards nodes that do as they are told."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, Gateway, answer, chunk, gateway, says
from support.process import until

from corral.store import keys


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings: dict[str, Any] = {"gateway": {"max_body": 100_000, "first_token": "2s", "between_tokens": "2s"}}
    with gateway(tmp_path_factory.mktemp("gateway"), **settings) as started:
        yield started


@pytest.fixture
def gw(shared: Gateway) -> Gateway:
    """The shared gateway, with nodes that are well and forgotten failures."""
    shared.forget()
    return shared


TOOL_ARGUMENTS = (
    b'{"model":"m","messages":[{"role":"assistant","tool_calls":'
    b'[{"function":{"name":"f","arguments":"{\\"a\\":%b%b}"}}]}]}'
)


def requests(gw: Gateway) -> list[dict[str, Any]]:
    return [request for node in gw.nodes for request in node.requests]


def test_a_whole_answer_and_its_record(gw: Gateway) -> None:
    response = httpx.post(gw.edge + "/api/chat", json=gw.chat(stream=False), headers=gw.auth | {"X-Request-ID": "me-1"})
    assert response.status_code == 200
    body = response.json()
    assert body["message"] == {"role": "assistant", "content": "w0 w1 w2 "}
    assert (body["eval_count"], body["done"]) == (3, True)
    assert response.headers["X-Request-ID"] == "me-1"
    assert response.headers["X-Corral-Node"] in ("node-1", "node-2")
    assert response.headers["X-Corral-Attempts"] == "1"
    record = gw.control.settled("me-1")
    assert (record["status"], record["outcome"], record["key"]) == (200, "ok", gw.key_id)
    assert (record["prompt_tokens"], record["tokens"], record["model"]) == (7, 3, "m")
    assert record["estimated"] is False
    assert record["addr"] == "127.0.0.1"
    assert record["req_bytes"] == len(json.dumps(gw.chat(stream=False), separators=(",", ":")))
    admitted = [r for r in gw.control.records if r["t"] == "admit" and r["id"] == record["id"]]
    assert len(admitted) == 1


FIELDS = {
    "t", "id", "request_id", "ts", "gw", "key", "addr", "api", "route", "method", "model", "status", "outcome", "node",
    "attempts", "req_bytes", "resp_bytes", "prompt_tokens", "tokens", "estimated", "queue_ms", "ttft_ms", "ms",
    "continued", "answer_hash", "model_digest",
}  # fmt: skip
"""Of a line of the access log."""


def test_each_request_is_one_line_of_the_access_log(gw: Gateway) -> None:
    def ask(name: str, path: str = "/api/chat", key: str = gw.key, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}", "X-Request-ID": name}
        return httpx.post(gw.edge + path, json=gw.chat(**body), headers=headers)

    whole, streamed = ask("line-whole", stream=False), ask("line-stream")
    ask("line-key", key="crl_nonsense")
    ask("line-model", model="nobody")
    ask("line-route", path="/api/pull")
    ask("line-large", options={"stop": "x" * 100_000})
    log = gw.folder / "access.log"
    until(lambda: log.read_text().count('"line-') >= 6, "the lines of the access log")
    told = [json.loads(line) for line in log.read_text().splitlines()]
    lines = {line["request_id"]: line for line in told if line["request_id"].startswith("line-")}
    assert len([line for line in told if line["request_id"] in lines]) == len(lines) == 6
    assert all(set(line) == FIELDS and line["t"] == "settle" for line in lines.values())
    said = {name: (line["status"], line["outcome"], line["model"]) for name, line in lines.items()}
    assert said == {
        "line-whole": (200, "ok", "m"),
        "line-stream": (200, "ok", "m"),
        "line-key": (401, "refused", ""),
        "line-model": (404, "refused", ""),
        "line-route": (404, "refused", ""),
        "line-large": (413, "refused", ""),
    }
    for name, got in (("line-whole", whole), ("line-stream", streamed)):
        line = lines[name]
        assert (line["key"], line["addr"], line["api"], line["route"]) == (
            gw.key_id,
            "127.0.0.1",
            "native",
            "/api/chat",
        )
        assert (line["method"], line["node"], line["attempts"]) == ("POST", got.headers["X-Corral-Node"], 1)
        assert (line["prompt_tokens"], line["tokens"], line["estimated"]) == (7, 3, False)
        assert (line["resp_bytes"], line["req_bytes"]) == (len(got.content), len(got.request.content))
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["ms"]
    text = log.read_text()
    assert "Guten" not in text and gw.key not in text and "crl_nonsense" not in text


def test_the_node_is_sent_our_policy(gw: Gateway) -> None:
    gw.post(body=gw.chat(stream=False, keep_alive=0, truncate=True, options={"num_ctx": 99, "seed": 1}))
    (request,) = requests(gw)
    assert request["line"] == "POST /api/chat HTTP/1.1"
    sent = request["body"]
    assert (sent["stream"], sent["truncate"], sent["keep_alive"], sent["options"]) == (True, False, -1, {"seed": 1})
    assert b"authorization" not in request["headers"]


def test_a_stream_arrives_as_it_is_made(gw: Gateway) -> None:
    held = threading.Event()

    def slowly(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        assert held.wait(60)
        connection.sendall(chunk(LINE % b"two") + chunk(LAST % 2) + END)

    gw.nodes[0].script = [slowly]
    gw.nodes[1].script = [slowly]
    with httpx.stream("POST", gw.edge + "/api/chat", json=gw.chat(), headers=gw.auth) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines))["message"]["content"] == "one"
        held.set()
        assert [json.loads(line)["done"] for line in lines] == [False, True]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 50, 1000])
def test_a_line_in_pieces_is_the_same_line(gw: Gateway, cut: int) -> None:
    whole = b"".join(LINE % b"w%d" % n for n in range(4)) + LAST % 4

    def pieces(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        for start in range(0, len(whole), cut):
            connection.sendall(chunk(whole[start : start + cut]))
        connection.sendall(END)

    for node in gw.nodes:
        node.script = [pieces]
    response = gw.post(body=gw.chat())
    assert response.content == whole


# -- who is let in


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/api/chat", lambda body: body["error"]),
        ("/v1/chat/completions", lambda body: body["error"]["message"] and body["error"]["code"] == "invalid_api_key"),
        ("/v1/messages", lambda body: body["type"] == "error" and body["error"]["type"] == "authentication_error"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer crl_nonsense"},
        {"Authorization": f"Bearer {keys.generate()[1]}"},
        {"x-api-key": keys.generate()[1]},
        {"Authorization": "Bearer ' OR 1=1 --"},
        {"Authorization": "Bearer \xff\xfe"},
    ],
)
def test_no_key_no_answer(gw: Gateway, path: str, shape: Any, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = httpx.post(gw.url + path, json=gw.chat(), headers=raw)
    assert response.status_code == 401
    assert shape(response.json())
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert requests(gw) == []


@pytest.mark.parametrize(
    ("more", "word"), [({"revoked": True}, "revoked"), ({"expires": 1.0}, "expired"), ({"verifiers": []}, "unknown")]
)
def test_a_key_that_is_no_longer_one(gw: Gateway, more: dict[str, Any], word: str) -> None:
    key = gw.new_key(**more)
    response = gw.post(headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 401
    assert word in response.json()["error"]


def test_two_credentials_must_agree(gw: Gateway) -> None:
    other = gw.new_key()
    assert gw.post(headers={"x-api-key": other}).status_code == 400
    assert gw.post(headers={"x-api-key": gw.key}).status_code == 200


def test_a_key_sees_and_uses_its_models_alone(gw: Gateway) -> None:
    key = gw.new_key(models=["llama*"])
    headers = {"Authorization": f"Bearer {key}"}
    assert gw.post(headers=headers).status_code == 404
    assert httpx.get(gw.url + "/api/tags", headers=headers).json() == {"models": []}
    assert len(httpx.get(gw.url + "/api/tags", headers=gw.auth).json()["models"]) == 1
    allowed = gw.new_key(models=["m"])
    assert gw.post(headers={"Authorization": f"Bearer {allowed}"}).status_code == 200


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/m"])
def test_what_the_fleet_answers_has_the_headers_of_any_answer(gw: Gateway, path: str) -> None:
    response = httpx.get(gw.url + path, headers=gw.auth | {"X-Request-ID": "list-1"})
    assert response.status_code == 200
    assert response.headers["X-Request-ID"] == "list-1"
    assert response.headers["x-ratelimit-limit-requests"] == "100000"


@pytest.mark.parametrize("version", ["0.\u00b2", "9" * 5000, "\u0663.1", ""])
def test_a_node_of_a_strange_version_hides_no_other(gw: Gateway, version: str) -> None:
    gw.publish(versions={"node-2": version})
    try:
        response = httpx.get(gw.url + "/api/version", headers=gw.auth)
        assert (response.status_code, "version" in response.json()) == (200, True)
    finally:
        gw.publish()


def test_a_fault_of_the_gateways_own_is_told_and_recorded(gw: Gateway) -> None:
    try:
        # Compiled code does not even take all of it.
        gw.publish(tags=[{"name": 5}], known=False)
        listing = gw.url + "/v1/models"
        until(lambda: httpx.get(listing, headers=gw.auth).status_code == 500, "the gateway has met it")
        response = httpx.get(listing, headers=gw.auth | {"X-Request-ID": "fault"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert gw.control.settled("fault")["status"] == 500
    finally:
        gw.publish()


# -- bad input


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/api/chat", b"{", 400, "JSON"),
        ("/api/chat", b"", 400, "body"),
        ("/api/chat", b"[]", 400, "object"),
        ("/api/chat", b'{"model": 3}', 400, "model"),
        ("/api/chat", b'{"messages": []}', 400, "model"),
        ("/api/chat", b'{"model": "m", "messages": [{"role": 3}]}', 400, "messages[0].role"),
        ("/api/chat", b'{"model": "m", "options": {"temperature": "hot"}}', 400, "temperature"),
        ("/api/chat", b'{"model": "nobody", "messages": []}', 404, "nobody"),
        ("/api/chat", b'{"model": "M", "messages": []}', 404, "model 'M' not found; did you mean 'm'?"),
        ("/api/show", b'{"model": "M:Latest"}', 404, "model 'M:Latest' not found; did you mean 'm'?"),
        ("/api/chat", b'{"model": "m", "api_base": "http://evil"}', 400, "api_base"),
        ("/api/chat", b'{"model": "../m"}', 404, "../m"),
        ("/api/chat", b'{"model": "m m"}', 400, "m m"),
        ("/api/chat", b'{"model":"m","tools":' + b"[" * 80 + b"]" * 80 + b"}", 400, "nested"),
        ("/api/chat", b"x" * 100_001, 413, "100000"),
        ("/v1/chat/completions", b'{"model": "m", "n": 2, "messages": [{"role":"user","content":""}]}', 400, "n must"),
        ("/v1/messages", b'{"model": "m", "messages": [{"role":"user","content":""}]}', 400, "max_tokens"),
        ("/v1/chat/completions", TOOL_ARGUMENTS % (b"[" * 1500, b"]" * 1500), 400, "nested"),
        ("/api/pull", b'{"model": "m"}', 404, "/api/pull"),
        ("//api/chat", b"{}", 404, "//api/chat"),
        ("/api/ch%61t", b"{}", 404, "/api/ch%61t"),
        ("/API/chat", b"{}", 404, "/API/chat"),
    ],
)
def test_bad_input_is_named_and_no_node_hears_of_it(
    gw: Gateway, path: str, body: bytes, status: int, word: str
) -> None:
    response = httpx.post(gw.url + path, content=body, headers=gw.auth)
    assert response.status_code == status
    assert word in response.text
    assert requests(gw) == []


@pytest.mark.parametrize("where", ["gateway", "edge"])
@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_body_of_the_most_bytes_is_taken_and_of_one_more_refused(gw: Gateway, form: str, where: str) -> None:
    url = gw.url if where == "gateway" else gw.edge
    body = json.dumps(gw.chat(stream=False)).encode().ljust(100_000)

    def post(content: bytes) -> httpx.Response:
        pieces = iter([content[:7], content[7:70_000], content[70_000:]])
        return httpx.post(url + "/api/chat", content=content if form == "length" else pieces, headers=gw.auth)

    assert post(body).status_code == 200
    assert len(requests(gw)) == 1
    refused = post(body + b" ")
    assert (refused.status_code, refused.json()) == (413, {"error": "the body may have 100000 bytes"})
    assert gw.control.settled(refused.headers["X-Request-ID"])["status"] == 413
    assert len(requests(gw)) == 1, "no node hears of it"


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
        b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n{}",
        b"Content-Length: 2\nX: y\r\n\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n",
        b"Host: b\r\nContent-Length: 2\r\n\r\n{}",
        b"X: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_the_connection_closed(gw: Gateway, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: a\r\n" + raw)
        data = b""
        while piece := connection.recv(65536):
            data += piece
    assert data.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert data.count(b"HTTP/1.1") == 1
    assert requests(gw) == []


def test_a_compressed_body_is_refused(gw: Gateway) -> None:
    response = gw.post(headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415


def test_pipelined_requests_are_answered_in_order(gw: Gateway) -> None:
    one = json.dumps(gw.chat(stream=False)).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(one)}\r\n"
    with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as connection:
        for number in range(3):
            connection.sendall(head.encode() + b"X-Request-ID: p%d\r\n\r\n" % number + one)
        data = b""
        while data.count(b"HTTP/1.1 200") < 3 or not data.endswith(b"}"):
            data += connection.recv(65536)
    assert [data.index(b"X-Request-ID: p%d" % number) for number in range(3)] == sorted(
        data.index(b"X-Request-ID: p%d" % number) for number in range(3)
    )


# -- when a node fails


def everywhere(gw: Gateway, behaviour: Any, count: int = 1) -> None:
    """The next `count` requests on each node meet `behaviour`."""
    for node in gw.nodes:
        node.script = [behaviour] * count


def first(gw: Gateway, behaviour: Any) -> None:
    """The next request meets `behaviour`, wherever it goes; the one after it does not."""
    used = threading.Lock()

    def once(connection: socket.socket) -> None:
        if used.acquire(blocking=False):
            behaviour(connection)
            connection.close()
        else:
            connection.sendall(answer())

    for node in gw.nodes:
        node.script = [once]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "behaviour",
    [
        lambda connection: threading.Event().wait(0.1),
        lambda connection: connection.sendall(HEAD),
        lambda connection: connection.sendall(HEAD + b"zz"),
        lambda connection: connection.sendall(HEAD + chunk(b"not json\n") + END),
        lambda connection: connection.sendall(HEAD + END),
        says(500, {"error": "boom"}),
        says(503, {"error": "server busy"}),
        *(says(status, {"error": "no"}) for status in (201, 401, 403, 407, 429)),
        lambda connection: connection.sendall(
            b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
        ),
        lambda connection: connection.sendall(HEAD + chunk(b'{"error":"runner died"}\n') + END),
    ],
)
def test_before_the_first_token_another_node_answers(gw: Gateway, behaviour: Any, stream: bool) -> None:
    # Of retries there are as many as a fifth of the requests, or ten a second.
    for _ in range(10):
        assert gw.post().status_code == 200
    gw.forget()
    first(gw, behaviour)
    response = gw.post(body=gw.chat(stream=stream))
    assert response.status_code == 200, response.text
    assert response.headers["X-Corral-Attempts"] == "2"
    assert len(requests(gw)) == 2
    assert b'"eval_count":3' in response.content


def test_a_request_at_two_crashes_of_runners_is_not_tried_a_third_time(gw: Gateway) -> None:
    everywhere(gw, says(500, {"error": "model runner has unexpectedly stopped"}), 3)
    # A prompt of its own: it is refused from then on.
    body = gw.chat(stream=False, messages=[{"role": "user", "content": "Who is at two crashes?"}])
    response = gw.post(body=body)
    assert (response.status_code, len(requests(gw))) == (502, 2)
    assert "the model's runner crashed (2 attempts)" in response.json()["error"]
    assert (gw.post(body=body).status_code, len(requests(gw))) == (400, 2)


def test_a_node_that_lost_the_model_sends_its_request_elsewhere_and_keeps_the_others(gw: Gateway) -> None:
    missing = says(404, {"error": "model 'm' not found"})
    first(gw, missing)
    response = gw.post()
    assert (response.status_code, response.headers["X-Corral-Attempts"]) == (200, "2")
    everywhere(gw, missing, 3)
    response = gw.post()
    assert (response.status_code, response.json()) == (404, {"error": "model 'm' not found"})


def test_a_node_that_has_nothing_of_what_it_says_to_hold_is_not_asked_first_each_time(gw: Gateway) -> None:
    liar = gw.nodes[0]
    liar.script = [says(404, {"error": "model 'm' not found"})] * 40
    for _ in range(20):
        assert gw.post().status_code == 200
    assert len(liar.requests) < 10, "as often as a node is asked that may have it again"


def test_the_callers_error_is_not_retried(gw: Gateway) -> None:
    everywhere(gw, says(400, {"error": "the input length exceeds the context length"}))
    response = gw.post()
    assert (response.status_code, response.json()) == (400, {"error": "the input length exceeds the context length"})
    everywhere(gw, says(500, {"error": 'option "x" must be of type float32'}))
    response = gw.post("/v1/chat/completions")
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(requests(gw)) == 2


def test_an_image_that_cannot_be_read_is_tried_on_one_node_and_counts_against_none(gw: Gateway) -> None:
    """One that breaks off is told of as a crash is: nobody could use the nodes of a model if that were believed."""
    everywhere(gw, says(500, {"error": "Failed to create new sequence: unexpected EOF"}), 4)
    image = {"role": "user", "content": "what is it?", "images": ["iVBORw0KGgo="]}
    for number in range(4):
        response = gw.post(body=gw.chat(messages=[image]))
        assert (response.status_code, len(requests(gw))) == (400, number + 1)
        assert response.json() == {"error": "Failed to create new sequence: unexpected EOF"}
    for node in gw.nodes:
        node.script.clear()
    assert gw.post(body=gw.chat(messages=[image])).status_code == 200, "it is not refused either"


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/api/chat", lambda text: "error" in json.loads(text.splitlines()[-1])),
        ("/v1/chat/completions", lambda text: '"error"' in text.split("data: ")[-1] and "[DONE]" not in text),
        ("/v1/messages", lambda text: text.split("event: ")[-1].startswith("error\n")),
    ],
)
@pytest.mark.parametrize("ending", [b"", END, chunk(b"nonsense\n"), chunk(b'{"error":"died"}\n') + END])
def test_after_the_first_token_a_cut_is_never_silent(gw: Gateway, path: str, last: Any, ending: bytes) -> None:
    seen = threading.Event()

    def cut(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        assert seen.wait(60)
        connection.sendall(ending)
        connection.shutdown(socket.SHUT_RDWR)

    everywhere(gw, cut)
    text = ""
    with httpx.stream("POST", gw.url + path, json=gw.chat(stream=True, max_tokens=9), headers=gw.auth) as response:
        assert response.status_code == 200
        for piece in response.iter_text():
            text += piece
            if "one" in text:
                seen.set()
    assert last(text)
    assert len(requests(gw)) == 1


@pytest.mark.parametrize(
    ("path", "stream", "last"),
    [
        ("/v1/chat/completions", False, {"message": {"role": 5, "content": ""}}),
        ("/v1/messages", False, {"message": {"content": "", "tool_calls": [{"id": 5, "function": {"name": 6}}]}}),
        ("/v1/messages", True, {"message": {"content": "", "tool_calls": [{"id": 5, "function": {"name": 6}}]}}),
        ("/v1/chat/completions", False, {"created_at": 5, "done_reason": {}, "eval_count": 10**30, "model": []}),
    ],
)
def test_an_answer_of_the_wrong_types_ends_and_gives_its_lease_back(
    gw: Gateway, path: str, stream: bool, last: dict[str, Any]
) -> None:
    line = json.loads(LAST % 1) | last
    everywhere(gw, lambda c: c.sendall(HEAD + chunk(LINE % b"one") + chunk(json.dumps(line).encode() + b"\n") + END), 3)
    headers = {"Authorization": f"Bearer {gw.new_key(concurrency=1)}"}
    response = gw.post(path, body=gw.chat(stream=stream, max_tokens=9), headers=headers)
    assert response.status_code in (200, 502)
    for node in gw.nodes:
        node.script.clear()
    assert gw.post(headers=headers).status_code == 200


def test_an_error_that_is_nested_too_deep_ends_too(gw: Gateway) -> None:
    body = b"[" * 60_000
    everywhere(gw, lambda c: c.sendall(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)))
    assert gw.post().status_code == 400


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "last", [LAST[:-1], LAST.replace(b":true", b" : true"), LAST[:-1].replace(b":true", b": true")]
)
def test_a_last_line_may_have_spaces_and_no_end(gw: Gateway, path: str, stream: bool, last: bytes) -> None:
    everywhere(gw, lambda connection: connection.sendall(HEAD + chunk(LINE % b"one") + chunk(last % 1) + END))
    response = gw.post(path, body=gw.chat(stream=stream, max_tokens=9))
    assert response.status_code == 200
    assert "one" in response.text
    assert '"error"' not in response.text
    assert len(requests(gw)) == 1


def test_a_silent_node_is_given_up(gw: Gateway) -> None:
    first(gw, lambda connection: threading.Event().wait(4))
    response = gw.post()
    assert response.status_code == 200
    assert response.headers["X-Corral-Attempts"] == "2"


def test_a_node_is_not_late_by_what_the_gateway_itself_stood_still(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway={"first_token": "1s"}) as gw, ThreadPoolExecutor(1) as pool:
        answers = threading.Event()

        def behaviour(connection: socket.socket) -> None:
            assert answers.wait(60)
            connection.sendall(answer())

        everywhere(gw, behaviour)
        waiting = pool.submit(gw.post)
        until(lambda: requests(gw), "a node has it", every=0.01)
        os.kill(gw.process.pid, signal.SIGSTOP)
        answers.set()
        # Longer than a node may be silent: the time itself is what is tested.
        threading.Event().wait(2)
        os.kill(gw.process.pid, signal.SIGCONT)
        answered = waiting.result()
        assert (answered.status_code, answered.headers["X-Corral-Attempts"]) == (200, "1")


def test_a_request_moves_on_from_a_node_that_goes_down(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway={"first_token": "1m"}) as gw, ThreadPoolExecutor(1) as pool:
        over = threading.Event()
        first(gw, lambda connection: over.wait(60))
        waiting = pool.submit(gw.post)
        until(lambda: requests(gw), "a node has it")
        used = next(node.name for node in gw.nodes if node.requests)
        gw.states[used] = "down"
        gw.publish()
        answered = waiting.result()
        over.set()
        assert (answered.status_code, answered.headers["X-Corral-Attempts"]) == (200, "2")
        assert answered.headers["X-Corral-Node"] != used


def test_blank_lines_are_no_tokens(gw: Gateway) -> None:
    cut = threading.Event()

    def blanks(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        try:
            for _ in range(80):
                connection.sendall(chunk(b"\n"))
                threading.Event().wait(0.1)
        except OSError:
            cut.set()
            raise

    first(gw, blanks)
    response = gw.post()
    assert response.status_code == 200
    assert response.headers["X-Corral-Attempts"] == "2"
    assert cut.wait(60), "the node came to its end: it was not given up"


def test_a_node_is_not_late_while_its_caller_takes_nothing(gw: Gateway) -> None:
    words, sent = 15_000, threading.Event()

    def floods(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        for _ in range(words):
            connection.sendall(chunk(LINE % (b"w" * 4000)))
        connection.sendall(chunk(LAST % words) + END)
        sent.set()

    everywhere(gw, floods)
    body = json.dumps(gw.chat()).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        # Longer than a node may be silent: the time itself is what is tested.
        assert not sent.wait(4), "the answer fits into buffers: this shows nothing"
        data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert data.endswith(LAST % words + b"\r\n" + END)


def test_a_dead_fleet_is_a_503_with_retry_after(gw: Gateway) -> None:
    for node in gw.nodes:
        node.stop()
    try:
        response = gw.post()
        assert response.status_code == 503
        assert 1 <= int(response.headers["Retry-After"]) <= 4
    finally:
        for node in gw.nodes:
            node.restart()
    # Each of them: the next test may count attempts.
    for node in gw.nodes:
        until(lambda node=node: gw.has(node), f"{node.name} is back")  # type: ignore[misc]
    assert gw.post().status_code == 200


def test_no_ready_node_is_said_by_readiness(gw: Gateway) -> None:
    gw.states = {"node-1": "down", "node-2": "draining"}
    gw.publish()
    try:
        response = httpx.get(gw.url + "/health/ready")
        assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
        assert httpx.get(gw.url + "/health").json() == {"status": "healthy"}
        assert gw.post().status_code == 503
    finally:
        gw.states = {"node-1": "ready", "node-2": "ready"}
        gw.publish()
    assert gw.post().status_code == 200


# -- when the caller leaves


def test_a_caller_that_leaves_ends_the_nodes_work(gw: Gateway) -> None:
    for node in gw.nodes:

        def behaviour(connection: socket.socket, node: Any = node) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one") + chunk(LINE % b"two"))
            node.wait_for_close(connection)

        node.script = [behaviour]
    with httpx.stream(
        "POST", gw.edge + "/api/chat", json=gw.chat(), headers=gw.auth | {"X-Request-ID": "left"}
    ) as response:
        next(response.iter_lines())
    until(lambda: any(node.ended.is_set() for node in gw.nodes), "the node's connection is closed")
    record = gw.control.settled("left")
    assert (record["outcome"], record["status"], record["tokens"]) == ("client_gone", 499, 2)
    assert record["estimated"]
    assert 5 < record["prompt_tokens"] < 50, "the node had not told what it counted"
    assert gw.post().status_code == 200


def test_callers_that_leave_never_count_against_a_node(gw: Gateway) -> None:
    for _ in range(40):
        for node in gw.nodes:
            node.script.append(lambda connection: threading.Event().wait(0.2))
    body = json.dumps(gw.chat()).encode()
    head = (
        f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as connection:
            connection.sendall(head.encode() + body)
    for node in gw.nodes:
        node.script.clear()
    response = gw.post()
    assert (response.status_code, response.headers["X-Corral-Attempts"]) == (200, "1")


# -- limits


def over_the_limit(gw: Gateway, headers: dict[str, str], local: float) -> httpx.Response:
    """What is said beyond a limit that is used up: no more get in than were admitted without the store, of which there
    were ``local`` before."""
    passed = 0
    while (answer := gw.post(headers=headers)).status_code == 200:
        passed += 1
        assert passed <= gw.admitted_locally() - local
    return answer


def test_requests_per_minute(gw: Gateway) -> None:
    key = gw.new_key(rpm=5)
    headers, local = {"Authorization": f"Bearer {key}"}, gw.admitted_locally()
    codes = [gw.post(headers=headers).status_code for _ in range(5)]
    assert codes == [200] * 5
    refused = over_the_limit(gw, headers, local)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 14
    assert refused.headers["x-ratelimit-limit-requests"] == "5"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "5 requests per minute" in refused.json()["error"]


def test_concurrency(gw: Gateway) -> None:
    key = gw.new_key(concurrency=2)
    held = threading.Event()

    def hold(connection: socket.socket) -> None:
        assert held.wait(60)
        connection.sendall(answer())

    everywhere(gw, hold, 4)
    headers = {"Authorization": f"Bearer {key}"}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(gw.post, headers=headers) for _ in range(2)]
        until(lambda: len(requests(gw)) == 2, "two run")
        assert gw.post(headers=headers).status_code == 429
        held.set()
        assert [future.result().status_code for future in running] == [200, 200]
    for node in gw.nodes:
        node.script.clear()
    until(lambda: gw.post(headers=headers).status_code == 200, "the leases are given back")


def test_exactly_the_limit_is_admitted_under_concurrency(gw: Gateway) -> None:
    key = gw.new_key(rpm=30, concurrency=1000)
    headers = {"Authorization": f"Bearer {key}"}
    began, local = time.monotonic(), gw.admitted_locally()
    with ThreadPoolExecutor(16) as pool:
        codes = [f.result().status_code for f in [pool.submit(gw.post, headers=headers) for _ in range(60)]]
    # One request comes back each two seconds, and these took a moment.
    local = gw.admitted_locally() - local
    assert 30 <= codes.count(200) <= 31 + (time.monotonic() - began) / 2 + local
    assert codes.count(429) == 60 - codes.count(200)


def test_a_stopped_store_degrades_to_the_local_share_and_comes_back(gw: Gateway) -> None:
    os.kill(gw.valkey.process.pid, signal.SIGSTOP)
    try:
        key = gw.new_key(rpm=3)
        headers = {"Authorization": f"Bearer {key}"}
        codes = [gw.post(headers=headers).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
    finally:
        os.kill(gw.valkey.process.pid, signal.SIGCONT)
    fresh = gw.new_key(rpm=1000)

    def exact() -> bool:
        response = gw.post(headers={"Authorization": f"Bearer {fresh}"})
        return "rate" in _store_keys(gw) and response.status_code == 200

    until(exact, "the store counts again")


def test_a_stalled_store_keeps_no_lease_of_what_has_ended(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        headers = {"Authorization": f"Bearer {gw.new_key(rpm=100_000, concurrency=5)}"}
        os.kill(gw.valkey.process.pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(10) as pool:
                codes = [f.result().status_code for f in [pool.submit(gw.post, headers=headers) for _ in range(10)]]
            assert codes.count(200) >= 5
        finally:
            os.kill(gw.valkey.process.pid, signal.SIGCONT)
        until(lambda: "corral:1:rate:" in _store_keys(gw), "the store runs what it was sent before it stalled")
        # A lease that nobody gives back would stand for ten seconds.
        until(lambda: "corral:1:leases:" not in _store_keys(gw), "no lease is left", seconds=7)
        assert [gw.post(headers=headers).status_code for _ in range(10)] == [200] * 10


def _store_keys(gw: Gateway) -> str:
    with socket.create_connection(("127.0.0.1", int(gw.valkey.url.split(":")[2].split("/")[0])), timeout=60) as store:
        store.sendall(b"KEYS *\r\n")
        return store.recv(65536).decode()


def test_tokens_are_reserved_by_the_callers_bound_and_settled_by_the_nodes_count(gw: Gateway) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(tpm=1000, daily_tokens=100_000)}"}
    first = gw.post(body=gw.chat(stream=False, options={"num_predict": 900}), headers=headers)
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 100
    # The node said 7 and 3.
    again = gw.post(body=gw.chat(stream=False, options={"num_predict": 900}), headers=headers)
    assert (again.status_code, int(again.headers["x-ratelimit-remaining-tokens"])) == (
        200,
        int(first.headers["x-ratelimit-remaining-tokens"]) - 10,
    )


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_a_refusal_names_its_limit_in_the_shape_of_the_api(gw: Gateway, path: str) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(daily_tokens=1000)}"}
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    body |= {"options": {"num_predict": 990}} if path == "/api/chat" else {"max_tokens": 990}
    # Its whole day is reserved while it runs.
    held = threading.Event()

    def hold(connection: socket.socket) -> None:
        assert held.wait(60)
        connection.sendall(answer())

    everywhere(gw, hold, 1)
    before = len(requests(gw))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, gw.url + path, json=body, headers=headers)
        until(lambda: len(requests(gw)) > before, "one runs")
        refused = httpx.post(gw.url + path, json=body, headers=headers)
        held.set()
        assert running.result().status_code == 200
    for node in gw.nodes:
        node.script.clear()
    assert refused.status_code == 429
    error = refused.json()["error"]
    text = error if path == "/api/chat" else error["message"]
    assert "1000 tokens per day" in text
    if path != "/api/chat":
        assert error["type"] == "rate_limit_error"
    reset = float(refused.headers["x-ratelimit-reset-tokens"].removesuffix("ms")) / 1e3
    assert reset - 1 <= int(refused.headers["Retry-After"]) <= reset + 62
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) < 10


def test_a_caller_who_leaves_pays_for_what_was_made(gw: Gateway) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(tpm=1000)}"}
    waiting = threading.Event()

    def slow(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"w") * 5)
        waiting.set()
        gw.nodes[0].wait_for_close(connection)

    everywhere(gw, slow, 1)
    with httpx.stream(
        "POST", gw.url + "/api/chat", json=gw.chat(options={"num_predict": 900}), headers=headers
    ) as response:
        for _ in response.iter_lines():
            break
    for node in gw.nodes:
        node.script.clear()

    def left() -> int:
        response = httpx.get(gw.url + "/api/tags", headers=headers)
        return int(response.headers["x-ratelimit-remaining-tokens"])

    until(lambda: left() > 900, "what was reserved and not used is given back")
    assert left() < 1000 - 5, "five pieces, and a guess of the prompt"


def test_the_keys_of_a_tenant_share_its_limits(gw: Gateway) -> None:
    gw.control.publish(tenants=[{"name": "team", "rpm": 3}])
    both = [{"Authorization": f"Bearer {gw.new_key(tenant='team')}"} for _ in range(2)]
    local = gw.admitted_locally()
    assert [gw.post(headers=both[number % 2]).status_code for number in range(3)] == [200] * 3
    refused = over_the_limit(gw, both[1], local)
    assert (refused.status_code, refused.headers["x-ratelimit-limit-requests"]) == (429, "3")
    assert "3 requests per minute of the tenant" in refused.json()["error"]
    gw.control.publish(tenants=[{"name": "team", "rpm": 6000}])
    until(lambda: gw.post(headers=both[0]).status_code == 200, "the limit was raised")


# -- control and disk


def test_a_caller_cannot_hide_behind_a_repeated_request_id(gw: Gateway) -> None:
    for _ in range(3):
        gw.post(headers={"X-Request-ID": "again", "X-Corral-Edge-ID": "mine"})
    gw.control.settled("again")
    until(lambda: len({r["id"] for r in gw.control.records if r["request_id"] == "again"}) in (1, 3), "they came")
    httpx.post(
        gw.edge + "/api/chat", json=gw.chat(), headers=gw.auth | {"X-Corral-Edge-ID": "mine", "X-Request-ID": "e"}
    )
    assert gw.control.settled("e")["id"] != "mine"


def test_a_forged_address_is_not_believed(gw: Gateway) -> None:
    forged = {"X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6", "X-Request-ID": "forged"}
    httpx.post(gw.edge + "/api/chat", json=gw.chat(), headers=gw.auth | forged)
    assert gw.control.settled("forged")["addr"] == "127.0.0.1"


def test_what_is_internal_is_not_on_the_edge(gw: Gateway) -> None:
    for path in ("/metrics", "/internal/snapshot", "//internal/snapshot", "/%69nternal/snapshot"):
        assert httpx.get(gw.edge + path, headers=gw.auth).status_code == 404


def test_a_restart_keeps_the_records_and_a_cold_start_needs_no_control(tmp_path: Path) -> None:
    with gateway(tmp_path, auth={"stale": "1h"}) as gw:
        assert gw.post(headers={"X-Request-ID": "before"}).status_code == 200
        gw.control.settled("before")
        gw.control.stop()
        assert gw.post(headers={"X-Request-ID": "during"}).status_code == 200
        os.kill(gw.process.pid, signal.SIGKILL)
        gw.process.end()
        gw.start()
        assert gw.post(headers={"X-Request-ID": "after"}).status_code == 200
        data = b"".join(path.read_bytes() for path in sorted((tmp_path / "spool/gateway-1").glob("*.seg")))
        assert b'"during"' in data
        assert b'"after"' in data


def test_a_snapshot_that_is_too_old_admits_nobody(tmp_path: Path) -> None:
    # Longer than a machine may halt.
    with gateway(tmp_path, auth={"stale": "5s"}) as gw:
        assert gw.post().status_code == 200
        gw.control.stop()
        until(lambda: gw.post().status_code == 503, "the snapshot is too old")
        # Control is asked again in half a second.
        assert {gw.post().headers["Retry-After"] for _ in range(64)} == {"1", "2"}
        assert httpx.get(gw.url + "/health/ready").status_code == 503


def test_a_cold_start_never_goes_back_behind_a_revocation(tmp_path: Path) -> None:
    with gateway(tmp_path, auth={"stale": "1h"}) as gw:
        headers = {"Authorization": f"Bearer {gw.new_key()}"}
        assert gw.post(headers=headers).status_code == 200
        kept = tmp_path / "cache/gateway-1/snapshot.json"
        before = kept.stat().st_mtime_ns
        kept.with_suffix(".new").mkdir()  # stands for any reason why the file cannot be written
        gw.revoke_last_key()
        assert gw.post(headers=headers).status_code == 401
        assert kept.stat().st_mtime_ns == before
        assert gw.process.log.read_text().count("is not kept") == 1
        kept.with_suffix(".new").rmdir()
        until(lambda: kept.stat().st_mtime_ns != before, "the snapshot is kept after all")
        os.kill(gw.process.pid, signal.SIGKILL)
        gw.process.end()
        gw.control.stop()
        gw.start()
        assert gw.post(headers=headers).status_code == 401
