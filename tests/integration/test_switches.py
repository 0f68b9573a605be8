"""Models that are switched off: what control tells gateways and operators, and what is on record."""

from __future__ import annotations

from pathlib import Path

from support.control import FakeNode, Running, make_key, until


def test_a_disabled_model_is_in_the_snapshot_until_it_is_enabled(
    tmp_path: Path, node: FakeNode, database_url: str
) -> None:
    settings = {"nodes": [{"url": node.url}], "store": {"database": database_url}}
    control = Running(tmp_path / "state", **settings)
    try:
        until("the node is known", lambda: control.node()["state"] == "ready")
        version = control.snapshot().json()["version"]
        with control.client(make_key(control, role="operator", tenant="red")["key"]) as operator:
            done = operator.post("/admin/models/disable", json={"models": ["m", "tpyo"], "reason": "leaks"}).json()
        assert [one["name"] for one in done["disabled"]] == ["m:latest", "tpyo:latest"]
        assert (done["unknown"], done["gateways"]) == (["tpyo:latest"], {"acknowledged": [], "pending": []})
        told = control.snapshot(since=version).json()
        assert told["disabled"] == ["m:latest", "tpyo:latest"]
        placement = control._server.config.app.api.state.control.leading._make(1)
        assert [placement._catalogue(name).disabled for name in ("m:latest", "other")] == [True, False]
        listed = control.admin.get("/admin/models").json()["models"]
        assert [(one["name"], one["disabled"], one["nodes"]) for one in listed] == [
            ("m:latest", True, ["node-1"]),
            ("tpyo:latest", True, []),
        ]
    finally:
        control.close()
    control = Running(tmp_path / "state", **settings)
    try:
        assert control.snapshot().json()["disabled"] == ["m:latest", "tpyo:latest"]
        left = control.admin.post("/admin/models/enable", json={"models": ["tpyo"]}).json()["disabled"]
        assert [one["name"] for one in left] == ["m:latest"]
        done = control.admin.post("/admin/models/enable", json={"models": ["m", "nobody"]}).json()
        assert (done["disabled"], done["unknown"]) == ([], ["nobody:latest"])
        assert control.snapshot().json()["disabled"] == []
        rows = control.admin.get("/admin/audit").json()["audit"]
        changes = [row for row in rows if row["route"].startswith("/admin/models/")]
        assert [
            (row["route"].rpartition("/")[2], len(row["before"]["disabled"]), len(row["after"]["disabled"]))
            for row in changes
        ] == [("disable", 0, 2), ("enable", 2, 1), ("enable", 1, 0)]
        assert changes[0]["after"]["disabled"][0]["reason"] == "leaks"
    finally:
        control.close()


def test_what_is_no_model_is_refused(tmp_path: Path, node: FakeNode) -> None:
    control = Running(tmp_path / "state", nodes=[{"url": node.url}])
    try:
        with control.client(make_key(control)["key"]) as inference:
            assert inference.post("/admin/models/disable", json={"models": ["m"]}).status_code == 403
        for body in ({"models": []}, {"models": ["a b"]}, {"models": ["m"], "reason": "a\nb"}, {"models": "m"}, {}):
            answer = control.admin.post("/admin/models/disable", json=body)
            assert answer.status_code == 400, body
    finally:
        control.close()
