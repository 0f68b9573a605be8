"""What `corral config reload` finds changed, and the order in which nodes come and go."""

from __future__ import annotations

from typing import Any

from corral.config.settings import Settings
from corral.stack.reload import Changes, _apply, changes


def settings(*urls: str, **sections: Any) -> Settings:
    return Settings.model_validate({"nodes": [{"name": url[7:], "url": url} for url in urls], **sections})


def names(found: Changes) -> tuple[list[str], list[str], list[str]]:
    return [node.name for node in found.add], [node.name for node in found.remove], found.restart


def test_nothing_changed() -> None:
    assert names(changes(settings("http://a"), settings("http://a"), True)) == ([], [], [])


def test_nodes_come_and_go_and_the_rest_waits_for_a_restart() -> None:
    old = settings("http://a", "http://b", limits={"default": {"rpm": 5}})
    new = settings("http://b", "http://c", models=[{"name": "m"}], gateway={"queue": {"length": 9}})
    assert names(changes(old, new, True)) == (
        ["c"],
        ["a"],
        ["gateway.queue.length", "limits.default.rpm"],
    )
    assert [model.name for model in changes(old, new, True).models or ()] == ["m"]


def test_the_catalogue_comes_before_the_nodes_that_are_given_its_models() -> None:
    asked: list[str] = []

    def ask(method: str, path: str, body: object) -> Any:
        asked.append(f"{method} {path}")
        return {"nodes": []}

    done = list(_apply(changes(settings(), settings("http://c", models=[{"name": "m"}]), True), ask))
    assert asked == ["PUT /models/catalogue", "GET /nodes", "POST /nodes"]
    assert (done[0].partition(":")[0], done[1]) == ("models", "nodes: c added")


def test_a_node_that_stays_but_differs_waits_for_a_restart() -> None:
    old, new = settings("http://a"), Settings.model_validate({"nodes": [{"name": "a", "url": "http://a", "slots": 9}]})
    assert names(changes(old, new, True)) == ([], [], ["nodes.a.slots"])


def test_nodes_of_a_file_that_the_stack_does_not_use() -> None:
    assert names(changes(settings("http://a"), settings("http://b"), False)) == ([], [], ["nodes"])


def test_nodes_are_added_before_others_go_but_one_address_has_one_name_at_a_time() -> None:
    found = Changes(
        add=[
            *settings("http://c").nodes,
            *Settings.model_validate({"nodes": [{"name": "x", "url": "http://b"}]}).nodes,
        ],
        remove=list(settings("http://a", "http://b", "http://gone").nodes),
    )
    asked: list[tuple[str, str]] = []

    def ask(method: str, path: str, body: object) -> Any:
        asked.append((method, body["name"] if isinstance(body, dict) else path))
        return {"nodes": [{"name": name, "url": f"http://{name}"} for name in ("a", "b", "z")]}

    done = list(_apply(found, ask))
    assert asked[1:] == [("DELETE", "/nodes/b"), ("POST", "c"), ("POST", "x"), ("DELETE", "/nodes/a")]
    assert done == ["nodes: b removed", "nodes: c added", "nodes: x added", "nodes: a removed"]
