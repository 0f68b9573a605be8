"""Ollama's routes that change a node, by every spelling of their paths: no node hears of any."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from support.gateway import Gateway, gateway
from support.smuggling import answers, exchange

VERBS = ["pull", "push", "create", "copy", "delete", "blobs/sha256:" + "0" * 64]
OTHERS = [
    "/api/experimental/x",
    "/v1/responses",
    "/v1/audio/transcriptions",
    "/api/status",
    "/",
    "/metrics",
    "/debug/pprof",
]
TRICKS = [
    "/api/{}",
    "//api/{}",
    "/api//{}",
    "/api/{}/",
    "/api/{}?x=/api/chat",
    "/api/{}#/api/chat",
    "/api/{};/api/chat",
    "/API/{}",
    "/api/%2e%2e/api/{}",
    "/api/chat/../{}",
    "/api/chat/..%2f{}",
    "/api/chat%2f..%2f{}",
    "/%61pi/{}",
    "/api%2f{}",
    "/api/./{}",
    "/api\\{}",
    "/v1/models/../../api/{}",
    "/v1/models/%2e%2e/%2e%2e/api/{}",
    "/health/../api/{}",
    "/admin/../api/{}",
    "/api/chat%00/../{}",
    "/api/chat%0d%0a/api/{}",
    "http://corral/api/{}",
    "http://nodes/api/{}",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "PULL"]


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("routes")) as started:
        yield started


@pytest.mark.parametrize("through", ["edge", "gateway"])
@pytest.mark.parametrize("method", METHODS)
def test_no_node_hears_of_a_route_that_is_not_served(gw: Gateway, method: str, through: str) -> None:
    port = urlsplit(gw.edge if through == "edge" else gw.url).port or 0
    override = "X-HTTP-Method-Override: POST\r\nX-Original-URL: /api/pull\r\nX-Rewrite-URL: /api/pull\r\n"
    content = '{"model":"m","name":"m","source":"m","destination":"n"}'
    for node in gw.nodes:
        node.requests.clear()
    for target in [*(trick.format(verb) for trick in TRICKS for verb in VERBS), *OTHERS]:
        raw = (
            f"{method} {target} HTTP/1.1\r\nHost: corral\r\nAuthorization: Bearer {gw.key}\r\nConnection: close\r\n"
            f"{override}Content-Length: {len(content)}\r\n\r\n{content}"
        )
        found = answers(exchange(port, raw.encode(), answers))
        assert found and all(status >= 400 for status in found), (target, found)
    assert [request for node in gw.nodes for request in node.requests] == []
