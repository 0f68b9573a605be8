"""What control refuses, what it says then, and what of it is in the audit trail."""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from sqlalchemy import select
from sqlalchemy import text as sql
from support.control import FakeNode, Running, make_key, recorded, until
from support.servers import valkey

from corral.cli.main import cli
from corral.control import nodes
from corral.control.audit import NOTES_MAX, Notes
from corral.control.auth import BODY_MAX, Gate, Principal
from corral.gateway.shipper import Shipper
from corral.stack import doctor
from corral.stack.state import StateFolder
from corral.store.database import Database, resolve
from corral.store.spool import HEADER, SpoolWriter, encode_frame
from corral.store.tables import audit


@pytest.fixture
def control(tmp_path: Path, node: FakeNode) -> Iterator[Running]:
    made = Running(tmp_path / "state", nodes=[{"url": node.url}])
    yield made
    made.close()


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


# -- requests


def test_a_body_of_unknown_length_is_held_to_the_same_bound(control: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(128):
            yield b" " * 65536

    answer = control.admin.post("/admin/keys", content=pieces())
    assert error(answer) == (413, f"more than {BODY_MAX} bytes")
    assert error(control.admin.post("/admin/keys", content=b" " * (BODY_MAX + 1)))[0] == 413
    padded = [b'{"name": "chunked"', b" " * 65536, b"}"]
    assert control.admin.post("/admin/keys", content=iter(padded)).status_code == 201


def test_a_key_that_is_revoked_while_it_keeps_a_body_back_ends_no_call(
    control: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_key(control, role="admin")
    admitted, authenticate = Event(), Gate._authenticate

    async def noted(gate: Gate, text: str, address: str) -> Any:
        found = await authenticate(gate, text, address)
        if text == made["key"]:
            admitted.set()
        return found

    monkeypatch.setattr(Gate, "_authenticate", noted)
    before = len(control.admin.get("/admin/keys").json()["keys"])

    def pieces() -> Iterator[bytes]:
        yield b'{"name": "late", '
        assert admitted.wait(60)
        control.admin.post(f"/admin/keys/{made['id']}/revoke").raise_for_status()
        yield b'"role": "admin"}'

    with control.client(made["key"]) as client:
        assert error(client.post("/admin/keys", content=pieces())) == (401, "the API key was revoked")
    assert len(control.admin.get("/admin/keys").json()["keys"]) == before


@pytest.mark.parametrize("path", ["/admin/keys", "/internal/snapshot"])
def test_two_credentials_are_refused(control: Running, path: str) -> None:
    own = control.internal if path.startswith("/internal/") else control.admin
    bearer = own.headers["authorization"]
    text = bearer.removeprefix("Bearer ")
    with control.client() as client:

        def ask(*headers: tuple[str, str]) -> int:
            return client.get(path, headers=list(headers)).status_code

        assert ask(("Authorization", bearer), ("Authorization", "Bearer other")) == 400
        assert ask(("Authorization", bearer), ("Authorization", bearer)) == 400
        assert ask(("x-api-key", text), ("x-api-key", "other")) == 400
        assert ask(("Authorization", bearer), ("x-api-key", "other")) == 400
        assert ask(("Authorization", bearer), ("x-api-key", text)) == 200
        assert ask(("x-api-key", text)) == 200
        assert ask(("Authorization", "Basic abc")) == 401


@pytest.mark.parametrize(
    "text",
    [
        *("1e308", "-1", "0", "NaN", "Infinity", "-Infinity", "1500000000", "99999999999999", "1" + "0" * 400, "true"),
        *('""', '"1e308"', f'"{"9" * 400}d"', '"NaN"', '"2001-01-01"', '"9999-12-31"', '"0001-01-01T00:00:00+14:00"'),
        *('"2027-13-01"', '"-1d"', "[]", "{}"),
    ],
)
def test_an_expiry_that_cannot_be_is_a_400_that_names_it(control: Running, text: str) -> None:
    answer = control.admin.post("/admin/keys", content=f'{{"name": "k", "expires": {text}}}')
    status, message = error(answer)
    assert (status, message.startswith("expires")) == (400, True), message


def test_an_overlap_that_cannot_be_is_a_400_that_names_it(control: Running) -> None:
    key = make_key(control)["id"]
    for text in ("1e308", "NaN", "-1", "1" + "0" * 400, f'"{"9" * 400}d"'):
        answer = control.admin.post(f"/admin/keys/{key}/rotate", content=f'{{"overlap": {text}}}')
        assert (answer.status_code, "overlap" in answer.text) == (400, True), text


# -- the audit trail of what was refused


def test_refused_changes_are_in_the_audit_trail(control: Running) -> None:
    operator = make_key(control, role="operator")
    seen = {"X-Request-ID": "mine", "X-Forwarded-For": "10.1.2.3"}
    with control.client(operator["key"]) as client:
        client.post("/admin/keys", json={"name": "mine", "role": "admin"}, headers=seen)
        client.get("/admin/keys")
    control.admin.post("/admin/keys", json={"name": ""})
    with control.client() as nobody:
        nobody.delete("/admin/nodes/node-1", headers=seen)
        nobody.get("/admin/keys")
    _, forbidden, bad, unknown, read = recorded(control.admin)
    assert [row["status"] for row in (forbidden, bad, unknown, read)] == [403, 400, 401, 401]
    assert {row["outcome"] for row in (forbidden, bad, unknown, read)} == {"refused"}
    assert (forbidden["key"], forbidden["request_id"], forbidden["addr"]) == (operator["id"], "mine", "10.1.2.3")
    assert (unknown["key"], unknown["method"], unknown["route"]) == (None, "DELETE", "/admin/nodes/node-1")


def test_a_flood_without_a_key_is_bounded_and_counted(tmp_path: Path) -> None:
    database = Database(resolve("sqlite:///corral.db", tmp_path))
    database.migrate()
    notes = Notes(database)
    nobody, someone = Principal("", "", "10.1.2.3", ""), Principal("abc", "operator", "10.1.2.4", "")

    async def flood() -> None:
        for _ in range(NOTES_MAX + 7):
            await notes.note(nobody, "POST", "/admin/keys", 401)
        for _ in range(NOTES_MAX + 2):
            await notes.note(someone, "GET", "/admin/usage", 200, "by=day")
        await notes.note(someone, "POST", "/admin/keys", 403)
        await notes.flush()
        await notes.flush()

    asyncio.run(flood())
    rows = database.read_now(lambda c: [dict(row) for row in c.execute(select(audit)).mappings()])
    database.close()
    assert [row["status"] for row in rows].count(401) == NOTES_MAX
    assert [row["key"] for row in rows if row["status"] == 403] == ["abc"]
    assert [row["after"] for row in rows].count({"query": "by=day"}) == NOTES_MAX
    assert [row["after"] for row in rows if row["method"] == ""] == [{"more_refused": 7}, {"more_read": 2}]


def test_no_read_is_only_counted_while_no_row_is_taken(tmp_path: Path) -> None:
    database = Database(resolve("sqlite:///corral.db", tmp_path))
    database.migrate()
    notes, someone = Notes(database), Principal("abc", "admin", "10.1.2.4", "")
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no record'); END"

    async def ask(times: int) -> list[bool]:
        return [await notes.note(someone, "GET", "/admin/keys", 200) for _ in range(times)]

    async def read() -> None:
        database.write_now(lambda c: c.execute(sql(refuse)))
        assert not any(await ask(NOTES_MAX + 7)), "nothing is shown"
        database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
        assert all(await ask(NOTES_MAX + 3))
        database.write_now(lambda c: c.execute(sql(refuse)))
        await notes.flush()
        assert not any(await ask(3)), "this caller's rows of the minute are used up"
        database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
        assert all(await ask(2))
        await notes.flush()

    asyncio.run(read())
    rows = database.read_now(lambda c: [dict(row) for row in c.execute(select(audit)).mappings()])
    database.close()
    told = [row["after"] for row in rows if row["after"] is not None]
    assert sum(more["more_read"] for more in told) + len(rows) - len(told) == NOTES_MAX + 3 + 2


def test_reads_of_records_and_keys_are_recorded_before_they_are_answered(control: Running) -> None:
    operator = make_key(control, role="operator")
    seen = {"X-Request-ID": "mine", "X-Forwarded-For": "10.1.2.3"}
    with control.client(operator["key"]) as client:
        client.get("/admin/audit", params={"since": "1h", "model": operator["key"]}, headers=seen)
        client.get(f"/admin/keys/{operator['id']}")
        client.get("/admin/tenants")
        for state in ("status", "nodes", "models", "models/plan", "operations"):
            client.get(f"/admin/{state}")
        client.post(f"/admin/keys/{operator['key']}/revoke")
    rows = [row for row in control.admin.get("/admin/audit").json()["audit"] if row["key"] == operator["id"]]
    routes = ["/admin/audit", f"/admin/keys/{operator['id']}", "/admin/tenants"]
    *reads, refused = rows
    assert [(row["method"], row["route"], row["status"], row["outcome"]) for row in reads] == [
        ("GET", route, 200, "ok") for route in routes
    ]
    assert (reads[0]["request_id"], reads[0]["addr"], reads[0]["tenant"]) == ("mine", "10.1.2.3", "default")
    # Which records were read; a key that was written there by mistake is no more than its id.
    assert reads[0]["after"] == {"query": f"since=1h&model=crl_{operator['id']}_…"}
    assert (refused["status"], refused["route"]) == (404, f"/admin/keys/crl_{operator['id']}_…/revoke")


# -- what cannot be shipped


def test_a_corrupt_segment_is_put_aside_and_the_rest_counts_once(
    control: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateFolder(tmp_path / "stack")
    state.create()
    folder = state.spool / "gateway-1"

    def record(number: int) -> bytes:
        settled = {"t": "settle", "id": f"e{number}", "ts": 1795000000.5, "model": "m:latest", "tokens": number}
        return encode_frame(settled)

    writer = SpoolWriter(folder)
    damaged = writer.segment
    bad = bytearray(record(2))
    bad[-3] ^= 1
    # With good checksums, and no records all the same.
    nothing = [b"[" * 5000, b"{" + b'"a":[' * 5000, b'{"t":"settle","id":"\xff"}', b'{"t":"settle","id":1e999}']
    for unreadable in nothing:
        payload = unreadable + b"\n" + record(5)[HEADER.size :]
        bad += HEADER.pack(len(payload), zlib.crc32(payload)) + payload
    damaged.write_bytes(record(1) + bytes(bad) + record(3))
    token = control.internal.headers["authorization"].removeprefix("Bearer ")
    shipper = Shipper(writer, folder, control.url, token, "gateway-1")

    async def ship() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            await shipper.ship_all(client)
            # The writer goes on, in a segment that can be read.
            writer.append(record(4)[8:])
            writer.flush()
            await shipper.ship_all(client)

    asyncio.run(ship())
    aside = damaged.with_suffix(".corrupt")
    assert [path.name for path in folder.iterdir() if path.suffix != ".seg"] == [aside.name]
    (line,) = [entry.getMessage() for entry in caplog.records if entry.name == "corral.gateway.shipper"]
    assert str(damaged) in line and str(aside) in line and f"byte {len(record(1))} " in line
    rows = control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]
    assert [(row["id"], row["tokens"]) for row in rows] == [("e1", 1), ("e5", 5), ("e3", 3), ("e4", 4)]
    writer.close()
    (found,) = [one for one in doctor._backlog(state) if one.level != "ok"]
    assert found.level == "problem"
    assert str(aside) in found.seen


# -- status, and a drain that nobody can follow


def test_status_has_the_pids_of_what_is_on_this_machine(tmp_path: Path, node: FakeNode) -> None:
    remote = {"name": "far", "url": "http://192.0.2.1:11434"}
    with valkey(tmp_path) as store:
        control = Running(tmp_path / "state", nodes=[{"url": node.url}, remote], store={"valkey": store.url})
        try:
            told = control.admin.get("/admin/status").json()
        finally:
            control.close()
    assert [(one["name"], one["pid"]) for one in told["nodes"]] == [("node-1", os.getpid()), ("far", None)]
    assert told["store"]["valkey"]["pid"] == store.process.pid


def test_a_drain_that_nobody_can_follow_says_so(tmp_path: Path, node: FakeNode) -> None:
    for haproxy, reason in ((None, "control.haproxy_socket"), (tmp_path / "gone.sock", "gone.sock")):
        state = tmp_path / str(haproxy is None)
        control = Running(state, nodes=[{"url": node.url}], control={"haproxy_socket": haproxy})
        try:
            drained = control.admin.post("/admin/nodes/node-1/drain", params={"wait": 0.3}).json()
            assert (drained["state"], drained["drained"], drained["streams"]) == ("draining", None, None)
            assert reason in drained["reason"]
            if haproxy is None:
                env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
                done = CliRunner().invoke(cli, ["nodes", "drain", "node-1", "--wait"], env=env)
                assert (done.exit_code, "node-1 gets no new work, but" in done.stderr) == (1, True), done.output
        finally:
            control.close()


def test_a_node_that_cannot_be_removed_works_on(tmp_path: Path, node: FakeNode) -> None:
    gone = tmp_path / "gone.sock"
    control = Running(tmp_path / "state", nodes=[{"url": node.url}], control={"haproxy_socket": gone})
    try:
        until("the node is ready", lambda: states(control) == {"node-1": "ready"})
        refused = control.admin.delete("/admin/nodes/node-1", params={"wait": 0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "haproxy_failed")
        assert states(control) == {"node-1": "ready"}
        rows = [row for row in recorded(control.admin) if row["route"] == "/admin/nodes/node-1"]
        drained = [(row["status"], (row["after"] or {}).get("draining")) for row in rows]
        assert drained == [(202, True), (500, False), (502, None)], "each change of it is on record"
    finally:
        control.close()


def states(control: Running) -> dict[str, str]:
    """The nodes' states."""
    return {one["name"]: one["state"] for one in control.admin.get("/admin/nodes").json()["nodes"]}


# -- texts with a NUL


def test_a_nul_in_any_parameter_is_refused_by_name_and_recorded(control: Running) -> None:
    page = control.admin.get("/openapi.json").json()["paths"].items()
    asked = [
        (path, one["name"])
        for path, methods in page
        for one in methods.get("get", {}).get("parameters", [])
        if path.startswith("/admin/") and one["in"] == "query"
    ]
    assert {("/admin/audit", "request"), ("/admin/audit", "model"), ("/admin/usage", "model")} <= set(asked)
    for path, name in asked:
        answer = control.admin.get(re.sub(r"\{\w+\}", "x", path), params={name: "a\0b"})
        assert answer.status_code == 400, (path, name)
        assert answer.json()["error"] == {"code": "bad_request", "message": f"{name}: has a NUL character (U+0000)"}
    rows = [row for row in recorded(control.admin) if row["method"] == "GET"]
    assert {row["route"] for row in rows} >= {"/admin/audit", "/admin/usage"} and {row["status"] for row in rows} == {
        400
    }


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("keys", {"name": "a\0b"}, "name"),
        ("keys", {"name": "k", "models": ["*", "a\0"]}, "models.1"),
        ("keys", {"name": "k", "a\0": 1}, "a\\0"),
        ("nodes", {"url": "http://127.0.0.1:1", "name": "a\0"}, "name"),
        ("models/disable", {"models": ["m"], "reason": "\0"}, "reason"),
        ("audit/compare", {"request": "a\0", "prompt": ["0" * 64]}, "request"),
        ("keys", "\0", "body"),
    ],
)
def test_a_nul_in_a_body_is_refused_by_its_place(control: Running, path: str, body: object, place: str) -> None:
    answer = control.admin.post(f"/admin/{path}", json=body)
    assert answer.json()["error"] == {"code": "bad_request", "message": f"{place}: has a NUL character (U+0000)"}
    assert [row["status"] for row in recorded(control.admin)] == [400]


def test_a_backslash_before_u0000_is_no_nul(control: Running) -> None:
    answer = control.admin.post("/admin/keys", json={"name": "a\\u0000"})
    assert (answer.status_code, answer.json()["name"]) == (201, "a\\u0000")
    assert control.admin.get("/admin/keys/a%00b").status_code == 404, "a path with one is no route"


# -- the audit trail


def test_a_request_is_found_by_what_its_caller_has(control: Running) -> None:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
    for request in ("mine", "other"):
        control.admin.post("/admin/keys", json={"name": request}, headers={"X-Request-ID": request})
    done = CliRunner().invoke(cli, ["audit", "list", "--request", "mine"], env=env)
    assert done.exit_code == 0, done.output
    head, row = done.stdout.splitlines()
    assert "REQUEST ID" in head and row[head.index("REQUEST ID") :].startswith("mine ")


@pytest.mark.parametrize(("method", "path"), [("DELETE", ""), ("POST", "/drain"), ("GET", "/drain")])
def test_a_node_that_is_resumed_while_somebody_waits_for_it_is_neither_gone_nor_drained(
    control: Running, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    waits, over = Event(), Event()

    async def drained(*_: Any) -> tuple[int, None]:
        waits.set()
        await asyncio.to_thread(over.wait, 60)
        return 0, None

    control.admin.post("/admin/nodes/node-1/drain")
    monkeypatch.setattr(nodes, "_drained", drained)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(control.admin.request, method, f"/admin/nodes/node-1{path}")
        assert waits.wait(60)
        resumed = control.admin.post("/admin/nodes/node-1/resume", params={"preload": False})
        over.set()
        answer = asked.result()
    assert (resumed.status_code, answer.status_code) == (200, 409), answer.text
    assert control.node("node-1")["state"] == "ready"
