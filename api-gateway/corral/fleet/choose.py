"""Which node serves a request."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from corral.fleet.node import Node, NodeState


def choose(nodes: Iterable[Node], model: str, now: float, tried: Collection[str] = ()) -> Node | None:
    """The least busy node that holds `model` (canonical name), or None.

    Nodes with a free slot come first, among them those where the model is resident, among those the one
    with the smallest share of its slots in use. Nodes in `tried`, nodes that failed or did not have the model a moment
    ago, runners that are suspect and those that fell back to the CPU are used only where no other is left, those that
    did not fail this request first: a second try on a node that came back is better than an error.
    """
    best: Node | None = None
    best_rank = 0.0
    for node in nodes:
        if node.state is not NodeState.READY or model not in node.held:
            continue
        # One number, as a tuple would be made anew for each node: what weighs more is out of reach of what weighs less.
        rank = node.in_flight / node.slots
        if model not in node.resident:
            rank += 1e4
        if node.in_flight >= node.slots:
            rank += 1e8
        if node.name in tried or model in node.suspects:
            rank += 1e14
        elif node.lost and node.lost.get(model, 0.0) > now:
            rank += 1e13
        elif node.shunned_until > now:
            rank += 1e12
        elif node.on_cpu and model in node.on_cpu:
            rank += 1e11
        if best is None or rank < best_rank:
            best, best_rank = node, rank
    return best
