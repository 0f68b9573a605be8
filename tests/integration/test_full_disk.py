"""Admin calls while control's disk is full: what cannot be recorded does not happen, and is a clear 503."""

from __future__ import annotations

import os
import sys
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

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system of its own")


class Small:
    """A control whose state folder is on a disk of its own, of 4 MiB."""

    def __init__(self, folder: Path, node: FakeNode) -> None:
        port = free_port()
        state = folder / "state"
        state.mkdir()
        settings = {
            "control": {"listen": f"127.0.0.1:{port}", "metrics": "", "state": str(state)},
            "store": {"valkey": "redis://127.0.0.1:1/0"},
            "audit": {"checkpoint": "200ms"},
            "nodes": [{"name": "node-1", "url": node.url}],
            "models": [{"name": "m:latest"}],
        }
        (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
        argv = [sys.executable, "-m", "corral", "serve", "control", "--config", str(folder / "corral.yaml")]
        mount = f"mount -t tmpfs -o size=4m state '{state}' && exec \"$@\""
        argv = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *argv]
        self.process = Process(argv, folder / "control.log", python_env())
        self.url = f"http://127.0.0.1:{port}"
        self.process.wait_until(self._up)
        self._filler = Path(f"/proc/{self.process.pid}/root{state}/filler")
        self.key = (self._filler.parent / "admin.key").read_text().strip()
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, trust_env=False, timeout=20
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
        until(lambda: all(self.client.get("/admin/keys").status_code == 503 for _ in range(5)), "it is full", 30)

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink()

    def rows(self) -> list[dict[str, Any]]:
        """All records, read while that can be recorded."""
        answer = self.client.get("/admin/audit", params={"limit": 1000})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["audit"])


@pytest.fixture
def small(tmp_path: Path, node: FakeNode) -> Iterator[Small]:
    made = Small(tmp_path, node)
    yield made
    made.client.close()
    made.process.end()


def state(small: Small) -> dict[str, Any]:
    """What admin calls change, as it is now."""
    asked = {path: small.client.get(f"/admin/{path}").json() for path in ("keys", "tenants", "models", "nodes")}
    for key in asked["keys"]["keys"]:
        key.pop("last_used")
    for one in asked["nodes"]["nodes"]:
        asked[one["name"]] = (one["state"], one["url"])
    return {name: value for name, value in asked.items() if name != "nodes"}


def test_what_cannot_be_recorded_does_not_happen(small: Small, node: FakeNode) -> None:
    client = small.client
    made = client.post("/admin/keys", json={"name": "k", "tenant": "team", "new_tenant": True}).json()
    client.post("/admin/tenants", json={"name": "idle"})
    other = FakeNode()
    changes: dict[str, Callable[[], httpx.Response]] = {
        "make a key": lambda: client.post("/admin/keys", json={"name": "more"}),
        "rotate it": lambda: client.post(f"/admin/keys/{made['id']}/rotate"),
        "make a tenant": lambda: client.post("/admin/tenants", json={"name": "new"}),
        "limit a tenant": lambda: client.patch("/admin/tenants/team", json={"rpm": 5}),
        "remove a tenant": lambda: client.delete("/admin/tenants/idle"),
        "add a node": lambda: client.post("/admin/nodes", json={"url": other.url, "name": "node-2"}),
        "drain a node": lambda: client.post("/admin/nodes/node-1/drain"),
        "disable a model": lambda: client.post("/admin/models/disable", json={"models": ["m"]}),
        "load a model": lambda: client.post("/admin/models/load", json={"models": ["m"]}),
        "another catalogue": lambda: client.put("/admin/models/catalogue", json=[{"name": "n:latest"}]),
        "remove a node": lambda: client.delete("/admin/nodes/node-1", params={"wait": 0}),
        "revoke a key": lambda: client.post(f"/admin/keys/{made['id']}/revoke"),
    }
    before, known = state(small), {row["id"] for row in small.rows()}
    small.fill()
    try:
        for what, change in changes.items():
            answer = change()
            told = (answer.status_code, answer.json()["error"]["code"], answer.headers.get("retry-after"))
            assert told == (503, "database_unavailable", "1"), f"{what}: {answer.text}"
            assert "not recorded" in answer.text
        for path in ("keys", "tenants", "audit", "usage"):
            shown = client.get(f"/admin/{path}")
            assert (shown.status_code, "not recorded" in shown.text, made["id"] in shown.text) == (503, True, False)
        assert client.get("/admin/status").status_code == 200, "what machines do is shown without a record"
        asked = [path for path in node.asked if path not in ("/api/ps", "/api/tags", "/api/version")]
        assert asked == [], "a node was told to do something"
    finally:
        small.free()
    until(lambda: client.get("/admin/keys").status_code == 200, "it works again", 30)
    assert state(small) == before
    new = [row for row in small.rows() if row["id"] not in known]
    assert {row["method"] for row in new if row["status"] < 400} == {"GET"}, new
    for what, change in changes.items():
        answer = change()
        assert answer.status_code in (200, 201, 202), f"{what}: {answer.text}"
    done = {(row["method"], row["route"]) for row in small.rows() if row["id"] not in known and row["outcome"] == "ok"}
    assert {("POST", "/admin/keys"), ("POST", f"/admin/keys/{made['id']}/revoke"), ("POST", "/admin/nodes")} <= done
    env = {"CORRAL_URL": small.url, "CORRAL_ADMIN_KEY": small.key}
    verified = CliRunner().invoke(cli, ["audit", "verify"], env=env)
    assert (verified.exit_code, "whole" in verified.stdout) == (0, True), verified.stdout
    other.close()


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
