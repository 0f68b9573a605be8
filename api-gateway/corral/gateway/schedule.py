"""Step 6 of what runs without a slot: which node. A pure choice over the fleet, or the reason why there is none.

All else has its node from the store (`corral.gateway.queue`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from corral.fleet.choose import choose
from corral.fleet.node import Node, NodeState, canonical_name
from corral.gateway.snapshot import Snapshot
from corral.wire.errors import ApiError

RETRY_AFTER: Final = 2


def schedule(snapshot: Snapshot, tenant: str, model: str, now: float, tried: Collection[str] = ()) -> Node:
    """The node of a tenant's for a request; `tried` are the names of nodes that failed it already.

    Raises:
        ApiError: 503 with Retry-After where no node can take it now, 404 where no node has the model.
    """
    pool, name = snapshot.pool(tenant), canonical_name(model)
    node = choose(pool.nodes.values(), name, now, tried)
    if node is not None:
        return node
    if name in pool.held or not pool.held:
        message = f"no node that holds '{model}' is ready" if name in pool.held else "no node is ready"
        raise ApiError(503, "overloaded", message, retry_after=RETRY_AFTER)
    raise ApiError(404, "model_not_found", f"model '{model}' not found", param="model")


def digest_on(node: Node, name: str) -> str:
    """The digest of a model (canonical name) on a node, "" where it has none."""
    for entry in node.tags:
        if entry["name"] == name:
            return str(entry.get("digest") or "")
    return ""


def elsewhere(
    snapshot: Snapshot, tenant: str, model: str, digest: str, now: float, tried: Collection[str]
) -> Node | None:
    """A node of a tenant's that holds the very same file under the model's name; None where there is none.

    `tried` are used only where no other is left: what has crashed in one may well be up again.
    """
    name = canonical_name(model)
    alike = [node for node in snapshot.pool(tenant).nodes.values() if digest_on(node, name) == digest]
    return choose(alike, name, now, tried)


def is_down(node: Node, snapshot: Snapshot, tenant: str, model: str, now: float) -> bool:
    """Whether a node that has a request is down, and another one would take it."""
    if node.state is not NodeState.DOWN:
        return False
    return choose(snapshot.pool(tenant).nodes.values(), canonical_name(model), now) is not None
