"""Admin calls while control's disk is full: what cannot be recorded does not happen, and is a clear 503."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from sqlalchemy import text
from support.control import FakeNode, Running, haproxy
from support.process import Process, free_port, until
from support.servers import python_env

from corral.cli.main import cli
from corral.store.database import Database, resolve
from corral.store.spool import encode_frame
from corral.store.tables import metadata

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system of its own")


class Small:
    """A control whose state folder is on a disk of its own, of 12 MiB: its database's journal alone may have four."""

    def __init__(self, folder: Path, nodes: list[FakeNode]) -> None:
        port = free_port()
        self._folder = state = folder / "state"
        state.mkdir()
        settings = {
            "control": {"listen": f"127.0.0.1:{port}", "metrics": "", "state": str(state)},
            "store": {"valkey": "redis://127.0.0.1:1/0"},
            "audit": {"checkpoint": "200ms"},
            "nodes": [{"name": f"node-{number}", "url": node.url} for number, node in enumerate(nodes, 1)],
            "models": [{"name": "m:latest"}],
        }
        (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
        argv = [sys.executable, "-m", "corral", "serve", "control", "--config", str(folder / "corral.yaml")]
        mount = f"mount -t tmpfs -o size=12m state '{state}' && exec \"$@\""
        argv = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *argv]
        self.process = Process(argv, folder / "control.log", python_env())
        self.url = f"http://127.0.0.1:{port}"
        self.process.wait_until(self._up)
        self.state = Path(f"/proc/{self.process.pid}/root{state}")
        self._filler = self.state / "filler"
        self.key = (self.state / "admin.key").read_text().strip()
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False, timeout=60
        )

    def _up(self) -> bool:
        try:
            return httpx.get(self.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def fill(self) -> None:
        """Leave no byte of the disk, nor of what files have as room."""
        with self._filler.open("wb", buffering=0) as file:
            for size in (65536, 64):
                with pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(b"x" * size)
        # What is left in the database's own journal is used up by what is recorded until it is full.
        until(lambda: all(self.client.get("/admin/keys").status_code == 503 for _ in range(5)), "it is full")

    def refuse(self) -> None:
        """Have the database take all but records: what is written apart from its record would be done."""
        self.ask("CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no record'); END")

    def free(self) -> None:
        """Give the room back, and take records again."""
        self._filler.unlink(missing_ok=True)
        self.ask("DROP TRIGGER IF EXISTS refuse")

    def ask(self, statement: str) -> list[Any]:
        """What the database says, asked where its disk is."""
        script = (
            "import json, sqlite3, sys\nprint(json.dumps(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall()))"
        )
        argv = ["nsenter", "--target", str(self.process.pid), "--user", "--mount", "--preserve-credentials"]
        place = str(self._folder / "corral.db")
        done = subprocess.run([*argv, sys.executable, "-c", script, place, statement], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    def rows(self) -> list[dict[str, Any]]:
        """All records, read while that can be recorded."""
        answer = self.client.get("/admin/audit", params={"limit": 1000})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["audit"])


@pytest.fixture
def nodes() -> Iterator[list[FakeNode]]:
    """Four nodes of the fleet and one that is added."""
    made = [FakeNode() for _ in range(5)]
    for one in made:
        one.tags, one.ps = ["m:latest", "old:latest"], ["m:latest"]
    yield made
    for one in made:
        one.close()


@pytest.fixture
def small(tmp_path: Path, nodes: list[FakeNode]) -> Iterator[Small]:
    made = Small(tmp_path, nodes[:4])
    yield made
    made.client.close()
    made.process.end()


class Gateway:
    """Asks control for its snapshot as a gateway does; one request runs on it, which ends when it is told so."""

    def __init__(self, small: Small) -> None:
        token = (small.state / "internal.token").read_text().strip()
        self.told: list[str] = []
        self._client = httpx.Client(
            base_url=small.url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        known, told = "", []
        while not self._over.wait(0.05):
            shown = self._client.get(
                "/internal/snapshot", params={"since": known}, headers={"X-Corral-Gateway": "gateway-1"}
            )
            known = shown.json()["version"] if shown.status_code == 200 else known
            asked = self._client.post("/internal/requests/gateway-1", json=told).json()["questions"]
            told = [{"number": one["number"], "value": self._answer(one["what"])} for one in asked]

    def _answer(self, what: str) -> Any:
        self.told.append(what)
        if what == "cancel":
            return True
        return {"requests": [RUNNING], "total": 1}

    def ship(self, *records: dict[str, Any]) -> None:
        data = b"".join(encode_frame(record) for record in records)
        path = "/internal/spool/gateway-1/0000000000000001.seg"
        assert self._client.post(path, params={"offset": 0}, content=data).status_code == 200

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()


RUNNING = {
    **{"id": "running-1", "request_id": "mine", "key": "k", "tenant": "default", "route": "/api/chat", "tokens": 1},
    **{"model": "m:latest", "state": "running", "position": None, "waited": 0.0, "node": "node-1", "attempts": 1},
    **{"age": 1.0, "ticket": None},
}
ENDED = {
    "t": "settle",
    "id": "ended-1",
    "api": "native",
    "request_id": "ended",
    "ts": 1.5,
    "outcome": "ok",
    "tokens": 1,
}
DIGEST = f"sha256:{'a' * 64}"
# The record's own, and the lease of who leads, which is renewed.
APART = {"audit", "audit_streams", "audit_checkpoints", "leases"}


def state(small: Small, nodes: list[FakeNode]) -> dict[str, Any]:
    """All that admin calls could change, as it is now: the database but for the record, nodes, and what they do."""
    asked = {path: small.client.get(f"/admin/{path}").json() for path in ("models", "nodes", "operations")}
    found: dict[str, Any] = {"held": asked["models"]["models"]}
    found["begun"] = [one["id"] for one in asked["operations"]["operations"]]
    found |= {one["name"]: (one["state"], one["url"]) for one in asked["nodes"]["nodes"]}
    found |= {node.url: (list(node.tags), list(node.ps)) for node in nodes}
    tables = [table for table in metadata.tables.values() if table.name not in APART]
    columns = [", ".join(column.name for column in table.c if column.name != "last_used") for table in tables]
    for table, names in zip(tables, columns, strict=True):
        found[table.name] = small.ask(f"SELECT {names} FROM {table.name} ORDER BY {names}")
    return found


def made_ready(
    small: Small, gateway: Gateway, nodes: list[FakeNode]
) -> dict[tuple[str, str], Callable[[], httpx.Response]]:
    """What each route that changes something has to act on, and a call of each: all of them would be done."""
    client = small.client

    def does(method: str, path: str, body: Any = None, **query: Any) -> Callable[[], httpx.Response]:
        return lambda: client.request(method, f"/admin/{path}", json=body, params=query)

    def done(method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        answer = does(method, path, body, **query)()
        assert answer.status_code in (200, 201, 202), answer.text
        return dict(answer.json())

    names = ("rotated", "changed", "revoked", "deleted")
    keys = {name: done("POST", "keys", {"name": name, "tenant": "team", "new_tenant": True})["id"] for name in names}
    done("POST", "tenants", {"name": "idle"})
    done("POST", "models/disable", {"models": ["off"]})
    done("POST", "nodes/node-3/drain")
    # A digest on record, and an operation of control's own, which is in no caller's way.
    stated = {"name": "old:latest", "digest": DIGEST}
    done("PUT", "models/catalogue", [{"name": "m:latest"}, stated])
    done("POST", "nodes/node-2/drain")
    done("PUT", "models/catalogue", [{"name": "m:latest"}, {"name": "held:latest"}])
    done("POST", "nodes/node-2/resume")
    until(lambda: "/api/pull" in nodes[1].asked, "node-2 is pulling")
    done("PUT", "models/catalogue", [{"name": "m:latest"}])
    (pull,) = [one["id"] for one in client.get("/admin/operations").json()["operations"] if not one["ended"]]
    gateway.ship(ENDED)
    until(lambda: len(client.get("/admin/requests").json()["requests"]) == 1, "the gateway is heard")
    here = {"nodes": ["node-1"]}
    return {
        ("POST", "/admin/operations/{operation}/cancel"): does("POST", f"operations/{pull}/cancel"),
        ("POST", "/admin/requests/{request}/cancel"): does("POST", "requests/running-1/cancel"),
        ("POST", "/admin/audit/compare"): does("POST", "audit/compare", {"request": "ended", "prompt": ["0" * 64]}),
        ("POST", "/admin/keys"): does("POST", "keys", {"name": "more"}),
        ("PATCH", "/admin/keys/{key}"): does("PATCH", f"keys/{keys['changed']}", {"rpm": 5}),
        ("POST", "/admin/keys/{key}/rotate"): does("POST", f"keys/{keys['rotated']}/rotate"),
        ("POST", "/admin/keys/{key}/revoke"): does("POST", f"keys/{keys['revoked']}/revoke"),
        ("DELETE", "/admin/keys/{key}"): does("DELETE", f"keys/{keys['deleted']}"),
        ("POST", "/admin/tenants"): does("POST", "tenants", {"name": "new"}),
        ("PATCH", "/admin/tenants/{tenant}"): does("PATCH", "tenants/team", {"rpm": 5}),
        ("DELETE", "/admin/tenants/{tenant}"): does("DELETE", "tenants/idle"),
        ("POST", "/admin/models/apply"): does("POST", "models/apply"),
        ("POST", "/admin/models/remove"): does("POST", "models/remove", {"models": ["old"]}),
        ("POST", "/admin/models/pull"): does("POST", "models/pull", {"models": ["other"], **here}),
        ("POST", "/admin/models/load"): does("POST", "models/load", {"models": ["old"], **here}),
        ("POST", "/admin/models/preload"): does("POST", "models/preload", {"models": ["old"], **here}),
        ("POST", "/admin/models/unload"): does("POST", "models/unload", {"models": ["m"], **here}),
        ("POST", "/admin/models/disable"): does("POST", "models/disable", {"models": ["m"]}),
        ("POST", "/admin/models/enable"): does("POST", "models/enable", {"models": ["off"]}),
        ("PUT", "/admin/models/catalogue"): does("PUT", "models/catalogue", [{"name": "n:latest", "digest": DIGEST}]),
        ("POST", "/admin/nodes"): does("POST", "nodes", {"url": nodes[4].url, "name": "node-5"}),
        ("POST", "/admin/nodes/{name}/drain"): does("POST", "nodes/node-1/drain"),
        ("POST", "/admin/nodes/{name}/resume"): does("POST", "nodes/node-3/resume"),
        ("DELETE", "/admin/nodes/{name}"): does("DELETE", "nodes/node-4", wait=0),
    }


@pytest.mark.parametrize("begin", [Small.fill, Small.refuse], ids=["full", "no records"])
def test_what_cannot_be_recorded_does_not_happen(
    small: Small, nodes: list[FakeNode], begin: Callable[[Small], None]
) -> None:
    client, gateway = small.client, Gateway(small)
    try:
        changes = made_ready(small, gateway, nodes)
        page = client.get("/openapi.json").json()["paths"].items()
        admin = {(method.upper(), path) for path, methods in page for method in methods if path.startswith("/admin/")}
        every = {(method, path) for method, path in admin if method != "GET"}
        assert changes.keys() == every, "each route that changes something is tried"
        before, known = state(small, nodes), {row["id"] for row in small.rows()}
        assert [row[:2] for row in before["models"]] == [["old:latest", DIGEST]], (
            "apply would record a digest, remove forget one"
        )
        for node in nodes:
            node.asked.clear()
        begin(small)
        try:
            for what, change in changes.items():
                answer = change()
                told = (answer.status_code, answer.json()["error"]["code"])
                assert told == (503, "database_unavailable"), f"{what}: {answer.text}"
                assert answer.headers["retry-after"] in ("1", "2")
                assert "not recorded" in answer.text
            for path in ("keys", "tenants", "audit", "usage"):
                shown = client.get(f"/admin/{path}")
                assert (shown.status_code, "not recorded" in shown.text, "team" in shown.text) == (503, True, False)
            assert client.get("/admin/status").status_code == 200, "what machines do is shown without a record"
            for node in nodes:
                asked = [path for path in node.asked if path not in ("/api/ps", "/api/tags", "/api/version")]
                assert asked == [], "a node was told to do something"
            assert "cancel" not in gateway.told
        finally:
            small.free()
        until(lambda: client.get("/admin/keys").status_code == 200, "it works again")
        after = state(small, nodes)
        assert {name: after[name] for name in after if after[name] != before.get(name)} == {}
        new = [row for row in small.rows() if row["id"] not in known]
        assert {row["method"] for row in new if row["status"] < 400} == {"GET"}, new
        for what, change in changes.items():
            answer = change()
            assert answer.status_code in (200, 201, 202), f"{what}: {answer.text}"
            until(lambda: all(one["ended"] for one in client.get("/admin/operations").json()["operations"]), "it ended")
            done = (answer.request.method, answer.request.url.path)
            rows = [row for row in small.rows() if row["id"] not in known and row["outcome"] == "ok"]
            assert done in {(row["method"], row["route"]) for row in rows}, what
        assert "cancel" in gateway.told
    finally:
        gateway.close()
    env = {"CORRAL_URL": small.url, "CORRAL_ADMIN_KEY": small.key}
    verified = CliRunner().invoke(cli, ["audit", "verify"], env=env)
    assert (verified.exit_code, "whole" in verified.stdout) == (0, True), verified.stdout


def test_haproxy_has_no_node_whose_coming_was_not_recorded_and_keeps_one_whose_going_was_not(
    tmp_path: Path, node: FakeNode
) -> None:
    other = FakeNode()
    with haproxy(tmp_path / "state", node) as (_, master):
        control = Running(tmp_path / "state", nodes=[{"url": node.url}], control={"haproxy_socket": master})
        database = Database(resolve(control.settings.store.database, control.state))
        refuse = "CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no record'); END"
        try:
            config = control.state / "run" / "haproxy.cfg"
            database.write_now(lambda c: c.execute(text(refuse)))
            told = config.read_text()
            assert node.url.removeprefix("http://") in told
            assert control.admin.post("/admin/nodes", json={"url": other.url}).status_code == 503
            assert config.read_text() == told
            assert control.admin.delete("/admin/nodes/node-1", params={"wait": 0}).status_code == 503
            assert config.read_text() == told
            assert control.node()["state"] != "draining", "it serves as before"
            database.write_now(lambda c: c.execute(text("DROP TRIGGER refuse")))
            assert control.admin.post("/admin/nodes", json={"url": other.url}).status_code == 201
            assert other.url.removeprefix("http://") in config.read_text()
        finally:
            database.close()
            control.close()
            other.close()
