"""`corral requests`: a whole stack, one slot, and an operator who looks at what waits and runs, and ends it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import yaml
from support.fleet import SimulatedNode
from support.late import lateness
from support.process import until
from support.servers import valkey
from support.stack import Stack, corral, stack

MODEL = "sim:latest"
SIMULATION = {"models": [{"name": MODEL, "load": 0.1, "prefill": 5000.0, "decode": 20.0, "slots": 4, "tokens": 4000}]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two gateways and a node with one slot."""
    folder = tmp_path_factory.mktemp("requests")
    with ExitStack() as exits:
        node = SimulatedNode("node-1", folder, SIMULATION)
        exits.callback(lambda: node.process.end(signal.SIGKILL))
        store = exits.enter_context(valkey(folder))
        settings = {
            "gateway": {"processes": 2, "continuation": False, "queue": {"heartbeat": "1s"}},
            "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
            "store": {"valkey": store.url},
            "nodes": [{"name": node.name, "url": node.url, "slots": 1}],
        }
        (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
        made = exits.enter_context(stack(folder / "state", "--config", str(folder / "corral.yaml")))
        short = {"model": MODEL, "prompt": "a", "stream": False, "options": {"num_predict": 1}}

        def stands() -> bool:
            answer = httpx.post(made.url + "/api/generate", json=short, headers=made.headers(), timeout=60)
            return answer.status_code == 200 and made.corral("models", "why", MODEL)["places"] != []

        until(stands, "the model stands on the node", 60, every=0.2)
        yield made


@pytest.fixture
def callers(site: Stack) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool
        for one in site.corral("requests", "list")["requests"]:
            httpx.post(f"{site.url}/admin/requests/{one['id']}/cancel", headers=admin(site), timeout=60)


def admin(site: Stack) -> dict[str, str]:
    return {"Authorization": f"Bearer {site.admin_key}"}


def say(
    site: Stack, path: str = "/api/chat", tokens: int = 4000, stream: bool = True, **headers: str
) -> httpx.Response:
    """An answer of some minutes, read to its end."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": stream}
    body |= {"max_tokens": tokens} if path.startswith("/v1") else {"options": {"num_predict": tokens}}
    return httpx.post(site.url + path, json=body, headers=site.headers() | headers, timeout=240)


def listed(site: Stack) -> list[dict[str, Any]]:
    told: dict[str, Any] = {}

    def all_say() -> bool:
        """A gateway that halts for two seconds is named instead of heard."""
        told.update(httpx.get(site.url + "/admin/requests", headers=admin(site), timeout=60).json())
        return told["silent"] == []

    until(all_say, "each gateway says what it has")
    assert told["left_out"] == 0
    return list(told["requests"])


def asked(
    site: Stack, callers: ThreadPoolExecutor, *names: str, path: str = "/api/chat"
) -> list[Future[httpx.Response]]:
    """Requests of these names, one after the other: the first runs, the others wait in this order."""
    made = []
    for count, name in enumerate(names, len(listed(site)) + 1):
        made.append(callers.submit(say, site, path, **{"X-Request-ID": name}))
        until(lambda count=count: len(listed(site)) == count, f"{name} is there")  # type: ignore[misc]
    return made


def queues(site: Stack) -> list[dict[str, Any]]:
    return list(httpx.get(site.url + "/admin/status", headers=admin(site), timeout=60).json()["queues"])


def by_name(site: Stack) -> dict[str, dict[str, Any]]:
    return {one["request_id"]: one for one in listed(site)}


def test_what_runs_and_who_waits_with_place_and_estimate(site: Stack, callers: ThreadPoolExecutor) -> None:
    asked(site, callers, "runs", "second", "third", "fourth", "fifth")
    until(lambda: by_name(site)["runs"]["tokens"] > 3, "it has tokens")
    found = by_name(site)
    assert list(found) == ["runs", "second", "third", "fourth", "fifth"], "the oldest first"
    runs = found["runs"]
    assert (runs["state"], runs["node"], runs["position"], runs["estimate"]) == ("running", "node-1", None, None)
    assert runs["model"] == MODEL and runs["tenant"] == "default" and runs["route"] == "/api/chat"
    waiting = [found[name] for name in ("second", "third", "fourth", "fifth")]
    assert [(one["state"], one["node"], one["tokens"]) for one in waiting] == [("queued", None, 0)] * 4
    assert [one["position"] for one in waiting] == [1, 2, 3, 4]
    estimates = [one["estimate"] for one in waiting]
    assert estimates == sorted(estimates) and estimates[0] > 0
    assert all(0 < one["waited"] <= one["age"] for one in waiting)
    assert {one["gateway"] for one in found.values()} == {"gateway-1", "gateway-2"}, "of all gateways"
    until(lambda: [(one["model"], one["waiting"]) for one in queues(site)] == [(MODEL, 4)], "the status counts them")
    [queue] = site.corral("status")["queues"]
    assert queue["oldest"] > 0 and queue["estimate"] > 0
    assert "Requests that wait for a slot" in corral("status", "--state", str(site.state))
    httpx.post(f"{site.url}/admin/requests/second/cancel", headers=admin(site), timeout=60)
    until(lambda: [one["position"] for one in listed(site)[1:]] == [1, 2, 3], "those behind it move up")
    assert [one["request_id"] for one in site.corral("requests", "list", "--only", "running")["requests"]] == ["runs"]
    assert site.corral("requests", "list", "--model", "other")["requests"] == []
    assert site.corral("requests", "show", "third")["position"] == 1
    text = corral("requests", "list", "--state", str(site.state))
    assert "POSITION" in text and len(text.splitlines()) == 5


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_cancel_ends_a_stream_in_band_and_hands_its_slot_on(
    site: Stack, callers: ThreadPoolExecutor, path: str
) -> None:
    name = f"cut{path.replace('/', '-')}"
    runs, waits = asked(site, callers, name, f"{name}-next", path=path)
    until(lambda: by_name(site)[name]["tokens"] > 3, "it has tokens")
    record = by_name(site)[name]
    done = site.corral("requests", "cancel", name)
    assert (done["id"], done["cancelled"], done["node"]) == (record["id"], True, "node-1")
    answer = runs.result(timeout=60)
    assert answer.status_code == 200
    last = answer.text.strip().rpartition("\n")[2].removeprefix("data: ")
    assert "cancelled by an operator" in json.dumps(json.loads(last)["error"]), "an error is the stream's end"
    until(lambda: by_name(site)[f"{name}-next"]["state"] == "running", "the next one has its slot")
    site.corral("requests", "cancel", f"{name}-next")
    waits.result(timeout=60)


def test_cancel_of_one_that_waits_is_a_403_and_the_trail_says_who(site: Stack, callers: ThreadPoolExecutor) -> None:
    _, waits = asked(site, callers, "kept", "unwanted")
    assert site.corral("requests", "cancel", "unwanted")["state"] == "queued"
    answer = waits.result(timeout=60)
    assert (answer.status_code, answer.json()["error"]) == (403, "the request was cancelled by an operator")
    assert "Retry-After" not in answer.headers
    assert list(by_name(site)) == ["kept"]

    def rows() -> list[dict[str, Any]]:
        return [row for row in site.corral("audit", "list", "--limit", "200") if row["outcome"] == "cancelled"]

    until(lambda: any(row["request_id"] == "unwanted" for row in rows()), "its record is there")
    [own] = [row for row in rows() if row["request_id"] == "unwanted"]
    assert (own["status"], own["node"] or None, own["tokens"]) == (403, None, 0)
    trail = site.corral("audit", "list", "--limit", "200")
    [acted] = [row for row in trail if row["route"] == f"/admin/requests/{own['id']}/cancel" and row["status"] == 200]
    admins = [key["id"] for key in site.corral("keys", "list") if key["role"] == "admin"]
    assert acted["key"] in admins and acted["before"]["request_id"] == "unwanted"


def test_cancel_of_one_that_waits_and_has_its_head_is_told_in_band(site: Stack, callers: ThreadPoolExecutor) -> None:
    asked(site, callers, "holds")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}
    headers = site.headers() | {"X-Request-ID": "beaten"}
    with httpx.stream("POST", site.url + "/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        assert (next(lines), next(lines)) == (": waiting", "")
        assert site.corral("requests", "cancel", "beaten")["state"] == "queued"
        said = [line for line in lines if line not in (": waiting", "")]
    assert answer.status_code == 200
    [error] = [json.loads(line.removeprefix("data: "))["error"] for line in said]
    assert (error["code"], error["message"]) == ("cancelled", "the request was cancelled by an operator")

    def rows() -> list[dict[str, Any]]:
        return [row for row in site.corral("audit", "list", "--limit", "200") if row["request_id"] == "beaten"]

    until(lambda: rows() and rows()[0]["outcome"], "its record is there")
    assert [(row["status"], row["outcome"]) for row in rows()] == [(403, "cancelled")]


def test_what_is_not_there_or_is_not_one_cannot_be_cancelled(site: Stack, callers: ThreadPoolExecutor) -> None:
    assert httpx.post(f"{site.url}/admin/requests/gone/cancel", headers=admin(site)).status_code == 404
    asked(site, callers, "twin", "twin")
    refused = httpx.post(f"{site.url}/admin/requests/twin/cancel", headers=admin(site))
    assert refused.status_code == 409
    ids = [one["id"] for one in listed(site)]
    assert all(id in refused.json()["error"]["message"] for id in ids)
    operator = site.corral("keys", "create", "other", "--role", "operator", "--tenant", "other", "--new-tenant")["key"]
    stranger = {"Authorization": f"Bearer {operator}"}
    assert httpx.get(f"{site.url}/admin/requests", headers=stranger).json()["requests"] == []
    for id in ids:
        assert httpx.post(f"{site.url}/admin/requests/{id}/cancel", headers=stranger).status_code == 404
    assert [one["id"] for one in listed(site)] == ids


def test_nobody_keeps_a_request_from_being_ended_by_giving_its_id_to_another(
    site: Stack, callers: ThreadPoolExecutor
) -> None:
    asked(site, callers, "first")
    id = by_name(site)["first"]["id"]
    asked(site, callers, id)  # X-Request-ID is the caller's to choose
    shown = httpx.get(f"{site.url}/admin/requests/{id}", headers=admin(site), timeout=60)
    assert (shown.status_code, shown.json().get("request_id")) == (200, "first")
    done = httpx.post(f"{site.url}/admin/requests/{id}/cancel", headers=admin(site), timeout=60)
    assert (done.status_code, done.json()["id"]) == (200, id)


def test_a_gateway_that_does_not_answer_is_named(site: Stack) -> None:
    pid = site.corral("status")["gateways"][1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with lateness() as late:
            told = httpx.get(site.url + "/admin/requests", headers=admin(site), timeout=60).json()
        assert time.monotonic() - began < 4 + max(late)
        assert told["silent"] == ["gateway-2"]
        gone = httpx.post(f"{site.url}/admin/requests/gone/cancel", headers=admin(site), timeout=60)
        assert "gateway-2 did not say in time" in gone.json()["error"]["message"]
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: httpx.get(site.url + "/admin/requests", headers=admin(site)).json()["silent"] == [], "it is back")
