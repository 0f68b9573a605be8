"""What the gateway knows of keys, nodes and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from corral.fleet.node import Node, NodeState, canonical_name
from corral.fleet.pools import groups
from corral.fleet.tickets import NEVER
from corral.gateway.authenticate import Key, build_key
from corral.store.budget import TENANT, Budget, of_tenant
from corral.wire.common import CAPS, Caps
from corral.wire.options import ModelPolicy

GIB: Final = 1 << 30
NEVER_YET: Final = float("-inf")
POLL: Final = 0.5
"""Control is asked as often (seconds)."""
HEARD: Final = 6.0
"""For so long what control said last of nodes and loads holds (seconds)."""


class Pool:
    """The nodes that serve a tenant, by name, and what they hold.

    ``ready`` is what those of them hold that are ready. ``group`` names the nodes whose slots are counted together
    (`corral.fleet.pools`), ``others`` those of them that are not the tenant's, as words for who asks for a slot.
    ``too_large`` says of models that no node has the memory for, as it was declared, why that is.
    """

    def __init__(self, nodes: dict[str, Node], group: str = "", others: tuple[str, ...] = ()) -> None:
        self.nodes = nodes
        self.held = frozenset(name for node in nodes.values() for name in node.held)
        self.judge()
        self.group, self.others = group, others
        self.too_large = _too_large(nodes.values())

    def judge(self) -> None:
        """See what is ready."""
        ready = [node for node in self.nodes.values() if node.state is NodeState.READY]
        self.ready = frozenset(name for node in ready for name in node.held)


class Snapshot:
    """Keys, nodes and policies. ``confirmed`` is when its keys were what the database had, in monotonic seconds.

    ``group_of`` has the group of each node that some tenant has to itself (`corral.fleet.pools`).
    ``disabled`` are models that nobody may use for now, by canonical name. ``caps`` are those of the settings.
    ``known``: some node ever told its models; before that, nothing can be said to be missing. ``continuable`` has the
    digest of each model whose answers another node can go on with. ``on_cpu`` are the nodes with models that fell back
    to the CPU. ``heard`` is when control last answered, in monotonic seconds.
    """

    def __init__(self, defaults: Mapping[str, int | None], caps: Caps = CAPS) -> None:
        self._defaults = defaults
        self.caps = caps
        self.version = ""
        self.confirmed = NEVER_YET
        self.heard = NEVER_YET
        self.keys: dict[str, Key] = {}
        self.tenants: dict[str, Budget] = {}
        self.verified: dict[bytes, Key] = {}
        self.nodes: dict[str, Node] = {}
        self.policies: dict[str, ModelPolicy] = {}
        self.held: frozenset[str] = frozenset()
        self._shared = Pool({})
        self._pools: dict[str, Pool] = {}
        self.group_of: dict[str, str] = {}
        self.disabled: frozenset[str] = frozenset()
        self.continuable: dict[str, str] = {}
        self.known = False
        self.on_cpu: list[Node] = []
        self._judged = 0

    def apply(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; what runs on a node or counts on a key goes on."""
        tenants = self._tenants(data.get("tenants") or [])
        keys: dict[str, Key] = {}
        for entry in data["keys"]:
            key = build_key(entry, self._defaults, tenants.get(entry.get("tenant") or ""))
            old = self.keys.get(key.id)
            key.budget = key.budget.after(old.budget if old is not None else None)
            if old is not None:
                key.density = old.density
            keys[key.id] = key
        nodes: dict[str, Node] = {}
        for entry in data["nodes"]:
            node = self.nodes.get(entry["name"]) or Node(entry["name"], entry["url"], 1)
            node.update(entry)
            nodes[node.name] = node
        self.keys, self.tenants, self.nodes = keys, tenants, nodes
        self.verified = {}
        self.on_cpu = [node for node in nodes.values() if node.on_cpu]
        self.policies = {
            canonical_name(model["name"]): ModelPolicy.from_entry(model) for model in data.get("models") or []
        }
        self.held = frozenset(name for node in nodes.values() for name in node.held)
        dedicated: dict[str, list[str]] = data.get("dedicated") or {}
        self.group_of = group_of = groups(dedicated)
        self._shared = Pool({name: node for name, node in nodes.items() if name not in group_of})
        self._pools = {tenant: _pool(nodes, names, group_of) for tenant, names in dedicated.items()}
        self.disabled = frozenset(data.get("disabled") or ())
        self.continuable = data.get("continuable") or {}
        self.known = any(node.version for node in nodes.values())
        self.version = data["version"]

    def led(self, now: float) -> bool:
        """Whether control was heard lately: what it said last of nodes holds. `now` is monotonic seconds."""
        return now - self.heard <= HEARD

    def judged(self) -> None:
        """What is known of nodes is no longer what control said last: its next answer has to be all of it."""
        self._judged += 1
        self.version = f"{self.version.partition('~')[0]}~{self._judged}"
        for pool in (self._shared, *self._pools.values()):
            pool.judge()

    def _tenants(self, entries: list[dict[str, Any]]) -> dict[str, Budget]:
        # One budget a tenant, whose keys share it; a tenant without limits has none.
        tenants: dict[str, Budget] = {}
        for entry in entries:
            budget = of_tenant(entry)
            if budget is not None:
                tenants[entry["name"]] = budget.after(self.tenants.get(entry["name"]))
        return tenants

    def pool(self, tenant: str) -> Pool:
        """The nodes for a tenant: its own, or those that are nobody's own."""
        return self._pools.get(tenant, self._shared)

    def budgets(self) -> Iterable[Budget]:
        """Those of all keys."""
        return [key.budget for key in self.keys.values()]

    def budget(self, name: str) -> Budget | None:
        """That of a key or a tenant, by what the store calls it."""
        if name.startswith(TENANT):
            return self.tenants.get(name.removeprefix(TENANT))
        key = self.keys.get(name)
        return None if key is None else key.budget

    def policy(self, model: str) -> ModelPolicy | None:
        """The policy of a model by any of its names."""
        return self.policies.get(canonical_name(model))


def _too_large(nodes: Iterable[Node]) -> dict[str, str]:
    found: dict[str, tuple[float, str]] = {}
    fit: set[str] = set()
    for node in nodes:
        for entry in node.tags:
            name, size = entry["name"], entry.get("size")
            if not node.memory or not isinstance(size, int) or size <= node.memory:
                fit.add(name)
            elif name not in found or found[name][0] < node.memory:
                need, has = size / GIB, node.memory / GIB
                why = (
                    f"it needs {need:.1f} GiB of memory, and {node.name}, the largest that holds it, has {has:.1f} GiB"
                )
                found[name] = node.memory, why
    return {name: why for name, (_, why) in found.items() if name not in fit}


def _pool(nodes: dict[str, Node], names: list[str], group_of: dict[str, str]) -> Pool:
    """The pool of a tenant that has nodes to itself."""
    group = group_of[names[0]] if names else ""
    others = tuple(NEVER + name for name, of in group_of.items() if of == group and name not in names)
    return Pool({name: nodes[name] for name in names if name in nodes}, group, others)
