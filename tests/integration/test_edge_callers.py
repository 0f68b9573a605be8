"""Who calls, and by which name: forged addresses, rebound names, pages of other origins."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import Gateway, gateway
from support.process import Process, free_port, until

from corral.config.haproxy import HaproxyPlan, edge_hosts, render
from corral.config.settings import EdgeSettings
from corral.stack import binaries

ROUTES = [
    *(("POST", f"/api/{verb}") for verb in ("generate", "chat", "embed", "embeddings", "show", "pull", "create")),
    *(("GET", f"/api/{what}") for what in ("tags", "ps", "version")),
    *(("POST", f"/v1/{what}") for what in ("chat/completions", "completions", "embeddings", "messages", "responses")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/m", "/health", "/health/ready", "/admin/keys", "/docs")),
]
FORGED = ["6.6.6.6", "127.0.0.1", "6.6.6.6, 7.7.7.7", "", "x" * 300]
FORWARDING = [
    "X-Forwarded-For",
    "x-forwarded-for",
    "Forwarded",
    "X-Real-IP",
    "X-Forwarded-Host",
    "True-Client-IP",
    "CF-Connecting-IP",
    "X-Client-IP",
]
_numbers = count(1)


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("callers")) as started:
        yield started


@contextmanager
def edge(gw: Gateway, folder: Path, **change: Any) -> Iterator[str]:
    """A second edge before the same gateway, with other settings; its address."""
    port = free_port()
    others = {"edge_port": port, "nodes_port": free_port(), "stats_port": free_port()}
    plan: HaproxyPlan = replace(gw.plan, stats_socket=str(folder / "s.sock"), **others, **change)
    (folder / "haproxy.cfg").write_text(render(plan))
    process = Process([binaries.haproxy(), "-db", "-f", folder / "haproxy.cfg"], folder / "haproxy.log")
    try:
        process.wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end()


# -- row 12: a forged address


@pytest.mark.parametrize("value", FORGED)
@pytest.mark.parametrize("name", FORWARDING)
def test_a_forged_address_is_believed_by_nobody(gw: Gateway, name: str, value: str) -> None:
    request_id = f"forged-{next(_numbers)}"
    headers = gw.auth | {"X-Request-ID": request_id, name: value}
    assert httpx.post(gw.edge + "/api/chat", json=gw.chat(stream=False), headers=headers).status_code == 200
    record = gw.control.settled(request_id)
    assert (record["addr"], record["key"]) == ("127.0.0.1", gw.key_id)


@pytest.mark.parametrize(
    "name",
    ["X_Forwarded_For", "x_forwarded-for", "X_Corral_Edge_ID", "Content_Length", "X-Corral_Node", "Au_thorization"],
)
def test_an_underscore_alias_is_refused(gw: Gateway, name: str) -> None:
    answer = httpx.get(gw.edge + "/api/tags", headers=gw.auth | {name: "6.6.6.6"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_the_query_of_anthropics_beta_clients_is_served_and_no_other(gw: Gateway) -> None:
    request_id = f"beta-{next(_numbers)}"
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    headers = gw.auth | {"X-Request-ID": request_id}
    answer = httpx.post(gw.edge + "/v1/messages?beta=true", json=body, headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (200, "message")
    assert gw.control.settled(request_id)["route"] == "/v1/messages"
    refused = httpx.post(gw.edge + "/v1/messages?beta=1", json=body, headers=gw.auth)
    assert refused.status_code == 404 and "it takes no query" in refused.json()["error"]["message"]


def test_the_edge_names_requests_in_the_order_of_time(gw: Gateway) -> None:
    """By a UUIDv7, which is the request's one name where its caller gives none."""
    names = []
    for _ in range(5):
        before = time.time_ns() // 10**6
        answer = httpx.post(gw.edge + "/api/chat", json=gw.chat(stream=False), headers=gw.auth)
        name = uuid.UUID(answer.headers["X-Request-ID"])
        assert (name.version, name.variant) == (7, uuid.RFC_4122)
        # HAProxy looks at its clock when it wakes up.
        assert before - 1000 <= name.int >> 80 <= time.time_ns() // 10**6
        assert gw.control.settled(str(name))["id"] == str(name)
        names.append(name)
    assert [name.int >> 80 for name in names] == sorted(name.int >> 80 for name in names)
    assert len(set(names)) == 5
    given = httpx.post(gw.edge + "/api/chat", json=gw.chat(stream=False), headers=gw.auth | {"X-Request-ID": "given"})
    assert given.headers["X-Request-ID"] == "given"
    assert uuid.UUID(gw.control.settled("given")["id"]).version == 7


