"""Nodes that are a tenant's own: who is served where, and what a tenant is told of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.config.settings import Settings
from corral.fleet.node import NodeState
from corral.gateway import catalogue
from corral.gateway.decode import decode
from corral.gateway.route import resolve
from corral.gateway.schedule import is_down, schedule
from corral.gateway.snapshot import Snapshot
from corral.wire.errors import ApiError

LIMITS = {"rpm": None, "tpm": None, "concurrency": None, "daily_tokens": None, "monthly_tokens": None}


def key(name: str) -> dict[str, Any]:
    return {"id": f"key-{name}", "tenant": name, "verifiers": [], "models": ["*"], **LIMITS}


def node(name: str, *models: str) -> dict[str, Any]:
    tags = [{"name": model} for model in models]
    return {
        "name": name,
        "url": f"http://{name}",
        "slots": 4,
        "state": "ready",
        "version": "1",
        "tags": tags,
        "ps": tags,
    }


@pytest.fixture
def snapshot() -> Snapshot:
    made = Snapshot(LIMITS)
    made.apply(
        {
            "version": "v",
            "keys": [key("red"), key("blue"), key("green"), key("gone")],
            "nodes": [node("a", "m:latest", "own:latest"), node("b", "m:latest"), node("c", "m:latest", "x:latest")],
            "dedicated": {"red": ["a"], "green": ["a", "b"], "gone": ["nowhere"]},
        }
    )
    return made


def where(snapshot: Snapshot, tenant: str, model: str = "m") -> set[str]:
    """The nodes that serve a tenant, the one after the other being busy."""
    chosen = []
    for _ in range(20):
        chosen.append(schedule(snapshot, tenant, model, 1.0))
        chosen[-1].in_flight += 1
    for node in chosen:
        node.in_flight = 0
    return {node.name for node in chosen}


def test_a_tenant_is_served_by_its_own_nodes_and_they_serve_nobody_else(snapshot: Snapshot) -> None:
    assert where(snapshot, "red") == {"a"}
    assert where(snapshot, "green") == {"a", "b"}
    assert where(snapshot, "blue") == {"c"}
    with pytest.raises(ApiError, match="no node is ready"):
        schedule(snapshot, "gone", "m", 1.0)


def test_no_failure_sends_a_tenant_to_nodes_of_others(snapshot: Snapshot) -> None:
    assert schedule(snapshot, "red", "m", 1.0, ("a",)).name == "a", "tried already, and the only one"
    snapshot.nodes["a"].state = NodeState.DOWN
    with pytest.raises(ApiError) as refused:
        schedule(snapshot, "red", "m", 1.0)
    assert refused.value.status == 503
    assert not is_down(snapshot.nodes["a"], snapshot, "red", "m", 1.0), "nobody else would take it"
    assert is_down(snapshot.nodes["a"], snapshot, "green", "m", 1.0)


def test_a_tenant_is_told_of_the_models_of_its_nodes_alone(snapshot: Snapshot) -> None:
    for path in ("/api/tags", "/api/ps"):
        listed = {
            name: {one["name"] for one in json.loads(catalogue.answer(path, "", snapshot, key))["models"]}
            for name, key in snapshot.keys.items()
        }
        assert listed["key-red"] == {"m:latest", "own:latest"}
        assert listed["key-blue"] == {"m:latest", "x:latest"}
    nothing = json.loads(catalogue.answer("/v1/models", "", snapshot, snapshot.keys["key-gone"]))
    assert nothing == {"object": "list", "data": []}, "not null, which Ollama says, and OpenAI never"
    body = b'{"model": "own", "prompt": "a"}'
    route = resolve(b"POST", b"/api/generate")
    assert decode(route.path, body, "r", snapshot.keys["key-red"], snapshot).model
    with pytest.raises(ApiError) as refused:
        decode(route.path, body, "r", snapshot.keys["key-blue"], snapshot)
    assert refused.value.status == 404


def test_without_dedicated_nodes_all_are_everybodys(snapshot: Snapshot) -> None:
    snapshot.apply({"version": "w", "keys": [key("red")], "nodes": [node("a", "m:latest"), node("b", "m:latest")]})
    assert where(snapshot, "red") == where(snapshot, "blue") == {"a", "b"}


def test_the_settings_say_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        Settings.model_validate({"tenants": {"nodes": {"red": []}}})
    # The front end without keys would lead everybody to everybody's nodes.
    with pytest.raises(ValueError, match=r"edge\.ollama"):
        Settings.model_validate({"tenants": {"nodes": {"red": ["node-1"]}}, "edge": {"ollama": "127.0.0.1:11434"}})
