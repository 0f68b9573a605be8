"""Nodes that answer what no node should: each fails itself, and control goes on with everything else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from support.control import FakeNode, Running, make_key, until
from support.process import free_port

from corral.control import prober

MODEL = '{"name":"m:latest","digest":"d","size":1}'
HONEST = {
    "/api/ps": b'{"models":[]}',
    "/api/tags": b'{"models":[' + MODEL.encode() + b"]}",
    "/api/version": b'{"version":"0.17.4"}',
}
DEEP = b"[" * 5000 + b"]" * 5000


def tags(entry: str) -> dict[str, bytes]:
    return {"/api/tags": b'{"models":[' + entry.encode() + b"]}"}


LIES = {
    "surrogate-name": (tags(r'{"name":"x\ud800:latest"}'), "/api/tags"),
    "surrogate-details": (tags(r'{"name":"m","details":{"family":"\udfff"}}'), "/api/tags"),
    "surrogate-key": (tags(r'{"name":"m","\udfff":1}'), "/api/tags"),
    "no-utf8": ({"/api/tags": b'{"models":[{"name":"\xff"}]}'}, "UTF-8"),
    "control-character": (tags(r'{"name":"a\nb"}'), "name"),
    "ends-in-newline": (tags(r'{"name":"a\n"}'), "name"),
    "empty-name": (tags('{"name":""}'), "name"),
    "long-name": (tags('{"name":"' + "a" * 257 + '"}'), "name"),
    "no-name": (tags("{}"), "name"),
    "name-is-a-number": (tags('{"name":5}'), "name"),
    "size-is-negative": (tags('{"name":"m","size":-1}'), "size"),
    "size-is-text": (tags('{"name":"m","size":"big"}'), "size"),
    "size-is-1e400": (tags('{"name":"m","size":1e400}'), "range"),
    "other-is-1e400": (tags('{"name":"m","details":{"a":1e400}}'), "range"),
    "deep-tags": (tags('{"name":"m","details":' + DEEP.decode() + "}"), "/api/tags"),
    "models-is-a-number": ({"/api/tags": b'{"models":5}'}, "models"),
    "too-many-models": (tags(",".join(f'{{"name":"m{n}"}}' for n in range(5000))), "models"),
    "deep-ps": ({"/api/ps": b'{"models":' + DEEP + b"}"}, "/api/ps"),
    "deep-unclosed-ps": ({"/api/ps": b'{"models":[{"name":"m","a":' + b'{"a":' * 50000}, "/api/ps"),
    "array-ps": ({"/api/ps": b"[1]"}, "/api/ps"),
    "null-ps": ({"/api/ps": b"null"}, "/api/ps"),
    "empty-ps": ({"/api/ps": b""}, "/api/ps"),
    "nan-ps": ({"/api/ps": b'{"models":[{"name":"m","a":NaN}]}'}, "/api/ps"),
    "huge-ps": ({"/api/ps": b'{"models":[],"a":"' + b"a" * (5 << 20) + b'"}'}, "longer than"),
    "version-no-ascii": ({"/api/version": '{"version":"0.²"}'.encode()}, "/api/version"),
    "version-is-a-number": ({"/api/version": b'{"version":5}'}, "version"),
    "version-deep": ({"/api/version": b'{"version":' + DEEP + b"}"}, "/api/version"),
    "version-long": ({"/api/version": b'{"version":"' + b"1" * 5000 + b'"}'}, "version"),
}
RESIDENT = {"/api/ps": b'{"models":[' + MODEL.encode() + b"]}"}
UNANSWERED = {
    "deep": b'{"response":' + DEEP + b"}",
    "surrogate": rb'{"response":"\ud800"}',
    "huge": b'{"response":"' + b"a" * (5 << 20) + b'"}',
    "array": b"[1]",
    "1e400": b'{"eval_count":1e400}',
    "error": b'{"error":{"a":1}}',
}


class Liar:
    """Answers as `answers` says; an honest node until then."""

    def __init__(self) -> None:
        self.answers = dict(HONEST)
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = liar.answers.get(self.path, b"{}")
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # control hangs up on what is too long

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Site:
    """A control with one honest node (node-1), a liar for each lie, and one for each lie of a generation."""

    def __init__(self, state: Path) -> None:
        self.honest = FakeNode()
        self.liars = {name: Liar() for name in (*LIES, *(f"generate-{name}" for name in UNANSWERED))}
        for name in UNANSWERED:
            self.liars[f"generate-{name}"].answers |= RESIDENT | {"/api/generate": UNANSWERED[name]}
        self.port = free_port()
        nodes = [{"name": name, "url": liar.url} for name, liar in self.liars.items()]
        self.control = Running(
            state,
            nodes=[{"name": "node-1", "url": self.honest.url}, *nodes],
            control={"metrics": f"127.0.0.1:{self.port}"},
        )

    def lie(self) -> None:
        # A version is asked of a node that comes back.
        returning = [name for name in LIES if name.startswith("version")]
        for name in returning:
            self.liars[name].answers["/api/ps"] = b"-"
        until("they are away", lambda: all(self.control.node(name)["state"] == "down" for name in returning))
        for name, (answers, _) in LIES.items():
            self.liars[name].answers = HONEST | answers

    def close(self) -> None:
        self.control.close()
        for node in (self.honest, *self.liars.values()):
            node.close()


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Forty nodes in one process may be slow to answer; what is told here is what they say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prober, "TIMEOUT", 20.0)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("lies") / "state")
    try:
        until("all answer", lambda: all(made.control.node(name)["state"] == "ready" for name in made.liars))
        made.lie()
        yield made
    finally:
        made.close()


def whole(control: Running) -> None:
    """Control serves: the snapshot, a new key in it, and the honest node."""
    made = make_key(control, name="made")
    snapshot = control.snapshot()
    assert snapshot.status_code == 200
    assert made["id"] in [key["id"] for key in json.loads(snapshot.content)["keys"]]
    assert control.node("node-1")["state"] == "ready"
    for path in ("/admin/models", "/admin/status"):
        assert control.admin.get(path).status_code == 200, path


@pytest.mark.parametrize("name", LIES)
def test_a_lie_fails_its_own_node_alone(site: Site, name: str) -> None:
    control = site.control

    def down() -> bool:
        node = control.node(name)
        return node["state"] == "down" and LIES[name][1] in node["error"]

    until("it is down, and why", down)
    whole(control)
    site.liars[name].answers = dict(HONEST)
    until("it is back", lambda: control.node(name)["state"] == "ready")
    assert control.admin.delete(f"/admin/nodes/{name}", params={"wait": 0}).status_code == 200
    site.liars[name].answers |= LIES[name][0]
    answer = control.admin.post("/admin/nodes", json={"name": name, "url": site.liars[name].url})
    assert (answer.status_code, answer.json()["state"]) == (201, "down"), answer.text
    assert LIES[name][1] in answer.json()["error"]
    assert control.admin.delete(f"/admin/nodes/{name}", params={"wait": 0}).status_code == 200
    whole(control)


@pytest.mark.parametrize("name", UNANSWERED)
def test_a_canary_that_is_answered_with_a_lie_fails_alone(site: Site, name: str) -> None:
    page = f"http://127.0.0.1:{site.port}/metrics/nodes/generate-{name}"
    until("it fails", lambda: "corral_node_canary_success 0.0" in httpx.get(page, trust_env=False).text)
    assert site.control.node(f"generate-{name}")["state"] == "ready"
    whole(site.control)


def test_control_starts_with_liars(tmp_path: Path) -> None:
    made = {name: Liar() for name in ("deep-ps", "surrogate-name")}
    for name, liar in made.items():
        liar.answers |= LIES[name][0]
    honest = FakeNode()
    nodes = [{"name": name, "url": liar.url} for name, liar in made.items()]
    control = Running(tmp_path / "state", nodes=[{"name": "node-1", "url": honest.url}, *nodes])
    try:
        whole(control)
        for name in made:
            assert control.node(name)["state"] == "down"
            assert control.admin.delete(f"/admin/nodes/{name}", params={"wait": 0}).status_code == 200
    finally:
        control.close()
        for node in (honest, *made.values()):
            node.close()