def test_a_peer_that_is_no_proxy_of_ours_is_not_believed(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway={"trusted_proxies": ["192.0.2.1/32"]}) as gw:
        headers = {"X-Request-ID": "mine", "X-Forwarded-For": "6.6.6.6", "X-Corral-Edge-ID": "chosen"}
        assert gw.post(headers=headers).status_code == 200
        record = gw.control.settled("mine")
        assert (record["addr"], record["id"] != "chosen") == ("127.0.0.1", True)


def test_a_limit_counts_the_key_whatever_address_is_claimed(gw: Gateway) -> None:
    key, local = gw.new_key(rpm=3), gw.admitted_locally()
    statuses = []
    for number in range(8):
        headers = {
            "Authorization": f"Bearer {key}",
            "X-Forwarded-For": f"6.6.6.{number}",
            "X-Request-ID": f"l-{number}",
        }
        answer = httpx.post(gw.edge + "/api/chat", json=gw.chat(stream=False), headers=headers)
        statuses.append(answer.status_code)
    local = gw.admitted_locally() - local
    assert 3 <= statuses.count(200) <= 3 + local and statuses.count(200) + statuses.count(429) == 8


# -- row 4: a Host that confuses


@pytest.mark.parametrize(
    "host", ["x/health?a=", "x/health", "a b", "x@y", "", "x:y", "x#", "[::1", "localhost, a", "ä"]
)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_host_that_is_none_is_a_400_on_every_route(gw: Gateway, method: str, path: str, host: str) -> None:
    asked = len(gw.nodes[0].requests) + len(gw.nodes[1].requests)
    raw: Any = {"Host": host.encode()}
    answer = httpx.request(method, gw.edge + path, headers=raw | gw.auth, json=gw.chat() if method == "POST" else None)
    assert answer.status_code == 400
    assert asked == len(gw.nodes[0].requests) + len(gw.nodes[1].requests)


@pytest.mark.parametrize(
    ("method", "path"), [route for route in ROUTES if not route[1].startswith(("/health", "/docs"))]
)
def test_a_gateway_asks_for_the_key_whatever_the_host(gw: Gateway, method: str, path: str) -> None:
    answer = httpx.request(method, gw.url + path, headers={"Host": "x/health?a="}, content=b"{}")
    assert answer.status_code in (401, 404, 501)


# -- row 14: a name that was rebound to here


LOCAL = [
    "127.0.0.1",
    "localhost",
    "127.0.0.1:8080",
    "[::1]",
    "[::1]:9",
    "10.1.2.3",
    "my-box",
    "a.local",
    "x.internal:1",
]
FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "a.locals",
    "LLM.example",
]


@pytest.mark.parametrize("host", LOCAL)
def test_on_loopback_local_names_are_served(gw: Gateway, host: str) -> None:
    assert httpx.get(gw.edge + "/api/tags", headers=gw.auth | {"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/api/tags", "/health", "/admin/keys", "/docs"])
