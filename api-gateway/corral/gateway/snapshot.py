"""What the gateway knows of keys, nodes and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from corral.fleet.node import Node, canonical_name
from corral.gateway.authenticate import Key, build_key
from corral.store.budget import Budget
from corral.wire.options import ModelPolicy


class Snapshot:
    """Keys, nodes and policies. ``confirmed`` is when control last confirmed it, in epoch seconds.

    ``known``: some node ever told its models; before that, nothing can be said to be missing.
    """

    def __init__(self, defaults: Mapping[str, int | None]) -> None:
        self._defaults = defaults
        self.version = ""
        self.confirmed = 0.0
        self.keys: dict[str, Key] = {}
        self.verified: dict[bytes, Key] = {}
        self.nodes: dict[str, Node] = {}
        self.policies: dict[str, ModelPolicy] = {}
        self.held: frozenset[str] = frozenset()
        self.known = False

    def apply(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; what runs on a node or counts on a key goes on."""
        keys: dict[str, Key] = {}
        for entry in data["keys"]:
            key = build_key(entry, self._defaults)
            old = self.keys.get(key.id)
            if old is not None:
                if old.budget.same(key.budget):
                    key.budget = old.budget
                else:
                    key.budget.inherit(old.budget)
            keys[key.id] = key
        nodes: dict[str, Node] = {}
        for entry in data["nodes"]:
            node = self.nodes.get(entry["name"]) or Node(entry["name"], entry["url"], 1)
            node.update(entry)
            nodes[node.name] = node
        self.keys, self.nodes = keys, nodes
        self.verified = {}
        self.policies = {
            canonical_name(model["name"]): ModelPolicy.from_entry(model) for model in data.get("models") or []
        }
        self.held = frozenset(name for node in nodes.values() for name in node.held)
        self.known = any(node.version for node in nodes.values())
        self.version = data["version"]

    def budgets(self) -> Iterable[Budget]:
        """Those of all keys."""
        return [key.budget for key in self.keys.values()]

    def budget(self, name: str) -> Budget | None:
        """That of a key, by its id."""
        key = self.keys.get(name)
        return None if key is None else key.budget

    def policy(self, model: str) -> ModelPolicy | None:
        """The policy of a model by any of its names."""
        return self.policies.get(canonical_name(model))
