"""A body that names an upstream, an image by its address, a node that redirects: nobody goes where they point."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.gateway import Gateway, gateway

from corral.wire.bodies import UPSTREAM_FIELDS

ROUTES = ["/api/generate", "/api/chat", "/v1/completions", "/v1/chat/completions", "/v1/messages"]


class Canary:
    """Counts who connects, and says nothing."""

    def __init__(self) -> None:
        self.hits = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/x.png"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            connection.close()

    def touch(self) -> None:
        """Have all who connected before be counted: they are taken in turn."""
        seen = self.hits
        socket.create_connection(self._listener.getsockname()).close()
        while self.hits == seen:
            threading.Event().wait(0.01)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as made:
        yield made


@pytest.fixture
def gw(running: Gateway) -> Gateway:
    running.forget()
    return running


@pytest.fixture
def canary() -> Iterator[Canary]:
    made = Canary()
    yield made
    made.close()


def untouched(canary: Canary) -> bool:
    """Whether nobody but this test has connected."""
    before = canary.hits
    canary.touch()
    return (before, canary.hits) == (0, 1)


def asked(gw: Gateway) -> int:
    return sum(len(node.requests) for node in gw.nodes)


def small(path: str, **more: Any) -> dict[str, Any]:
    """A body that is fine as it is."""
    prompt = {"prompt": "a"} if path in ("/api/generate", "/v1/completions") else messages("a")
    return {"model": "m", "stream": False, "max_tokens": 5, **prompt, **more}


def messages(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize("path", ROUTES)
def test_a_field_that_names_an_upstream_is_refused_and_nobody_is_asked(gw: Gateway, canary: Canary, path: str) -> None:
    assert gw.post(path, small(path)).status_code == 200
    served = asked(gw)
    for name in UPSTREAM_FIELDS:
        answer = gw.post(path, small(path, **{name: canary.url}))
        assert answer.status_code == 400, name
        assert name in answer.text
    assert asked(gw) == served
    assert untouched(canary)


def test_an_image_by_its_address_is_fetched_by_nobody(gw: Gateway, canary: Canary) -> None:
    url = canary.url
    by_address = {"type": "image", "source": {"type": "url", "url": url}}
    for path, body in (
        ("/api/generate", small("/api/generate", images=[url])),
        ("/api/chat", small("/api/chat") | messages("a", images=[url])),
        ("/v1/chat/completions", messages([{"type": "image_url", "image_url": {"url": url}}]) | {"model": "m"}),
        ("/v1/messages", messages([by_address]) | {"model": "m", "max_tokens": 5}),
    ):
        answer = gw.post(path, body)
        assert answer.status_code == 400, (path, answer.text)
        assert "image" in answer.text
    assert asked(gw) == 0
    assert untouched(canary)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_a_node_is_not_followed(gw: Gateway, canary: Canary, status: int) -> None:
    head = b"HTTP/1.1 %d X\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, canary.url.encode())
    for node in gw.nodes:
        node.script = [lambda connection: connection.sendall(head)] * 5
    answer = gw.post()
    assert answer.status_code in (502, 503), answer.text
    assert "location" not in answer.headers
    assert asked(gw) >= 2, "another node was asked"
    assert untouched(canary)
