"""A gateway that is told to stop: what runs ends first, what comes meanwhile is served, and HAProxy hears of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, chunk, gateway
from support.process import until


def test_a_drained_gateway_ends_its_streams_first(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        held = threading.Event()

        def slowly(connection: socket.socket) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one"))
            assert held.wait(60)
            connection.sendall(chunk(LAST % 1) + END)

        for node in gw.nodes:
            node.script = [slowly]
        with httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth) as response:
            lines = response.iter_lines()
            next(lines)
            assert gw.control.stores[0] is None, "who does not listen yet serves nobody"
            until(lambda: gw.control.stores[-1] == "1", "it has the store")
            os.kill(gw.process.pid, signal.SIGTERM)
            until(lambda: gw.control.stores[-1] is None, "nobody is to leave on its account")
            held.set()
            assert json.loads(next(lines))["done"] is True
        assert gw.process.end() == 0
        assert any(record["t"] == "settle" for record in gw.control.records)


@pytest.mark.parametrize(
    ("drain", "signals"),
    [
        (None, [signal.SIGTERM, signal.SIGTERM]),
        (None, [signal.SIGINT, signal.SIGINT]),
        (None, [signal.SIGINT, signal.SIGTERM]),
        ("100ms", [signal.SIGTERM]),
    ],
)
def test_answers_end_with_an_error_at_a_second_signal_or_after_the_drain(
    tmp_path: Path, drain: str | None, signals: list[signal.Signals]
) -> None:
    with gateway(tmp_path, gateway={"drain": drain}) as gw:
        held = threading.Event()

        def for_ever(connection: socket.socket) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one"))
            held.wait(60)

        for node in gw.nodes:
            node.script = [for_ever]
        with httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth, timeout=60) as response:
            lines = response.iter_lines()
            assert "error" not in json.loads(next(lines)), "it has begun"
            first, *further = signals
            os.kill(gw.process.pid, first)
            until(lambda: not ready(gw.url), "it is told to end", every=0)
            for number in further:
                os.kill(gw.process.pid, number)
            assert "is being stopped" in json.loads(next(lines))["error"]
            assert list(lines) == []
        held.set()
        assert gw.process.end() == 0
        (settled,) = [record for record in gw.control.records if record["t"] == "settle"]
        assert settled["outcome"] == "interrupted"


def ready(url: str) -> bool:
    """Whether a gateway is there and means to stay."""
    try:
        return httpx.get(url + "/health/ready").json().get("reason") != "it is being stopped"
    except httpx.ConnectError:
        return False


def test_haproxy_hears_that_a_gateway_goes_and_until_then_it_serves(tmp_path: Path) -> None:
    """Else a request is lost that HAProxy sends meanwhile, where no other gateway is up."""
    # Within a second and a half of what HAProxy was told it has gone, if nobody asks: to make a client takes of that.
    with gateway(tmp_path) as gw, httpx.Client() as idle, httpx.Client() as fresh, httpx.Client() as edge:
        assert idle.get(gw.url + "/api/tags", headers=gw.auth).status_code == 200
        gw.haproxy.end()  # this test asks in its place

        def checked() -> int:
            return edge.get(gw.url + "/health", headers={"X-Corral-Check": "edge"}).status_code

        assert checked() == 200
        os.kill(gw.process.pid, signal.SIGTERM)
        until(lambda: checked() == 503, "it says that it goes", every=0)
        for client in (idle, fresh):
            answer = client.get(gw.url + "/api/tags", headers=gw.auth)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert fresh.get(gw.url + "/health").status_code == 200, "others than HAProxy: it answers"
        assert fresh.get(gw.url + "/health/ready").json()["reason"] == "it is being stopped"
        until(lambda: not gw.process.alive, "it has gone")
        assert gw.process.end() == 0


def test_the_edge_says_that_it_is_well_while_a_gateway_goes(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        forged = {"X-Corral-Check": "edge"}
        assert httpx.get(gw.edge + "/health", headers=forged).status_code == 200
        os.kill(gw.process.pid, signal.SIGTERM)
        seen: set[tuple[int, bytes]] = set()

        def gone() -> bool:
            answer = httpx.get(gw.edge + "/health", headers=forged)
            seen.add((answer.status_code, b"being stopped" in answer.content))
            return not gw.process.alive

        until(gone, "it has gone", every=0)
        assert {said for _, said in seen} == {False}, seen


def test_what_is_on_its_way_when_a_gateway_is_stopped_arrives_and_is_answered(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        body = json.dumps(gw.chat(stream=False, messages=[{"role": "user", "content": "a " * 100_000}])).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gw.key}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", gw.port), timeout=60) as caller:
            caller.sendall(head.encode() + body[:100_000])
            gw.post()  # what came before it was read
            os.kill(gw.process.pid, signal.SIGTERM)

            def closed() -> bool:
                try:
                    socket.create_connection(("127.0.0.1", gw.port)).close()
                except ConnectionRefusedError:
                    return True
                return False

            until(closed, "it takes no connection any more")
            caller.sendall(body[100_000:])
            assert caller.recv(12) == b"HTTP/1.1 200"
        assert gw.process.end() == 0


def test_haproxy_is_told_that_a_gateway_is_cut_off_from_the_store_and_nobody_else(tmp_path: Path) -> None:
    def told(**headers: str) -> int:
        return httpx.get(gw.url + "/health", headers=headers).status_code

    check = {"X-Corral-Check": "edge"}
    with gateway(tmp_path) as gw:
        until(lambda: gw.control.stores[-1] == "1", "it has the store")
        gw.control.elsewhere = True
        asked = len(gw.control.stores)
        until(lambda: len(gw.control.stores) > asked + 5, "others have it too, for some seconds")
        assert told(**check) == 200
        gw.valkey.process.end(signal.SIGKILL)
        # Asked as HAProxy asks: who was silent for long has it down, and is to find it first.
        until(lambda: told(**check) == 404, "it is cut off", every=0.2)
        assert told() == 200 and gw.control.stores[-1] == "0"
        assert gw.post().status_code == 200, "who comes all the same is served"
        gw.control.elsewhere = False
        until(lambda: told(**check) == 200, "nobody has it", every=0.2)
