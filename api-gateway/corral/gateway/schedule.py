"""Step 6 of what runs without a slot: which node. A pure choice over the fleet, or the reason why there is none.

All else has its node from the store (`corral.gateway.queue`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from corral.fleet.choose import choose
from corral.fleet.node import Node, NodeState, canonical_name
from corral.gateway.snapshot import POLL, Snapshot
from corral.wire.errors import ApiError, overloaded

if TYPE_CHECKING:
    from corral.gateway.state import State

LOOKED_EACH: Final = 1.0
"""Seconds from one look at a node to the next: control's, or while that is away this gateway's own."""


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
        raise overloaded(message, ready_in(snapshot, tenant, name, now))
    raise ApiError(404, "model_not_found", f"model '{model}' not found", param="model")


def ready_in(snapshot: Snapshot, tenant: str, name: str, now: float) -> float:
    """Seconds until one of a tenant's nodes may take requests for a model (canonical name) again.

    One that failed is left alone for a moment; of one that is not ready the next look at it may tell that it is.
    """
    nodes = [node for node in snapshot.pool(tenant).nodes.values() if name in node.held]
    shunned = [node.shunned_until - now for node in nodes if node.state is NodeState.READY]
    return min([left for left in shunned if left > 0.0], default=looked_at_in(snapshot, now))


def ready_for(exchange: State, now: float) -> float:
    """The same for a request that failed."""
    return ready_in(exchange.gateway.snapshot, exchange.tenant, canonical_name(exchange.model), now)


def looked_at_in(snapshot: Snapshot, now: float) -> float:
    """Seconds until this gateway has heard of the next look at the nodes: control looks, and then is asked."""
    return LOOKED_EACH + max(0.0, snapshot.heard + POLL - now)


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
