"""Tenants: whose keys and records are whose, and what an operator may make, see and end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from support.control import Running, make_key, recorded

from corral.cli.main import cli
from corral.store.spool import encode_frame


@pytest.fixture
def red(control: Running) -> Iterator[httpx.Client]:
    """An operator of tenant red."""
    with control.client(make_key(control, name="red", role="operator", tenant="red")["key"]) as client:
        yield client


def reason(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"].partition(":")[0]


def test_tenants_come_and_go(control: Running) -> None:
    made = control.admin.post("/admin/tenants", json={"name": "blue"})
    assert (made.status_code, made.json()["name"], made.json()["keys"]) == (201, "blue", 0)
    assert control.admin.post("/admin/tenants", json={"name": "blue"}).status_code == 409
    assert control.admin.post("/admin/tenants", json={"name": ""}).status_code == 400
    key = make_key(control, tenant="blue")["id"]
    make_key(control, tenant="new")
    listed = control.admin.get("/admin/tenants").json()["tenants"]
    assert [(one["name"], one["keys"]) for one in listed] == [("blue", 1), ("default", 1), ("new", 1)]
    assert [one["name"] for one in control.snapshot().json()["tenants"]] == ["blue", "default", "new"]
    assert reason(control.admin.delete("/admin/tenants/blue")) == (409, "1 key of 'blue' still works")
    control.admin.post(f"/admin/keys/{key}/revoke")
    assert control.admin.delete("/admin/tenants/blue").json() == {"name": "blue", "removed": True}
    assert control.admin.get("/admin/tenants/blue").status_code == 404
    assert control.admin.delete("/admin/tenants/default").status_code == 409
    changes = [row for row in recorded(control.admin) if row["method"] != "GET"]
    told = [(row["method"], row["tenant"]) for row in changes if row["route"].startswith("/admin/tenants")]
    refused = [("POST", "default")] * 2
    assert told[:3] == [("POST", "blue"), *refused]
    assert told[3:] == [("POST", "new"), ("DELETE", "default"), ("DELETE", "blue"), ("DELETE", "default")]


def test_the_limits_of_a_tenant_are_the_administrators_to_change(control: Running, red: httpx.Client) -> None:
    made = control.admin.post("/admin/tenants", json={"name": "blue", "tpm": 5000, "daily_tokens": 90_000})
    assert (made.status_code, made.json()["tpm"], made.json()["rpm"]) == (201, 5000, None)
    changed = control.admin.patch("/admin/tenants/blue", json={"rpm": 60, "daily_tokens": None})
    assert changed.status_code == 200
    wanted = {"rpm": 60, "tpm": 5000, "concurrency": None, "daily_tokens": None, "monthly_tokens": None}
    assert {name: changed.json()[name] for name in wanted} == wanted
    sent = {tenant["name"]: tenant for tenant in control.snapshot().json()["tenants"]}
    assert {name: sent["blue"][name] for name in wanted} == wanted
    assert control.admin.patch("/admin/tenants/blue", json={"rpm": 0}).status_code == 400
    assert control.admin.patch("/admin/tenants/blue", json={"burst": 1}).status_code == 400
    assert control.admin.patch("/admin/tenants/none", json={"rpm": 1}).status_code == 404
    assert red.patch("/admin/tenants/red", json={"rpm": 1_000_000}).status_code == 403
    rows = control.admin.get("/admin/audit", params={"limit": 1000}).json()["audit"]
    [row] = [row for row in rows if row["method"] == "PATCH" and row["status"] == 200]
    assert (row["before"]["rpm"], row["after"]["rpm"], row["tenant"]) == (None, 60, "blue")


def test_the_limits_of_a_tenant_on_the_command_line(control: Running) -> None:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}

    def corral(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["tenants", *arguments], env=env)

    assert corral("create", "blue", "--tpm", "5000", "--concurrency", "4").exit_code == 0
    made = corral("limit", "blue", "--tpm", "none", "--daily-tokens", "90000", "--json")
    shown = json.loads(made.stdout)
    assert (shown["tpm"], shown["concurrency"], shown["daily_tokens"]) == (None, 4, 90_000)
    assert "90000" in corral("list").stdout
    wrong = corral("limit", "blue")
    assert (wrong.exit_code, "name at least one limit" in wrong.output) == (2, True)
    assert corral("limit", "blue", "--rpm", "0").exit_code == 2


def test_an_operator_sees_and_ends_its_own_tenants_keys_alone(control: Running, red: httpx.Client) -> None:
    own = red.post("/admin/keys", json={"name": "own"}).json()
    other = make_key(control, name="other", tenant="blue")
    assert own["tenant"] == "red"
    assert {key["name"] for key in red.get("/admin/keys").json()["keys"]} == {"red", "own"}
    assert [one["name"] for one in red.get("/admin/tenants").json()["tenants"]] == ["red"]
    assert red.get("/admin/tenants/red").json()["keys"] == 2
    asked: list[tuple[str, str]] = [
        *(("GET", ""), ("PATCH", ""), ("POST", "/rotate"), ("POST", "/revoke"), ("DELETE", ""))
    ]
    for method, verb in asked:
        for name in (other["id"], "other", "nobody"):
            body = {"deadline": 1} if method == "PATCH" else None
            answer = red.request(method, f"/admin/keys/{name}{verb}", json=body)
            assert (answer.status_code, answer.json()["error"]["message"]) == (404, f"there is no key '{name}'")
    for method, path in (("GET", "/admin/tenants/blue"), ("GET", "/admin/tenants/none")):
        assert red.request(method, path).status_code == 404
    for method, path in (("POST", "/admin/tenants"), ("DELETE", "/admin/tenants/red")):
        assert red.request(method, path, json={"name": "x"}).status_code == 403
    assert not control.admin.get("/admin/keys/other").json()["revoked"]
    assert red.post("/admin/keys/own/rotate", json={"overlap": 0}).status_code == 200
    assert red.delete("/admin/keys/own").json()["revoked"]


def test_an_operator_sees_its_own_tenants_records_alone(control: Running, red: httpx.Client) -> None:
    keys = {name: make_key(control, name=name, tenant=name)["id"] for name in ("red", "blue")}
    frames = b"".join(
        encode_frame({"t": "settle", "id": name, "request_id": name, "ts": time.time(), "key": key, "outcome": "ok"})
        for name, key in [*keys.items(), ("nobody", ""), ("lost", "zzzzzzzzzz")]
    )
    path = "/internal/spool/gateway-1/00000001.seg"
    assert control.internal.post(path, params={"offset": 0}, content=frames).status_code == 200
    red.post("/admin/keys", json={"name": "own"})
    everything = recorded(control.admin)
    owners = {row["id"]: row["tenant"] for row in everything if row["gw"] == "gateway-1"}
    assert owners == {"red": "red", "blue": "blue", "nobody": None, "lost": None}
    own = recorded(red)
    assert own == [row for row in everything if row["tenant"] == "red"]
    assert {(row["route"], row["request_id"]) for row in own} >= {(None, "red")}
    assert len([row for row in own if row["route"] == "/admin/keys"]) == 3
    assert red.get("/admin/audit", params={"request": "blue"}).json()["audit"] == []
    for params in ({"key": keys["blue"]}, {"key": "blue"}, {"key": "nobody's"}, {"after": 0, "key": keys["blue"]}):
        assert reason(red.get("/admin/audit", params=params)) == (404, "key"), "as one that is not there"


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"role": "admin"}, "role"),
        ({"tenant": "blue"}, "tenant"),
        ({"models": ["*"]}, "models"),
        ({"models": ["llama3*", "qwen*"]}, "models"),
        ({"networks": []}, "networks"),
        ({"networks": ["10.0.0.0/8"]}, "networks"),
        ({"expires": "3d"}, "expires"),
        ({"expires": None}, "expires"),
        ({"class": "interactive"}, "class"),
        ({"rpm": 11}, "rpm"),
        ({"rpm": None}, "rpm"),
        ({"concurrency": 33}, "concurrency"),
    ],
    ids=str,
)
def test_a_key_makes_none_that_may_more(control: Running, wanted: dict[str, Any], word: str) -> None:
    scope = {"models": ["llama*"], "networks": ["127.0.0.0/8"], "expires": "2d", "class": "batch", "rpm": 10}
    maker = make_key(control, role="operator", tenant="red", **scope)
    narrow = scope | {"models": ["llama3*"], "networks": ["127.0.0.1"], "expires": "1d", "rpm": 10}
    with control.client(maker["key"]) as client:
        made = client.post("/admin/keys", json={"name": "k", **narrow})
        assert (made.status_code, made.json().get("networks")) == (201, ["127.0.0.1/32"]), made.text
        assert reason(client.post("/admin/keys", json={"name": "k", **narrow, **wanted})) == (403, word)
        # Nor does it get another text for one that somebody else made.
        wider = make_key(control, **{**narrow, "tenant": "red", **wanted})
        refused = (404, "there is no key") if word == "tenant" else (403, word)
        status, said = reason(client.post(f"/admin/keys/{wider['id']}/rotate"))
        assert (status, said[: len(refused[1])]) == refused
        ended = client.post(f"/admin/keys/{wider['id']}/revoke").status_code
        assert ended == {"role": 403, "tenant": 404}.get(word, 200)


def test_a_change_is_recorded_with_before_and_after(control: Running, red: httpx.Client) -> None:
    made = red.post("/admin/keys", json={"name": "own", "rpm": 5}).json()
    red.post(f"/admin/keys/{made['id']}/rotate", json={"overlap": 60})
    control.admin.post(f"/admin/keys/{made['id']}/revoke")
    red.post("/admin/keys", json={"name": "more", "role": "admin"})
    rows = recorded(red)[-4:]
    told = [(row["method"], row["route"].replace(made["id"], "ID"), row["status"], row["outcome"]) for row in rows]
    assert told == [
        ("POST", "/admin/keys", 201, "ok"),
        ("POST", "/admin/keys/ID/rotate", 200, "ok"),
        ("POST", "/admin/keys/ID/revoke", 200, "ok"),
        ("POST", "/admin/keys", 403, "refused"),
    ]
    created, rotated, revoked, refused = rows
    assert (created["before"], created["after"]["rpm"], created["after"]["tenant"]) == (None, 5, "red")
    assert rotated["before"]["rotating_until"] is None and rotated["after"]["rotating_until"] > time.time()
    assert (revoked["before"]["revoked"], revoked["after"]["revoked"]) == (False, True)
    assert (refused["before"], refused["after"]) == (None, None)
    assert created["key"] == rotated["key"] == refused["key"] != revoked["key"]


def test_a_key_works_from_its_networks_alone(control: Running) -> None:
    made = make_key(control, role="operator", networks=["192.0.2.0/24", "2001:db8::1"])
    assert made["networks"] == ["192.0.2.0/24", "2001:db8::1/128"]
    (entry,) = [key for key in control.snapshot().json()["keys"] if key["id"] == made["id"]]
    assert entry["networks"] == made["networks"]
    with control.client(made["key"]) as client:
        for address, status in [("192.0.2.9", 200), ("2001:db8::1", 200), ("192.0.3.1", 403), ("", 403), ("x", 403)]:
            headers = {"X-Forwarded-For": address} if address else {}
            assert client.get("/admin/status", headers=headers).status_code == status, address
        # What a caller puts before the edge's own word counts for nothing.
        assert client.get("/admin/status", headers={"X-Forwarded-For": "192.0.2.9, 192.0.3.1"}).status_code == 403
    for network in ("10.0.0.0/33", "here", "", "10.0.0.1-10.0.0.9"):
        answer = control.admin.post("/admin/keys", json={"name": "k", "networks": [network]})
        assert (answer.status_code, answer.json()["error"]["message"][:8]) == (400, "networks")
