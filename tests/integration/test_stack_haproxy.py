"""The rendered configuration in a real HAProxy, between sockets whose every byte is seen."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from support.process import Process, free_port, until
from support.smuggling import BARE, answers, body, corpus, exchange
from support.smuggling import request as request_of

from corral.config.haproxy import HaproxyPlan, render
from corral.wire import errors
from corral.wire.errors import ApiError

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Origin:
    """A server that keeps what it was sent. ``answer`` gives the bytes for a request, b"" closes without any."""

    name: str
    answer: Callable[[bytes], bytes] = lambda _: OK
    requests: list[bytes] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # HAProxy's checks and its end close with a reset.
        with connection, contextlib.suppress(ConnectionError):
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
                head, blank, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if not blank or len(body) < int(length[1] if length else 0):
                    continue
                checked = head.startswith((b"GET /health ", b"OPTIONS ", b"GET /api/version "))
                if not checked:
                    self.requests.append(data)
                reply = OK if checked else self.answer(data)
                if not reply:
                    return
                connection.sendall(reply)
                data = b""

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Header fields of the last request, names in lower case."""
        lines = self.requests[-1].partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        return [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]


@dataclass
class Rig:
    """HAProxy with its origins."""

    plan: HaproxyPlan
    gateways: list[Origin]
    control: Origin
    node: Origin
    process: Process

    def ask(
        self, path: str = "/", headers: dict[str, str] | None = None, body: bytes | None = None, port: int = 0
    ) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", port or self.plan.edge_port, timeout=60)
        try:
            connection.request("POST" if body is not None else "GET", path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


@pytest.fixture
def rig(haproxy: str, tmp_path: Path) -> Iterator[Rig]:
    gateways = [Origin("gateway-1"), Origin("gateway-2")]
    control, node = Origin("control"), Origin("node-1")
    plan = HaproxyPlan(
        edge_host="127.0.0.1",
        edge_port=free_port(),
        nodes_host="127.0.0.1",
        nodes_port=free_port(),
        stats_host="127.0.0.1",
        stats_port=free_port(),
        stats_socket=str(tmp_path / "h.sock"),
        gateways=[(gateway.name, "127.0.0.1", gateway.port) for gateway in gateways],
        control=("127.0.0.1", control.port),
        nodes=[("node-1", f"http://127.0.0.1:{node.port}"), ("node-2", f"http://127.0.0.1:{free_port()}")],
        max_duration=60.0,
        ollama=("127.0.0.1", free_port()),
    )
    (tmp_path / "haproxy.cfg").write_text(render(plan))
    for origin in (*gateways, control, node):
        origin.start()
    process = Process([haproxy, "-W", "-f", tmp_path / "haproxy.cfg"], tmp_path / "haproxy.log")
    made = Rig(plan, gateways, control, node, process)
    try:
        process.wait_until(lambda: made.ask("/ready")[0].status == 200)
        yield made
    finally:
        process.end()
        for origin in (*gateways, control, node):
            origin.stop()


def last(rig: Rig) -> Origin:
    """The gateway that had the last request."""
    return max((gateway for gateway in rig.gateways if gateway.requests), key=lambda item: len(item.requests))


def ask_for_headers(rig: Rig, headers: dict[str, str]) -> dict[str, list[str]]:
    for gateway in rig.gateways:
        gateway.requests.clear()
    assert rig.ask("/api/tags", headers)[0].status == 200
    seen: dict[str, list[str]] = {}
    for name, value in last(rig).headers:
        seen.setdefault(name, []).append(value)
    return seen


def test_the_edge_says_who_called_and_believes_nobody_else(rig: Rig) -> None:
    seen = ask_for_headers(
        rig,
        {
            "X-Forwarded-For": "6.6.6.6",
            "X-Corral-Node": "node-1",
            "x-corral-edge-id": "mine",
            "Forwarded": "for=6.6.6.6",
        },
    )
    assert seen["x-forwarded-for"] == ["127.0.0.1"]
    assert "x-corral-node" not in seen
    assert "forwarded" not in seen
    assert len(seen["x-corral-edge-id"]) == 1
    assert UUID.fullmatch(seen["x-corral-edge-id"][0])


def test_a_caller_s_deadline_goes_through_and_nothing_else_of_corral_s(rig: Rig) -> None:
    seen = ask_for_headers(rig, {"X-Corral-Deadline-Ms": "1500", "X-Corral-Gateway": "gateway-1"})
    assert seen["x-corral-deadline-ms"] == ["1500"] and "x-corral-gateway" not in seen
    assert "x-corral-deadline-ms" not in ask_for_headers(rig, {})


@pytest.mark.parametrize("given", ["abc-1.2_3", "a" * 64])
def test_a_well_formed_request_id_is_kept(rig: Rig, given: str) -> None:
    assert ask_for_headers(rig, {"X-Request-ID": given})["x-request-id"] == [given]


@pytest.mark.parametrize("given", [None, "", "a" * 65, "a b", 'a"b', "a,b", "é"])
def test_any_other_request_id_is_replaced(rig: Rig, given: str | None) -> None:
    seen = ask_for_headers(rig, {} if given is None else {"X-Request-ID": given})
    assert len(seen["x-request-id"]) == 1
    assert UUID.fullmatch(seen["x-request-id"][0])
    assert seen["x-request-id"] == seen["x-corral-edge-id"], "it has one name"


@pytest.mark.parametrize("path", ["/metrics", "/internal/snapshot", "/%6detrics", "//metrics", "/METRICS", "/internal"])
def test_what_is_internal_is_not_on_the_edge(rig: Rig, path: str) -> None:
    response, body = rig.ask(path)
    assert response.status == 404
    assert response.headers["X-Corral-Proxy"] == "haproxy"
    assert json.loads(body)["error"]["code"] == "not_found"
    assert rig.control.requests == []


@pytest.mark.parametrize("path", ["/admin/keys", "/docs", "/openapi.json"])
def test_control_has_its_own_paths(rig: Rig, path: str) -> None:
    assert rig.ask(path)[0].status == 200
    assert rig.control.requests


def test_an_empty_answer_is_replayed_once_towards_another_gateway(rig: Rig) -> None:
    for gateway in rig.gateways:
        gateway.requests.clear()
        gateway.answer = lambda _: b""
    response, _ = rig.ask("/api/chat", body=b"x" * 60_000)
    assert response.status in (502, 503)
    assert response.headers["X-Corral-Proxy"] == "haproxy"
    assert [len(gateway.requests) for gateway in rig.gateways] == [1, 1]
    first, second = (gateway.requests[0] for gateway in rig.gateways)
    assert first == second, "the edge's id is the same, so that it is settled once"


def test_a_dead_gateway_costs_no_request(rig: Rig) -> None:
    rig.gateways[0].stop()
    assert {rig.ask("/api/tags")[0].status for _ in range(20)} == {200}
    rig.gateways[0].start()


def reloaded(process: Process) -> None:
    """Have HAProxy read its configuration anew. A master that has just started its worker does not heed signals yet."""

    def heeded() -> bool:
        if "Reloading HAProxy" in process.log.read_text():
            return True
        os.kill(process.pid, signal.SIGUSR2)
        return False

    until(heeded, "the master reloads", every=0.5)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("front_end", ["edge", "ollama"])
def test_a_reload_closes_no_connection_that_a_caller_keeps(rig: Rig, front_end: str, used: bool) -> None:
    assert rig.plan.ollama is not None
    ports = {"edge": rig.plan.edge_port, "ollama": rig.plan.ollama[1]}
    connection = HTTPConnection("127.0.0.1", ports[front_end], timeout=60)
    with contextlib.closing(connection):
        connection.connect()
        if used:
            connection.request("GET", "/api/tags")
            connection.getresponse().read()
        reloaded(rig.process)
        rig.process.wait_until(lambda: f"Proxy {front_end} stopped" in rig.process.log.read_text())
        # The caller's next request may be on its way when the old worker hears that it is to stop.
        connection.request("GET", "/api/tags")
        with connection.getresponse() as answer:
            assert (answer.read(), answer.headers["Connection"]) == (b"ok", "close"), "the old worker's last"


def test_an_error_of_a_gateway_is_not_replayed(rig: Rig) -> None:
    for gateway in rig.gateways:
        gateway.requests.clear()
        gateway.answer = lambda _: b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    response, _ = rig.ask("/api/chat", body=b"{}")
    assert response.status == 503
    assert "X-Corral-Proxy" not in response.headers
    assert sum(len(gateway.requests) for gateway in rig.gateways) == 1


def test_without_a_gateway_the_edge_says_503_and_when_to_come_back(rig: Rig) -> None:
    for gateway in rig.gateways:
        gateway.stop()
    until(lambda: rig.ask("/api/tags")[0].status == 503, "503 from the edge")
    response, body = rig.ask("/api/tags")
    assert response.headers["X-Corral-Proxy"] == "haproxy"
    assert int(response.headers["Retry-After"]) >= 1
    message = json.loads(body)["error"]
    assert isinstance(message, str) and message
    told_all = {rig.ask("/api/tags")[0].headers["Retry-After"] for _ in range(64)}
    assert told_all == {"1", "2"}, "not all come back in the same second"
    for path, api in (("/api/tags", "native"), ("/v1/models", "openai"), ("/v1/messages", "anthropic")):
        response, body = rig.ask(path)
        told = json.loads(body)
        ours = json.loads(errors.render(api, ApiError(503, "overloaded", message)))
        assert response.status == 503 and response.headers["Retry-After"] in ("1", "2")
        assert set(told) == set(ours) - {"request_id"}
        if api != "native":
            assert told["error"]["message"] == message and set(told["error"]) == set(ours["error"])
    for gateway in rig.gateways:
        gateway.start()


def test_a_node_is_named_by_its_header(rig: Rig) -> None:
    response, _ = rig.ask("/api/chat", {"X-Corral-Node": "node-1"}, b"{}", rig.plan.nodes_port)
    assert response.status == 200
    assert "x-corral-node" not in dict(rig.node.headers)
    assert dict(rig.node.headers)["host"] == f"127.0.0.1:{rig.node.port}"


def test_a_node_that_is_down_is_a_marked_503(rig: Rig) -> None:
    response, _ = rig.ask("/api/chat", {"X-Corral-Node": "node-2"}, b"{}", rig.plan.nodes_port)
    assert (response.status, response.headers["X-Corral-Proxy"]) == (503, "haproxy")


@pytest.mark.parametrize("name", ["node-3", "node", "", "node-1,node-1", None])
def test_a_node_that_is_unknown_is_a_503_marked_as_such(rig: Rig, name: str | None) -> None:
    """Another mark than a node's that is down: a gateway asks the new worker after a reload."""
    headers = {} if name is None else {"X-Corral-Node": name}
    response, _ = rig.ask("/api/chat", headers, b"{}", rig.plan.nodes_port)
    assert (response.status, response.headers["X-Corral-Proxy"]) == (503, "no-such-node")
    assert not rig.node.requests


def test_a_node_s_request_is_never_tried_twice(rig: Rig) -> None:
    rig.node.answer = lambda _: b""
    response, _ = rig.ask("/api/chat", {"X-Corral-Node": "node-1"}, b"{}", rig.plan.nodes_port)
    assert (response.status, response.headers["X-Corral-Proxy"]) == (502, "haproxy")
    assert len(rig.node.requests) == 1


def test_a_node_s_endless_headers_go_no_further(rig: Rig) -> None:
    rig.node.answer = lambda _: b"HTTP/1.1 200 OK\r\n" + b"X-More: of them\r\n" * 10_000
    response, body = rig.ask("/api/chat", {"X-Corral-Node": "node-1"}, b"{}", rig.plan.nodes_port)
    assert (response.status, response.headers["X-Corral-Proxy"]) == (502, "haproxy")
    assert len(body) < 1000


def test_a_node_cannot_pretend_to_be_haproxy(rig: Rig) -> None:
    rig.node.answer = lambda _: b"HTTP/1.1 503 No\r\nX-Corral-Proxy: haproxy\r\nContent-Length: 0\r\n\r\n"
    response, _ = rig.ask("/api/chat", {"X-Corral-Node": "node-1"}, b"{}", rig.plan.nodes_port)
    assert response.status == 503
    assert "X-Corral-Proxy" not in response.headers


def test_what_is_no_http_goes_no_further(rig: Rig) -> None:
    """HAProxy answers it before a stream exists, in its own words: the one error that cannot be marked."""
    for gateway in rig.gateways:
        gateway.requests.clear()
    with socket.create_connection(("127.0.0.1", rig.plan.edge_port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert not any(gateway.requests for gateway in rig.gateways)


def test_prometheus_finds_each_node(rig: Rig) -> None:
    body = rig.ask("/metrics", port=rig.plan.stats_port)[1].decode()
    assert 'haproxy_server_status{proxy="node_node-1",server="node-1",state="UP"}' in body


@pytest.mark.parametrize("name", [case.name for case in corpus(b"")])
def test_what_goes_on_can_be_read_in_one_way_only(rig: Rig, name: str) -> None:
    """Whatever HAProxy makes of a request, the next server gets whole lines, one framing and one body, or nothing."""
    for gateway in rig.gateways:
        gateway.requests.clear()
    case = next(case for case in corpus(b"Bearer x") if case.name == name)

    def received() -> list[bytes]:
        return [request for gateway in rig.gateways for request in gateway.requests]

    def whole(data: bytes) -> bool:
        # The origin waits for the rest of the huge one.
        come = answers(data).count(200)
        return bool(data or name == "cl-huge") and come >= len(received()) and (name != BARE or come == 2)

    data = exchange(rig.plan.edge_port, case.raw, whole)
    assert len(received()) == answers(data).count(200)
    for request in received():
        head, _, content = request.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        names = [line.partition(b":")[0].lower() for line in lines[1:]]
        assert b"\n" not in head.replace(b"\r\n", b"") and b"\r" not in head.replace(b"\r\n", b"") and b"\0" not in head
        assert re.fullmatch(rb"[A-Za-z]+ /[!-~]* HTTP/1\.1", lines[0])
        assert all(re.fullmatch(rb"[a-z0-9-]+", one) for one in names)
        assert names.count(b"host") == names.count(b"x-corral-edge-id") == 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert b"upgrade" not in names
        if b"transfer-encoding" in names:
            assert b"transfer-encoding: chunked" in [line.lower() for line in lines]
            size, _, content = content.partition(b"\r\n")
            content, end = content[: int(size, 16)], content[int(size, 16) :]
            assert re.fullmatch(rb"(\r\n0\r\n)?([a-z-]+: [^\r\n]*\r\n)*\r\n", end)
        if b"content-length" in names:
            assert b"content-length: %d" % len(content) in [line.lower() for line in lines]
        inner = request_of(b"Bearer x", body("hidden"))
        assert content in (b"", body("open"), body("hidden"), body("open") + inner, inner)