@pytest.mark.parametrize("host", FOREIGN)
def test_on_loopback_no_other_name_is(gw: Gateway, host: str, path: str) -> None:
    answer = httpx.get(gw.edge + path, headers=gw.auth | {"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "misdirected")
    assert "edge.hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("port", ["nodes_port", "stats_port"])
def test_nor_by_the_internal_front_ends(gw: Gateway, port: str, host: str) -> None:
    """A page under a rebound name may send any header: without this it could name a node, and pull to it."""
    headers = {"Host": host, "X-Corral-Node": "node-1"}
    answer = httpx.post(f"http://127.0.0.1:{getattr(gw.plan, port)}/api/pull", headers=headers, json={"model": "x"})
    assert answer.status_code == 421


def test_named_hosts_are_served_and_no_others(gw: Gateway, tmp_path: Path) -> None:
    with edge(gw, tmp_path, hosts=("llm.example.com", "*.corp.example")) as url:
        for host in ("llm.example.com", "LLM.example.com:8443", "a.corp.example", "a.b.corp.example", "127.0.0.1"):
            assert httpx.get(url + "/api/tags", headers=gw.auth | {"Host": host}).status_code == 200, host
        for host in ("example.com", "xllm.example.com", "corp.example", "xcorp.example", "a.corp.example.evil.example"):
            assert httpx.get(url + "/api/tags", headers=gw.auth | {"Host": host}).status_code == 421, host


def test_who_may_be_called_by_which_name_where_nobody_says() -> None:
    assert edge_hosts(EdgeSettings()) == ()
    assert edge_hosts(EdgeSettings(host="0.0.0.0", plaintext=True)) == ("*",)
    assert edge_hosts(EdgeSettings(host="0.0.0.0", plaintext=True, hosts=("a.example",))) == ("a.example",)


@pytest.mark.parametrize("host", ["a b", "http://a", "a:80", "A.example", "*.*", "a\n    http-request allow", "", "*a"])
def test_a_host_that_cannot_be_one_stops_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        EdgeSettings(hosts=(host,))


@pytest.mark.parametrize("origin", ["a.example", "https://a b", "https://a/x", "https://", "*", "https://a\n acl x"])
def test_an_origin_that_cannot_be_one_stops_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="origin"):
        EdgeSettings(origins=(origin,))


# -- row 14: pages of other origins


def preflight(url: str, origin: str) -> httpx.Response:
    """What a browser asks before a page's request with a key."""
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.request("OPTIONS", url + "/v1/chat/completions", headers={"Origin": origin} | wanted)


def sharing(answer: httpx.Response) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control-")]


def test_on_loopback_no_page_of_the_web_is_served(gw: Gateway) -> None:
    before = len(gw.nodes[0].requests) + len(gw.nodes[1].requests)
    for origin in ("https://evil.example", "https://localhost.evil.example", "http://evil.example:8080", "null"):
        asked = preflight(gw.edge, origin)
        assert (asked.status_code, sharing(asked)) == (403, [])
        answer = httpx.post(gw.edge + "/api/chat", json=gw.chat(), headers=gw.auth | {"Origin": origin})
        assert (answer.status_code, sharing(answer)) == (403, []), origin
        assert "edge.origins" in answer.json()["error"]["message"]
    assert before == len(gw.nodes[0].requests) + len(gw.nodes[1].requests)
    for origin in ("http://localhost:3000", "http://127.0.0.1:8090", gw.edge):
        answer = httpx.get(gw.edge + "/api/tags", headers=gw.auth | {"Origin": origin})
        assert (answer.status_code, sharing(answer)) == (200, []), origin


def test_beyond_loopback_cors_is_off_by_default(gw: Gateway, tmp_path: Path) -> None:
    with edge(gw, tmp_path, hosts=("*",)) as url:
        asked = preflight(url, "https://evil.example")
        assert (asked.status_code, sharing(asked)) == (404, [])
        answer = httpx.get(url + "/api/tags", headers=gw.auth | {"Origin": "https://evil.example"})
        assert (answer.status_code, sharing(answer)) == (200, [])


def test_with_origins_named_those_read_answers_and_others_get_a_403(gw: Gateway, tmp_path: Path) -> None:
    good = "https://app.example.com"
    with edge(gw, tmp_path, origins=(good, "http://other.example:81")) as url:
        asked = preflight(url, good)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (204, good)
        assert asked.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        answer = httpx.post(url + "/api/chat", json=gw.chat(stream=False), headers=gw.auth | {"Origin": good})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, good)
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        own = httpx.get(url + "/api/tags", headers=gw.auth | {"Origin": url})
        assert (own.status_code, sharing(own)) == (200, [])
        assert httpx.get(url + "/api/tags", headers=gw.auth).status_code == 200
        before = len(gw.nodes[0].requests) + len(gw.nodes[1].requests)
        for origin in (
            "https://evil.example",
            "https://app.example.com.evil.example",
            "null",
            "http://app.example.com",
        ):
            assert preflight(url, origin).status_code == 403
            answer = httpx.post(url + "/api/chat", json=gw.chat(), headers=gw.auth | {"Origin": origin})
            assert (answer.status_code, sharing(answer)) == (403, []), origin
        two = [("Origin", good), ("Origin", "https://evil.example"), *gw.auth.items()]
        assert httpx.get(url + "/api/tags", headers=two).status_code == 403
        assert before == len(gw.nodes[0].requests) + len(gw.nodes[1].requests)


def test_the_front_end_without_keys_serves_no_page_of_the_web(gw: Gateway, tmp_path: Path) -> None:
    port = free_port()
    with edge(gw, tmp_path, ollama=("127.0.0.1", port), hosts=("*",)):
        url = f"http://127.0.0.1:{port}"
        until(lambda: httpx.get(url + "/api/version").status_code == 200, "it serves")
        body = json.dumps(gw.chat()).encode()
        plain = {"Content-Type": "text/plain"}
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
            answer = httpx.post(url + "/api/chat", content=body, headers=plain | headers)
            assert answer.status_code == (421 if "Host" in headers else 403)
        for origin in ("http://localhost:3000", "http://127.0.0.1", url):
            assert httpx.post(url + "/api/chat", content=body, headers={"Origin": origin}).status_code == 200, origin
