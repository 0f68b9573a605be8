"""The catalogue in force on real Ollama nodes, pulled from a real registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.control import make_key
from support.process import until
from support.servers import MODEL, Server, embedded_node
from support.site import Site, Source, digests, resident, site
from support.site import source as sources

from corral.wire.decode import DECODERS
from corral.wire.options import ModelPolicy

WRONG = f"sha256:{'0' * 64}"
OPTIONS = {"num_thread": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with sources(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture
def here(tmp_path: Path, source: Source) -> Iterator[Site]:
    source.publish("first")
    with site(tmp_path, source) as made:
        yield made


def entry(digest: str | None, **more: Any) -> dict[str, Any]:
    return {"name": MODEL, "digest": digest, "options": OPTIONS, **more}


def test_apply_pulls_verifies_and_loads_as_requests_need_it(here: Site, source: Source) -> None:
    first, second = here.node(), here.node()
    model = entry(source.first, copies=2, num_ctx=2048)
    control = here.control(model)
    planned = here.corral("models", "plan")
    assert planned.returncode == 0
    for step in ("pull", "load"):
        assert f"{step} {MODEL} on node-1" in planned.stdout and f"{step} {MODEL} on node-2" in planned.stdout
    refused = here.corral("models", "apply")
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)

    applied = here.corral("models", "apply", "--yes")
    assert (applied.returncode, applied.stdout) == (0, "done\n"), applied.stderr
    # How far a pull is stands in the tests with a slow registry: this one may be over before anybody asks.
    assert applied.stderr.count(f"done ({source.first})") == 2, applied.stderr
    for node in (first, second):
        assert digests(node.url) == {MODEL: source.first}
        (loaded,) = resident(node.url)
        assert (loaded["context_length"], loaded["expires_at"] > "2100") == (2048, True)
    assert control.node()["resident"] == [MODEL]

    # A request as a gateway sends it finds the runner that is there.
    runners = first.runners()
    assert len(runners) == 1
    body = b'{"model": "smollm2:135m", "prompt": "a", "options": {"num_predict": 1}}'
    decoded = DECODERS["/api/generate"](body, "r", lambda _: ModelPolicy.from_entry(model))
    assert httpx.post(first.url + "/api/generate", content=decoded.body, timeout=60).status_code == 200
    assert (first.runners(), len(resident(first.url))) == (runners, 1)

    again = json.loads(here.corral("models", "plan", "--json").stdout)
    assert (again["steps"], again["problems"]) == ([], [])
    assert here.corral("models", "apply", "--yes").stdout == "nothing to do\n"
    (listed,) = json.loads(here.corral("models", "list", "--json").stdout)
    assert (listed["match"], listed["resident"], listed["size"] > 98_000_000) == ("ok", ["node-1", "node-2"], True)
    told = json.loads(here.corral("models", "why", MODEL, "--json").stdout)
    assert (told["model"], told["decisions"]) == (MODEL, [])
    assert here.corral("models", "why", "nobodys").returncode == 1
    audit = control.admin.get("/admin/audit").json()["audit"]
    begun, ended = [row for row in audit if row["route"].startswith(("/admin/models", "/admin/operations"))][:2]
    assert (begun["route"], begun["status"], len(begun["after"]["steps"])) == ("/admin/models/apply", 202, 4)
    assert (ended["outcome"], ended["after"]["state"]) == ("ok", "done")


def test_a_wrong_digest_is_not_taken_into_service(here: Site, source: Source) -> None:
    empty, full = here.node(), here.node(seeded=True)
    here.control(entry(WRONG))
    seen: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for node in here.running.snapshot().json()["nodes"]:
                seen.update(f"{node['name']} {tag['name']} sha256:{tag['digest']}" for tag in node["tags"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        applied = here.corral("models", "apply", "--yes")
    finally:
        stop.set()
        watcher.join()
    assert applied.returncode == 1
    for node in ("node-1", "node-2"):
        assert (
            f"corral: {node}: {MODEL}: wrong digest: got {source.first}, the catalogue's is {WRONG}" in applied.stderr
        )
    assert digests(empty.url) == {}
    assert digests(full.url) == {MODEL: source.first}, "what was in use stays in use"
    assert seen == {f"node-2 {MODEL} {source.first}"}, "no gateway ever heard of anything else"


def test_a_direct_pull_of_a_wrong_version_is_undone(here: Site, source: Source) -> None:
    node = here.node()
    name = f"{source.registry.name}/library/smollm2:135m"
    here.control({"name": name, "digest": source.first})
    assert here.corral("models", "apply", "--yes").returncode == 0
    assert digests(node.url) == {name: source.first}
    source.publish("second")
    here.running.admin.put("/admin/models/catalogue", json=[{"name": name, "digest": WRONG}])
    applied = here.corral("models", "apply", "--yes")
    assert (applied.returncode, f"got {source.second}" in applied.stderr) == (1, True)
    assert digests(node.url) == {name: source.first}


def test_without_a_digest_the_first_one_is_recorded_and_drift_is_seen(here: Site, source: Source) -> None:
    here.node()
    drifting = here.node(seeded=True)
    here.control(entry(None))
    planned = here.corral("models", "plan")
    assert f"the digest of node-2 is recorded: {source.first}" in planned.stdout
    assert here.corral("models", "apply", "--yes").returncode == 0
    (listed,) = json.loads(here.corral("models", "list", "--json").stdout)
    assert (listed["expected"], listed["stated"], listed["match"]) == (source.first, False, "ok")

    # Somebody pulls by hand, and gets what the tag has become meanwhile.
    source.publish("second")
    name = f"{source.registry.name}/library/{MODEL}"
    pull = {"model": name, "insecure": True, "stream": False}
    assert httpx.post(drifting.url + "/api/pull", json=pull, timeout=60).json() == {"status": "success"}
    httpx.post(drifting.url + "/api/copy", json={"source": name, "destination": MODEL}).raise_for_status()
    httpx.request("DELETE", drifting.url + "/api/delete", json={"model": name}).raise_for_status()
    planned = here.corral("models", "plan")
    assert f"digest differs: recorded {source.first}, held {source.second}" in planned.stdout
    applied = here.corral("models", "apply", "--yes")
    assert (applied.returncode, f"models pull {MODEL} --accept" in applied.stderr) == (1, True)

    assert here.corral("models", "pull", MODEL, "--accept").returncode == 0
    assert [digests(node.url)[MODEL] for node in here.nodes] == [source.second] * 2
    until(lambda: [one for node in here.nodes for one in resident(node.url)] == [], "the old version leaves memory")
    assert here.corral("models", "apply", "--yes").returncode == 0
    (listed,) = json.loads(here.corral("models", "list", "--json").stdout)
    assert (listed["expected"], listed["match"]) == (source.second, "ok")


def test_an_update_can_be_rolled_back_without_a_registry(here: Site, source: Source) -> None:
    node = here.node(seeded=True)
    control = here.control(entry(source.first, num_ctx=2048))
    assert here.corral("models", "apply", "--yes").returncode == 0
    source.publish("second")
    put = control.admin.put("/admin/models/catalogue", json=[entry(source.second, num_ctx=2048)])
    assert put.status_code == 200
    assert control.snapshot().json()["models"][0]["digest"] == source.second
    assert here.corral("models", "apply", "--yes").returncode == 0
    (loaded,) = resident(node.url)
    assert f"sha256:{loaded['digest']}" == source.second, "the old version has left memory"
    assert control.node()["models"] == [MODEL], "the previous version is nobody's to ask for"

    control.admin.put("/admin/models/catalogue", json=[entry(source.first, num_ctx=2048)])
    planned = here.corral("models", "plan")
    assert f"copy {MODEL} on node-1 from corral-previous/smollm2:135m" in planned.stdout
    assert here.corral("models", "apply", "--yes").returncode == 0
    assert digests(node.url)[MODEL] == source.first
    (loaded,) = resident(node.url)
    assert f"sha256:{loaded['digest']}" == source.first
    control.admin.put("/admin/models/catalogue", json=[entry(None, num_ctx=2048)])
    assert "nothing to do" in here.corral("models", "plan").stdout
    (listed,) = json.loads(here.corral("models", "list", "--json").stdout)
    assert (listed["expected"], listed["stated"]) == (source.first, False), "what was stated once is recorded"

    control.admin.put("/admin/models/catalogue", json=[])
    assert here.corral("models", "remove", MODEL, "--yes").returncode == 0
    assert (digests(node.url), resident(node.url)) == ({}, [])


def test_a_node_that_dies_in_a_pull_is_named_and_others_go_on(here: Site, source: Source) -> None:
    dying, other = here.node(), here.node()
    here.control(entry(source.first), slow=True)
    running = here.start("models", "apply", "--yes")
    operation = here.begun("apply")
    here.pulling(operation)
    with source.registry.halted():
        steps = here.operation(operation)["steps"]
        (first,) = [step["node"] for step in steps if (step["progress"] or {}).get("total")]
        victim, survivor = (dying, other) if first == "node-1" else (other, dying)
        victim.kill()
    ended = running.finish()
    assert ended.returncode == 1
    assert f"corral: {first}: {MODEL}: the node " in ended.stderr
    assert digests(survivor.url) == {MODEL: source.first}


def test_a_cancelled_operation_leaves_nothing_in_use(here: Site, source: Source) -> None:
    node = here.node()
    here.control(entry(source.first), slow=True)
    started = here.post("models/pull", models=[MODEL]).json()
    here.pulling(started["id"])
    with source.registry.halted():
        busy = here.corral("models", "apply", "--yes")
        assert busy.returncode == 1
        assert f"node-1 is at work for {started['id']} (pull, of key " in busy.stderr
        cancelled = here.corral("models", "cancel", started["id"], "--json")
        assert json.loads(cancelled.stdout)["state"] == "cancelled"
        assert digests(node.url) == {}
    # What came in before is not asked for again.
    again = here.start("models", "pull", MODEL, "--json").finish()
    assert (again.returncode, json.loads(again.stdout)["state"]) == (0, "done")
    assert here.corral("models", "watch").stdout == "nothing runs\n"
    assert here.running.node()["models"] == [MODEL]


def test_an_operation_goes_on_when_its_caller_leaves(here: Site, source: Source) -> None:
    node = here.node()
    here.control(entry(source.first), slow=True)
    running = here.start("models", "apply", "--yes")
    operation = here.begun("apply")
    running.kill()
    watched = here.corral("models", "watch", operation)
    assert (watched.returncode, watched.stdout) == (0, "done\n"), watched.stderr
    assert digests(node.url) == {MODEL: source.first}


def test_load_and_unload(here: Site, source: Source) -> None:
    node = here.node(seeded=True)
    here.control(entry(source.first, pin=True), nodes=[{"url": node.url, "max_models": 1}])
    httpx.post(node.url + "/api/copy", json={"source": MODEL, "destination": "other:1"}).raise_for_status()
    assert here.corral("models", "load", MODEL, "--node", "node-1").returncode == 0
    assert [one["name"] for one in resident(node.url)] == [MODEL]
    full = here.corral("models", "load", "other:1")
    assert (full.returncode, "no room (max_models 1)" in full.stderr) == (1, True)
    pinned = here.corral("models", "unload", MODEL)
    assert (pinned.returncode, "pinned" in pinned.stderr, len(resident(node.url))) == (1, True, 1)
    assert here.corral("models", "unload", MODEL, "--force").returncode == 0
    assert resident(node.url) == []
    missing = here.corral("models", "load", "nosuch:1")
    assert (missing.returncode, "node-1: nosuch:1: the node does not hold it" in missing.stderr) == (1, True)
    unknown = here.corral("models", "pull", "nosuch:1")
    assert (unknown.returncode, "node-1: nosuch:1: the pull of " in unknown.stderr) == (1, True)
    nowhere = here.corral("models", "pull", MODEL, "--node", "node-9")
    assert (nowhere.returncode, "there is no node 'node-9'; did you mean 'node-1'?" in nowhere.stderr) == (1, True)
    kept = here.corral("models", "remove", MODEL, "--yes")
    assert (kept.returncode, "take it out of corral.yaml" in kept.stderr) == (1, True)


@contextmanager
def llama(folder: Path) -> Iterator[Server]:
    folder.mkdir()
    with embedded_node(folder) as server:
        yield server


def test_the_embedded_node_says_that_it_cannot_pull(here: Site, source: Source, tmp_path: Path) -> None:
    with llama(tmp_path / "llama") as server:
        here.control(entry(None, num_ctx=2048), {"name": "more:1b"}, nodes=[{"url": server.url}])
        applied = here.corral("models", "apply", "--yes")
        assert applied.returncode == 1
        assert "node-1: more:1b: this node cannot pull models" in applied.stderr
        (loaded,) = resident(server.url)
        assert (loaded["name"], loaded["context_length"]) == (MODEL, 2048)


def test_who_may(here: Site, source: Source) -> None:
    here.node(seeded=True)
    control = here.control(entry(source.first))
    operator, inference = make_key(control, role="operator"), make_key(control)
    reads = ("models", "models/plan", "operations")
    with control.client(operator["key"]) as client:
        assert [client.get(f"/admin/{path}").status_code for path in reads] == [200] * 3
        started = client.post("/admin/models/load", json={"models": [MODEL]})
        assert (started.status_code, started.json()["by"]) == (202, operator["id"])
        assert client.put("/admin/models/catalogue", json=[]).status_code == 403
    assert here.ended(started.json()["id"])["state"] == "done"
    with control.client(inference["key"]) as client:
        assert [client.get(f"/admin/{path}").status_code for path in reads] == [403] * 3
        assert client.post("/admin/models/unload", json={"models": [MODEL]}).status_code == 403
    bad = here.post("models/pull", models=["../x"])
    assert (bad.status_code, "models" in bad.json()["error"]["message"]) == (400, True)
    assert here.post("models/pull").status_code == 400
    assert here.post("models/apply", plan="other").json()["error"]["code"] == "plan_changed"
    assert control.admin.get("/admin/operations/op-1").status_code == 404
    paths = control.admin.get("/openapi.json").json()["paths"]
    assert {"/admin/models/apply", "/admin/models/unload", "/admin/operations/{operation}"} <= paths.keys()
