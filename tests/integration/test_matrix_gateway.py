"""Every route by every role by every way to write its path, at a gateway and at the edge: denied unless allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from support.gateway import Gateway, gateway
from support.tricks import absolute, ask, tricks

from corral.gateway import route
from corral.store import keys

NODE, FLEET, OPEN, LATER = "a key, from a node", "a key, without a node", "anyone", "nobody yet"
WHO = {
    ("POST", "/api/generate"): NODE,
    ("POST", "/api/chat"): NODE,
    ("POST", "/api/embed"): NODE,
    ("POST", "/api/embeddings"): NODE,
    ("POST", "/api/show"): NODE,
    ("GET", "/api/tags"): FLEET,
    ("GET", "/api/ps"): FLEET,
    ("GET", "/api/version"): FLEET,
    ("POST", "/v1/chat/completions"): NODE,
    ("POST", "/v1/completions"): NODE,
    ("POST", "/v1/embeddings"): NODE,
    ("GET", "/v1/models"): FLEET,
    ("GET", "/v1/models/m"): FLEET,
    ("POST", "/v1/messages"): NODE,
    ("POST", "/v1/responses"): LATER,
    ("POST", "/v1/messages/count_tokens"): LATER,
    ("GET", "/health"): OPEN,
    ("GET", "/health/ready"): OPEN,
}
"""Who gets an answer of each route, and whether a node is asked for it."""
# What Ollama 0.17 serves besides: what manages a node, and what is new.
OLLAMA = [
    *[("POST", path) for path in ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/blobs/sha256:00")],
    *[("HEAD", path) for path in ("/api/blobs/sha256:00", "/", "/api/tags", "/api/version")],
    *[("DELETE", "/api/delete"), ("POST", "/api/delete"), ("POST", "/api/me"), ("POST", "/api/signout")],
    *[("DELETE", "/api/user/keys/k"), ("GET", "/"), ("POST", "/v1/images/generations"), ("GET", "/v1/models/")],
    *[("POST", "/api/experimental/web_search"), ("POST", "/api/experimental/web_fetch"), ("GET", "/debug/pprof/")],
    *[("POST", "/api/web_search"), ("GET", "/api/status"), ("POST", "/v1/images/edits"), ("POST", "/v1/audio/speech")],
]
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
MAY = ("inference", "operator", "admin")
NOBODY = ("none", "nonsense", "unknown", "revoked", "expired", "elsewhere")


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as made:
        yield made


@pytest.fixture(scope="module")
def roles(gw: Gateway) -> dict[str, str]:
    """The text of a key of each kind; "" for none."""
    made = {role: gw.new_key(role=role, rpm=None, concurrency=None) for role in MAY}
    made |= {"revoked": gw.new_key(revoked=True), "expired": gw.new_key(expires=1.0)}
    made |= {"elsewhere": gw.new_key(networks=["192.0.2.0/24"]), "unknown": keys.generate()[1]}
    return made | {"none": "", "nonsense": "crl_nonsense"}


def port(url: str) -> int:
    return urlsplit(url).port or 0


def heard(gw: Gateway) -> int:
    """How many requests nodes have heard of, and forget them."""
    count = sum(len(node.requests) for node in gw.nodes)
    for node in gw.nodes:
        node.requests.clear()
    return count


BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 5}


def body(method: str) -> object:
    return BODY if method == "POST" else None


def sent(text: str, header: str) -> dict[str, str]:
    if not text:
        return {}
    return {header: text if header == "x-api-key" else f"Bearer {text}"}


@pytest.mark.parametrize("where", ["gateway", "edge"])
@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
@pytest.mark.parametrize(("method", "path"), WHO, ids=lambda part: part)
def test_a_route_is_for_keys_that_work(
    gw: Gateway, roles: dict[str, str], method: str, path: str, header: str, where: str
) -> None:
    at = port(gw.url if where == "gateway" else gw.edge)
    who = WHO[(method, path)]
    heard(gw)
    for role in NOBODY:
        status = ask(at, method, path, sent(roles[role], header), body(method))
        want = {OPEN: 200, LATER: 501}.get(who, 403 if role == "elsewhere" else 401)
        assert status == want, role
    assert heard(gw) == 0
    for role in MAY:
        status = ask(at, method, path, sent(roles[role], header), body(method))
        # The nodes of this test answer as a chat does: other routes find no sense in it.
        assert status in {OPEN: {200}, LATER: {501}, FLEET: {200}, NODE: {200, 502}}[who], role
    assert (heard(gw) > 0) == (who == NODE)


@pytest.mark.parametrize("where", ["gateway", "edge"])
@pytest.mark.parametrize("role", [*MAY, *NOBODY])
def test_no_other_way_to_write_it_reaches_a_node(gw: Gateway, roles: dict[str, str], role: str, where: str) -> None:
    at = port(gw.url if where == "gateway" else gw.edge)
    headers = sent(roles[role], "Authorization")
    heard(gw)
    passed = []
    for method, path in [one for one in (*WHO, *OLLAMA) if not one[1].endswith("/")]:
        for target in (*tricks(path), *([absolute(path)] if where == "gateway" else []), path + "?a=b"):
            status = ask(at, method, target, headers, body(method))
            if status not in (400, 404, 0):
                passed.append((method, target, status))
    assert passed == []
    assert heard(gw) == 0


@pytest.mark.parametrize("where", ["gateway", "edge"])
@pytest.mark.parametrize("role", [*MAY, "none", "revoked"])
def test_what_manages_a_node_is_not_there(gw: Gateway, roles: dict[str, str], role: str, where: str) -> None:
    at = port(gw.url if where == "gateway" else gw.edge)
    headers = sent(roles[role], "Authorization")
    heard(gw)
    for method, path in OLLAMA:
        assert ask(at, method, path, headers, body(method)) in (404, 0), (method, path)
    for path in {path for _, path in (*WHO, *OLLAMA)}:
        for method in METHODS:
            if (method, path) not in WHO:
                assert ask(at, method, path, headers, body(method)) in (400, 404, 405, 0), (method, path)
    assert heard(gw) == 0


def test_a_credential_comes_once_and_in_one_of_two_headers(gw: Gateway, roles: dict[str, str]) -> None:
    at, good = port(gw.url), roles["inference"]
    heard(gw)
    for role in ("nonsense", "unknown", "revoked", "admin"):
        both = {"Authorization": f"Bearer {good}", "x-api-key": roles[role]}
        assert ask(at, "POST", "/api/chat", both, body("POST")) == 400
        assert ask(at, "POST", "/api/chat", {**both, "Authorization": "Basic x"}, body("POST")) == 401
        turned = {"Authorization": f"Bearer {roles[role]}", "x-api-key": good}
        assert ask(at, "POST", "/api/chat", turned, body("POST")) == 400
    for name in ("Proxy-Authorization", "api-key", "X_API_KEY", "X-Auth-Token", "X-Corral-Key"):
        assert ask(at, "POST", "/api/chat", {name: f"Bearer {good}"}, body("POST")) == 401, name
    assert ask(at, "POST", "/api/chat", {"Cookie": f"Authorization=Bearer {good}"}, body("POST")) == 401
    for twice in ("Authorization", "authorization", "x-api-key"):
        value = good if twice == "x-api-key" else f"Bearer {good}"
        assert ask(at, "POST", "/api/chat", {"Authorization": f"Bearer {good}\r\n{twice}: {value}"}) in (400, 401)
    assert heard(gw) == 0
    same = {"Authorization": f"Bearer {good}", "x-api-key": good}
    assert ask(at, "POST", "/api/chat", same, body("POST")) == 200


@pytest.mark.parametrize("host", ["x/health?a=", "x/health", "/health", "node-1:11434", "x/api/tags#"])
def test_the_host_header_opens_nothing(gw: Gateway, roles: dict[str, str], host: str) -> None:
    heard(gw)
    for (method, path), who in WHO.items():
        if who in (NODE, FLEET):
            assert ask(port(gw.url), method, path, {"Host": host}, body(method)) in (400, 401), path
            assert ask(port(gw.edge), method, path, {"Host": host}, body(method)) in (400, 401), path
    for method, path in (("POST", "/api/pull"), ("GET", "/admin/keys")):
        status = ask(port(gw.url), method, path, {"Host": host, **sent(roles["admin"], "Authorization")}, body(method))
        assert status in (400, 404)
    assert heard(gw) == 0


def test_the_matrix_knows_every_route() -> None:
    there = {(method.decode(), path.decode()) for method, path in route._ROUTES}
    assert WHO.keys() == there | {("GET", "/v1/models/m")}
    assert all(re.fullmatch(r"/[a-z0-9/_-]+", path) for _, path in WHO)
