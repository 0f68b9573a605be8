"""The canary, before a node that does as a test says: what it asks, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.process import NotReady

from corral.config.settings import CanarySettings
from corral.control.canary import Canary, policies
from corral.control.prober import Fleet, Member

DONE = {"response": "", "done": True, "load_duration": 1_000_000, "eval_count": 1}


class Node:
    """A node with the resident model m; ``answer`` makes status and body of what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.listed = 0
        self.resident = ["m:latest"]
        self.answer: Callable[[str], tuple[int, dict[str, Any]]] = lambda path: (200, DONE)
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = [{"name": name, "expires_at": "2318-01-01T00:00:00Z"} for name in node.resident]
                node.listed += 1
                self.send(200, {"models": listed})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                node.asked.append((self.path, body))
                self.send(*node.answer(self.path))

            def send(self, status: int, value: dict[str, Any]) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.member = Member("a", f"http://127.0.0.1:{self._server.server_port}", slots=2, up=True)
        self.member.measured.resident({"m:latest"}, time.monotonic())

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


def canary_until(
    node: Node,
    holds: Callable[[], object],
    seconds: float = 30.0,
    streams: Callable[[], int | None] = lambda: None,
    **settings: float,
) -> None:
    """Run the canary until it holds."""

    async def run() -> None:
        fleet = Fleet()
        fleet.members = {"a": node.member}

        async def running(name: str) -> int | None:
            return streams()

        chosen = CanarySettings(**{"interval": 0.1, "timeout": 0.5, **settings})
        known = policies([{"name": "m", "num_ctx": 2048, "options": {"num_thread": 1}}])
        task = asyncio.create_task(Canary(fleet, chosen, known, running).run())
        deadline = time.monotonic() + seconds
        while not holds() and not task.done():
            if time.monotonic() > deadline:
                task.cancel()
                raise NotReady("the canary does not come to it")
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_it_asks_for_one_token_as_a_gateway_would(node: Node) -> None:
    canary_until(node, lambda: node.member.measured.canary_ok)
    assert node.asked[0] == (
        "/api/generate",
        {
            "model": "m:latest", "prompt": "a", "raw": True, "stream": False, "keep_alive": -1,
            "options": {"num_predict": 1, "temperature": 0.0, "num_ctx": 2048, "num_thread": 1},
        },
    )  # fmt: skip
    measured = node.member.measured
    assert measured.canary_duration is not None and measured.canary_duration < 5
    assert measured.canary_success is not None and abs(measured.canary_success - time.time()) < 30


@pytest.mark.parametrize("fault", ["status", "error", "silence"])
def test_a_runner_that_gives_no_token(node: Node, fault: str) -> None:
    release = threading.Event()

    def silent(path: str) -> tuple[int, dict[str, Any]]:
        release.wait(60)
        return 200, DONE

    node.answer = {
        "status": lambda path: (500, {"error": "broken"}),
        "error": lambda path: (200, {"error": "broken"}),
        "silence": silent,
    }[fault]  # type: ignore[assignment]
    canary_until(node, lambda: node.member.measured.canary_ok is False)
    assert node.member.measured.canary_success is None
    release.set()
    node.answer = lambda path: (200, DONE)
    canary_until(node, lambda: node.member.measured.canary_ok)


def test_one_that_is_late_beside_another_controls_load_does_not_hang(node: Node) -> None:
    release = threading.Event()

    def silent(path: str) -> tuple[int, dict[str, Any]]:
        release.wait(60)
        return 200, DONE

    node.answer = silent
    node.member.measured.elsewhere = {"big:latest": 15.0}
    canary_until(node, lambda: len(node.asked) > 2)
    assert node.member.measured.canary_ok is None
    node.member.measured.elsewhere = {"m:latest": 15.0}
    canary_until(node, lambda: node.member.measured.canary_ok is False)
    release.set()


def test_a_model_that_still_loads_has_time(node: Node) -> None:
    node.member.measured.resident(set(), time.monotonic())
    node.member.measured.resident({"m:latest"}, time.monotonic())

    def loading(path: str) -> tuple[int, dict[str, Any]]:
        time.sleep(1.0)  # longer than the time-out of a canary
        return 200, DONE

    node.answer = loading
    canary_until(node, lambda: node.member.measured.canary_ok is not None)
    assert node.member.measured.canary_ok is True
    node.member.measured.residents["m:latest"].fresh = False
    canary_until(node, lambda: node.member.measured.canary_ok is False)


def test_a_model_of_embeddings_is_asked_to_embed(node: Node) -> None:
    refused = {"error": '"m" does not support generate'}
    node.answer = lambda path: (400, refused) if path == "/api/generate" else (200, {"embeddings": [[1.0]]})
    canary_until(node, lambda: node.member.measured.canary_ok)
    path, body = node.asked[-1]
    assert path == "/api/embed" and body["input"] == "a" and "num_predict" not in body["options"]


def test_a_model_that_has_left_is_not_loaded_anew(node: Node) -> None:
    node.resident = []
    canary_until(node, lambda: node.listed >= 3)
    assert node.asked == []


def test_a_busy_node_is_left_alone(node: Node) -> None:
    turns: list[int] = []

    def busy() -> int:
        turns.append(node.member.slots)
        return node.member.slots

    canary_until(node, lambda: len(turns) >= 3, streams=busy)
    assert node.asked == [] and node.member.measured.canary_ok is None
    canary_until(node, lambda: node.asked, streams=lambda: node.member.slots - 1)


def test_it_can_be_turned_off(node: Node) -> None:
    residence = node.member.measured.residents["m:latest"]
    canary_until(node, lambda: residence.tried, interval=0.0)
    assert node.asked == [] and not residence.tried
