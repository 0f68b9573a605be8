"""Each call that changes something has a record with what was before and after."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.control import FakeNode, Running, recorded, until
from support.routes import INTERNAL, WHO

COMPARES = ("POST", "/admin/audit/compare")
"""Changes nothing, and is recorded as a read of the trail (test_reads_recorded.py)."""
RUNS = {
    **{"id": "r-1", "request_id": "q-1", "key": "k", "tenant": "default", "route": "/api/chat", "model": "m:latest"},
    **{"state": "running", "position": None, "waited": 0.0, "node": "node-1", "tokens": 3, "attempts": 1, "age": 1.0},
    "ticket": None,
}


class Changes:
    """Calls, each of which is to have a row with what was before and after."""

    def __init__(self, control: Running) -> None:
        self.control = control
        self.called: set[tuple[str, str]] = set()
        self.seq = self.rows()[-1]["seq"] if self.rows() else 0

    def rows(self) -> list[dict[str, Any]]:
        return recorded(self.control.admin)

    def call(self, method: str, route: str, at: str = "", **body: Any) -> Any:
        """A call by the path that `at` gives its route; what it answered."""
        self.called.add((method, route))
        sent: Any = body.get("models") if route.endswith("/catalogue") else body
        path = route.replace("{" + route.partition("{")[2].partition("}")[0] + "}", at)
        answer = self.control.admin.request(method, path, json=sent if body else None)
        assert answer.status_code in (200, 201, 202), answer.text
        return answer.json()

    def made(self, count: int = 1) -> list[dict[str, Any]]:
        """The rows that came since this was asked last, so many of them."""
        new = until(
            "it is recorded", lambda: [row for row in self.rows() if row["seq"] > self.seq][count - 1 :] and self.rows()
        )
        rows = [row for row in new if row["seq"] > self.seq]
        assert len(rows) == count, rows
        self.seq = rows[-1]["seq"]
        return rows

    def change(self, method: str, route: str, at: str = "", **body: Any) -> tuple[Any, Any]:
        """A call with one row; what that says was before and after."""
        self.call(method, route, at, **body)
        (row,) = self.made()
        assert (row["method"], row["status"] < 300) == (method, True)
        return row["before"], row["after"]

    def works(self, verb: str, model: str, **body: Any) -> tuple[Any, Any]:
        """An operation with one model: its beginning and its end say what the node had before, the end what it has."""
        begun = self.call("POST", f"/admin/models/{verb}", **({"models": [model]} | body if verb != "apply" else {}))
        first, last = self.made(2)
        assert first["before"] == last["before"]
        assert (first["status"], first["after"]["operation"]) == (202, begun["id"])
        assert (last["status"], last["after"]["state"], last["after"]["errors"]) == (200, "done", [])
        return first["before"]["models"]["node-1"][model], last["after"]["models"]["node-1"][model]


def test_each_change_is_recorded_with_what_was_before_and_after(tmp_path: Path) -> None:
    one, other = FakeNode(obedient=True), FakeNode(obedient=True)
    control = Running(tmp_path / "state", nodes=[{"url": one.url}], preload={"timeout": 0})
    try:
        until("the node is known", lambda: control.node()["models"] == ["m:latest"])
        changes = Changes(control)
        _keys_and_tenants(changes)
        _models(changes, one)
        _requests(changes)
        _nodes(changes, one, other)
        changing = {route for route, who in WHO.items() if route[0] != "GET" and who != INTERNAL}
        assert changes.called == changing - {COMPARES}
    finally:
        control.close()
        one.close()
        other.close()


def _keys_and_tenants(changes: Changes) -> None:
    change = changes.change
    before, after = change("POST", "/admin/tenants", name="t", rpm=4)
    assert (before, after["name"], after["rpm"]) == (None, "t", 4)
    before, after = change("PATCH", "/admin/tenants/{tenant}", "t", rpm=5)
    assert (before["rpm"], after["rpm"]) == (4, 5)
    before, after = change("POST", "/admin/keys", name="k", tenant="t", rpm=6)
    assert (before, after["name"], after["rpm"]) == (None, "k", 6)
    key = after["id"]
    before, after = change("PATCH", "/admin/keys/{key}", key, rpm=7)
    assert (before["id"], before["rpm"], after["rpm"]) == (key, 6, 7)
    before, after = change("POST", "/admin/keys/{key}/rotate", key)
    assert (before["rotating_until"], after["id"]) == (None, key) and after["rotating_until"] is not None
    before, after = change("POST", "/admin/keys/{key}/revoke", key)
    assert (before["revoked"], after["revoked"]) == (False, True)
    _, after = change("POST", "/admin/keys", name="other", tenant="t")
    before, after = change("DELETE", "/admin/keys/{key}", after["id"])
    assert (before["name"], before["revoked"], after["revoked"]) == ("other", False, True)
    before, after = change("DELETE", "/admin/tenants/{tenant}", "t")
    assert (before["name"], before["rpm"], after) == ("t", 5, None)


def _models(changes: Changes, node: FakeNode) -> None:
    change, works = changes.change, changes.works
    held, loaded = {"digest": "d", "resident": False}, {"digest": "d", "resident": True}
    before, after = change("PUT", "/admin/models/catalogue", models=[{"name": "c:latest"}])
    assert (before, [model["name"] for model in after["models"]]) == ({"models": []}, ["c:latest"])
    assert works("apply", "c:latest") == (None, loaded)
    assert works("pull", "p:latest") == (None, held)
    assert works("load", "m:latest") == (held, loaded)
    assert works("unload", "m:latest") == (loaded, held)
    assert works("preload", "p:latest") == (held, loaded)
    assert works("remove", "p:latest") == (loaded, None)
    before, after = change("POST", "/admin/models/disable", models=["m:latest"])
    assert (before, [row["name"] for row in after["disabled"]]) == ({"disabled": []}, ["m:latest"])
    before, after = change("POST", "/admin/models/enable", models=["m:latest"])
    assert ([row["name"] for row in before["disabled"]], after) == (["m:latest"], {"disabled": []})
    begun = changes.call("POST", "/admin/models/pull", models=["held:latest"])
    changes.made()
    until(
        "it pulls",
        lambda: (
            "/api/pull" in node.asked[-20:]
            and changes.control.admin.get(f"/admin/operations/{begun['id']}").json()["steps"][0]["state"] == "running"
        ),
    )
    changes.call("POST", "/admin/operations/{operation}/cancel", begun["id"])
    cancelled, ended = changes.made(2)
    assert cancelled["before"] == {"kind": "pull", "state": "running", "steps": {"running": 1}}
    assert cancelled["after"] == {"kind": "pull", "state": "cancelled"}
    assert ended["before"] == {"models": {"node-1": {"held:latest": None}}}
    assert ended["after"] == {"kind": "pull", "state": "cancelled", "errors": [], **ended["before"]}
    node.release.set()


def _requests(changes: Changes) -> None:
    control = changes.control

    def answer() -> None:
        """As a gateway does that runs one request: control finds it there, and then ends it."""
        answers: list[dict[str, Any]] = []
        values = {"find": {"requests": [RUNS], "total": 1}, "cancel": True}

        def asked() -> bool:
            nonlocal answers
            told = control.internal.post("/internal/requests/gateway-1", json=answers).json()["questions"]
            answers = [{"number": one["number"], "value": values[one["what"]]} for one in told]
            ended.extend(one["what"] for one in told)
            return not told and ended[-1:] == ["cancel"]

        ended: list[str] = []
        until("it is ended", asked)

    control.snapshot("gateway-1")
    with ThreadPoolExecutor(1) as pool:
        gateway = pool.submit(answer)
        before, after = changes.change("POST", "/admin/requests/{request}/cancel", "r-1")
        gateway.result()
    assert (before["state"], before["tokens"], before["node"]) == ("running", 3, "node-1")
    assert after == {"id": "r-1", "state": "cancelled"}


def _nodes(changes: Changes, one: FakeNode, other: FakeNode) -> None:
    change = changes.change
    change("PUT", "/admin/models/catalogue", models=[])  # what control would bring to a new node has rows of its own
    before, after = change("POST", "/admin/nodes", url=other.url, name="node-2")
    assert (before, after["name"], after["url"], after["source"]) == (None, "node-2", other.url, "api")
    before, after = change("POST", "/admin/nodes/{name}/drain", "node-2")
    assert (before["state"], after["draining"]) == ("ready", True)
    before, after = change("POST", "/admin/nodes/{name}/resume", "node-2")
    assert (before["state"], after["draining"]) == ("draining", False)
    for name, url in (("node-2", other.url), ("node-1", one.url)):
        changes.call("DELETE", "/admin/nodes/{name}", name)
        began, gone = changes.made(2)
        assert (began["status"], began["before"]["state"], began["after"]["draining"]) == (202, "ready", True)
        assert (gone["status"], gone["before"]["name"], gone["before"]["url"], gone["after"]) == (200, name, url, None)
    before, after = change("POST", "/admin/nodes", url=other.url, name="node-1")
    assert (before["removed"], before["source"], before["url"]) == (True, "config", one.url), (
        "in place of the removed one"
    )
    assert after["url"] == other.url
