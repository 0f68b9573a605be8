"""A control in a thread, nodes that do as a test says, and a real HAProxy before them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.config.haproxy import HaproxyPlan, render
from corral.config.settings import Settings
from corral.control.bootstrap import bootstrap
from corral.control.haproxy import binary
from corral.control.main import server
from corral.store.actions import COMMAND
from support.process import free_port

WITHIN = 60.0


def until(what: str, holds: Callable[[], Any], within: float = WITHIN) -> Any:
    """Ask until it holds; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        late = time.monotonic() > deadline  # before the look: one that began in time counts
        if value := holds():
            return value
        assert not late, f"not within {within:g} s: {what}"
        time.sleep(0.02)


class FakeNode:
    """Answers /api/ps, /api/tags and /api/version, and counts what it is asked; ``broken`` makes it answer 500.

    /api/hold is answered once `release` is set. What would change it is heard, and answered 501, unless it is
    ``obedient``; a pull of `held:latest` once `release` is set.
    """

    def __init__(self, obedient: bool = False) -> None:
        self.tags, self.ps, self.broken, self.asked = ["m:latest"], [], False, []
        self.obedient = obedient
        self.release = threading.Event()
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                node.asked.append(self.path)
                if self.path == "/api/hold":
                    node.release.wait(WITHIN)
                models = {"/api/tags": node.tags, "/api/ps": node.ps}.get(self.path, [])
                listed = {"models": [{"name": name, "digest": "d", "size": 1} for name in models]}
                value = {"version": "0.17.4"} if self.path == "/api/version" else listed
                body = json.dumps(value).encode()
                self.send_response(500 if node.broken else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                node.asked.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path == "/api/pull" and b"held:latest" in body:
                    node.release.wait()
                with contextlib.suppress(BrokenPipeError):  # who asked has left meanwhile
                    if not node.obedient:
                        self.send_error(501)
                        return
                    answer = json.dumps(node.obey(self.path, json.loads(body))).encode()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            do_DELETE = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def obey(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Do what Ollama would with a model; each that it gets has the same digest."""
        model = wanted.get("destination") or wanted.get("model")
        if path in ("/api/pull", "/api/copy"):
            self.tags = [*(one for one in self.tags if one != model), model]
        elif path == "/api/delete":
            self.tags = [one for one in self.tags if one != model]
        elif "keep_alive" in wanted:
            self.ps = [one for one in self.ps if one != model] + ([model] if wanted["keep_alive"] else [])
        return {"status": "success"}

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Running:
    """A control that runs in a thread. ``admin`` and ``internal`` are clients with their credentials."""

    def __init__(self, state: Path, **sections: Any) -> None:
        port = free_port()
        control = {"listen": f"127.0.0.1:{port}", "metrics": "", "state": state, **sections.pop("control", {})}
        store = {"valkey": "redis://127.0.0.1:1/0", **sections.pop("store", {})}
        self.settings = Settings.model_validate({"control": control, "store": store, **sections})
        self.state = state
        bootstrap(state, self.settings)
        self._server = server(self.settings)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until("control serves", lambda: self._server.started or not self._thread.is_alive())
        self.url = f"http://127.0.0.1:{port}"
        self.admin = self.client((state / "admin.key").read_text().strip())
        self.internal = self.client((state / "internal.token").read_text().strip())

    def client(self, credential: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=WITHIN)

    def snapshot(self, gateway: str = "", since: str = "") -> httpx.Response:
        headers = {"X-Corral-Gateway": gateway} if gateway else {}
        return self.internal.get("/internal/snapshot", params={"since": since}, headers=headers)

    def node(self, name: str = "node-1") -> dict[str, Any]:
        return next(node for node in self.admin.get("/admin/nodes").json()["nodes"] if node["name"] == name)

    def close(self) -> None:
        self.admin.close()
        self.internal.close()
        self._server.should_exit = True
        self._thread.join(WITHIN)
        assert not self._thread.is_alive()


def make_key(control: Running, **fields: Any) -> dict[str, Any]:
    answer = control.admin.post("/admin/keys", json={"name": "k", "new_tenant": "tenant" in fields, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def recorded(client: httpx.Client) -> list[dict[str, Any]]:
    """What the audit trail shows to a caller, but for reads of the admin API that were answered, counts of them, and
    what commands did (control's start has made a key)."""
    rows = client.get("/admin/audit", params={"limit": 1000}).json()["audit"]
    left_out = ("GET", "", COMMAND)
    return [row for row in rows if row["api"] != "admin" or row["method"] not in left_out or row["status"] >= 400]


@contextlib.contextmanager
def haproxy(state: Path, node: FakeNode) -> Iterator[tuple[HaproxyPlan, Path]]:
    """A real HAProxy that knows `node` as node-1, as `corral up` starts it; its plan and master socket."""
    program = binary()
    if program is None:
        pytest.skip("HAProxy is not installed")
    run = state / "run"
    run.mkdir(parents=True)
    plan = HaproxyPlan(
        *("127.0.0.1", free_port(), "127.0.0.1", free_port(), "127.0.0.1", free_port(), str(run / "stats.sock")),
        gateways=[("gateway-1", "127.0.0.1", free_port())],
        control=("127.0.0.1", free_port()),
        nodes=[("node-1", node.url)],
        max_duration=60.0,
    )
    (run / "haproxy.json").write_text(json.dumps(dataclasses.asdict(plan)))
    (run / "haproxy.cfg").write_text(render(plan))
    master = run / "master.sock"
    with (run / "haproxy.log").open("wb") as log:
        argv = [program, "-W", "-S", f"{master},mode,600", "-f", str(run / "haproxy.cfg")]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        yield plan, master
    finally:
        process.terminate()
        process.wait(WITHIN)
