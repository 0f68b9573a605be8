"""Which node serves a request."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from corral.fleet.node import Node, NodeState


def choose(nodes: Iterable[Node], model: str, now: float, tried: Collection[str] = ()) -> Node | None:
    """The least busy node that holds `model` (canonical name), or None.

    Nodes with a free slot come first, among them those where the model is resident, among those the one
    with the smallest share of its slots in use. Nodes in `tried` and nodes that failed a moment ago are used
    only where no other is left: a second try on a node that came back is better than an error.
    """
    best: Node | None = None
    best_rank: tuple[bool, bool, bool, float] | None = None
    for node in nodes:
        if node.state is not NodeState.READY or model not in node.held:
            continue
        rank = (
            node.name in tried or node.shunned_until > now,
            node.in_flight >= node.slots,
            model not in node.resident,
            node.in_flight / node.slots,
        )
        if best_rank is None or rank < best_rank:
            best, best_rank = node, rank
    return best
