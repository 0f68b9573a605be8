"""A node takes traffic once it has its models of the catalogue: added, resumed, or back from the dead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import FakeNode, Running, recorded
from support.process import until
from support.servers import MODEL
from support.site import SECONDS, Site, Source, digests, resident, site
from support.site import source as sources


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with sources(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture
def here(tmp_path: Path, source: Source) -> Iterator[Site]:
    with site(tmp_path, source) as made:
        yield made


def entry(source: Source, **more: Any) -> dict[str, Any]:
    return {"name": MODEL, "digest": source.first, "options": {"num_thread": 1}, "num_ctx": 2048, **more}


def states(control: Running) -> dict[str, str]:
    """The nodes as gateways are told."""
    return {node["name"]: node["state"] for node in control.snapshot().json()["nodes"]}


def ready(control: Running, name: str) -> None:
    until(lambda: states(control).get(name) == "ready", f"{name} is in service", SECONDS)


def test_an_added_node_gets_its_models_before_it_takes_traffic(here: Site, source: Source) -> None:
    first = here.node(seeded=True)
    control = here.control(entry(source, copies=2), slow=True)
    applied = here.corral("models", "apply", "--yes")
    assert (applied.returncode, "2 copies asked for" in applied.stderr) == (0, True)
    second = here.node()
    with source.registry.halted():
        said = here.corral("nodes", "add", second.url)
        assert (said.returncode, "it is used after that" in said.stdout) == (0, True), said.stderr
        assert states(control) == {"node-1": "ready", "node-2": "draining"}
    progress = re.compile(rf"preloading {re.escape(MODEL)} \(\d+%\)")
    until(lambda: progress.search(str(control.node("node-2")["reason"])), "its progress is told")
    assert "node-2" in here.corral("nodes", "list").stdout
    ready(control, "node-2")
    assert control.node("node-2")["reason"] is None
    assert (digests(second.url), len(resident(second.url))) == ({MODEL: source.first}, 1)
    assert len(resident(first.url)) == 1
    assert here.corral("models", "apply", "--yes").stdout == "nothing to do\n"

    # By control: its canary would be on its way to a model that leaves by itself, and bring it back.
    unloaded = here.corral("models", "unload", MODEL, "--node", "node-2")
    assert unloaded.returncode == 0, unloaded.stderr
    assert (resident(second.url), control.node("node-2")["resident"]) == ([], [])
    control.admin.post("/admin/nodes/node-2/drain")
    here.corral("nodes", "resume", "node-2")
    ready(control, "node-2")
    assert len(resident(second.url)) == 1, "loaded before it was used again"

    second.kill()
    until(lambda: states(control)["node-2"] == "down", "it is down")
    second.start()
    ready(control, "node-2")
    assert len(resident(second.url)) == 1, "loaded before it was used again"


def test_where_no_other_node_serves_none_is_held_back(here: Site, source: Source) -> None:
    node = here.node()
    control = here.control(entry(source), slow=True)
    ready(control, "node-1")
    control.admin.post("/admin/nodes/node-1/drain")
    assert control.admin.post("/admin/nodes/node-1/resume").json()["state"] == "ready"
    until(lambda: digests(node.url) == {MODEL: source.first}, "it gets its model all the same", SECONDS)


def test_a_node_is_held_back_no_longer_than_others_serve(here: Site, source: Source) -> None:
    first, second = here.node(seeded=True), here.node()
    control = here.control(entry(source), slow=True, nodes=[{"url": first.url}])
    with source.registry.halted():
        control.admin.post("/admin/nodes", json={"url": second.url})
        assert states(control)["node-2"] == "draining", "it is held back"
        first.kill()
        ready(control, "node-2")
        assert "no other node is in service" in control.node("node-2")["reason"]


def test_preloading_has_a_bound(here: Site, source: Source) -> None:
    first, second = here.node(seeded=True), here.node()
    control = here.control(entry(source), slow=True, nodes=[{"url": first.url}], preload={"timeout": 1})
    with source.registry.halted():
        control.admin.post("/admin/nodes", json={"url": second.url})
        ready(control, "node-2")
        assert "preload.timeout (1 s) is over" in control.node("node-2")["reason"]
    until(lambda: digests(second.url) == {MODEL: source.first}, "the pull goes on", SECONDS)
    until(lambda: control.node("node-2")["reason"] is None, "its models are there", SECONDS)


def test_a_node_that_cannot_be_preloaded_is_used_with_a_warning(here: Site, source: Source) -> None:
    first, second = here.node(seeded=True), here.node()
    wrong = entry(source, digest=f"sha256:{'0' * 64}")
    control = here.control(wrong, nodes=[{"url": first.url}])
    control.admin.post("/admin/nodes", json={"url": second.url})
    ready(control, "node-2")
    assert "preloading failed: node-2: smollm2:135m: wrong digest" in control.node("node-2")["reason"]
    assert digests(second.url) == {}


def test_nobody_has_to_wait_for_it(here: Site, source: Source) -> None:
    first, second = here.node(seeded=True), here.node()
    control = here.control(entry(source), slow=True, nodes=[{"url": first.url}])
    control.admin.post("/admin/nodes", json={"url": second.url})
    operation = here.begun("preload", "node-2")
    here.pulling(operation)
    with source.registry.halted():
        assert here.corral("nodes", "resume", "node-2", "--no-preload").returncode == 0
        assert states(control)["node-2"] == "ready"
        rows = [row for row in recorded(control.admin) if row["route"] == "/admin/nodes/node-2/resume"]
        assert [row["after"]["preloading"] for row in rows] == [None], "what puts it into service is on record"
        control.admin.delete("/admin/nodes/node-2")
    third = here.node()
    added = control.admin.post("/admin/nodes", json={"url": third.url, "preload": False}).json()
    assert (added["state"], added["reason"], digests(third.url)) == ("ready", None, {})
    assert here.ended(operation)["state"] == "cancelled"


def test_a_removed_node_takes_its_preloading_along(here: Site, source: Source) -> None:
    first, second = here.node(seeded=True), here.node()
    control = here.control(entry(source), slow=True, nodes=[{"url": first.url}])
    control.admin.post("/admin/nodes", json={"url": second.url})
    operation = here.begun("preload", "node-2")
    here.pulling(operation)
    with source.registry.halted():
        assert control.admin.delete("/admin/nodes/node-2").json()["removed"] is True
        assert here.ended(operation)["state"] == "cancelled"


def test_without_a_catalogue_nothing_is_held_back(tmp_path: Path) -> None:
    nodes = [FakeNode(), FakeNode()]
    control = Running(tmp_path, nodes=[{"url": nodes[0].url}])
    try:
        assert control.admin.post("/admin/nodes", json={"url": nodes[1].url}).json()["state"] == "ready"
        control.admin.post("/admin/nodes/node-2/drain")
        assert control.admin.post("/admin/nodes/node-2/resume").json()["state"] == "ready"
        assert control.admin.get("/admin/operations").json() == {"operations": []}
        assert control.admin.get("/admin/models/plan").json()["catalogue"] == 0
    finally:
        control.close()
        for node in nodes:
            node.close()


def test_what_failed_is_said_until_it_is_there_or_not_asked_for(tmp_path: Path) -> None:
    nodes = [FakeNode(), FakeNode()]
    names = [{"name": name} for name in ("x", "y", "z")]
    control = Running(tmp_path, nodes=[{"url": nodes[0].url}], models=names)

    def failed() -> str:
        return control.node("node-2")["reason"] or ""

    try:
        control.admin.post("/admin/nodes", json={"url": nodes[1].url}).raise_for_status()
        until(lambda: failed().startswith("preloading failed: node-2: x:latest"), "it says so", SECONDS)
        assert all(f"node-2: {name}:latest: " in failed() for name in "xyz")
        control.admin.put("/admin/models/catalogue", json=names[1:]).raise_for_status()
        assert failed().startswith("preloading failed: node-2: y:latest: ") and "node-2: z:latest: " in failed()
        nodes[1].obedient = True
        control.admin.post("/admin/models/preload", json={"models": ["y"], "nodes": ["node-2"]}).raise_for_status()
        until(lambda: "y:latest" not in failed(), "it is there", SECONDS)
        assert failed().startswith("preloading failed: node-2: z:latest: ")
        control.admin.put("/admin/models/catalogue", json=[]).raise_for_status()
        assert failed() == ""
    finally:
        control.close()
        for node in nodes:
            node.close()
