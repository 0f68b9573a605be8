"""Which nodes a request is kept from: what this gateway sees by itself, the store does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from corral.fleet.node import Node, NodeState
from corral.fleet.pools import model_of
from corral.fleet.tickets import LATE, NEVER
from corral.gateway.snapshot import Pool
from corral.store.slots import Wanted

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway


def unfit(node: Node, wanted: Wanted, now: float) -> bool:
    """Whether a request must not go where it was sent."""
    if node.state is not NodeState.READY:
        return True
    words = wanted.preferred
    if NEVER + node.name in words:
        return True
    if node.shunned_until <= now and not node.lost and not node.suspects and not node.on_cpu:
        return False
    model = model_of(wanted.model)
    troubled = _failed(node, model, now) or model in node.suspects or model in node.on_cpu
    return troubled and LATE + node.name not in words


def avoided(
    gateway: Gateway, exchange: Exchange, pool: Pool, name: str, troubled: Iterable[str], now: float
) -> tuple[str, ...]:
    """Nodes that a request for a model is kept from, as words for the store; `troubled` failed lately."""
    never: dict[str, None] = {}
    for node in exchange.bounced:
        known = pool.nodes.get(node)
        if known is None or known.state is not NodeState.READY:
            never[node] = None
    # One that is gone is not asked again at once, though no other has the model in memory, or a node that dies slowly
    # is taken for two that died: the request waits until the leader has it elsewhere, or this one may be back.
    for node in exchange.tried:
        known = pool.nodes.get(node)
        if known is not None and known.gone_until > now:
            never[node] = None
    if exchange.held_until > now:
        never.update(dict.fromkeys(pool.nodes))
    resume = exchange.resumption
    if resume is not None:
        for other in pool.nodes.values():
            if not resume.suits(other):
                never[other.name] = None
    # In the order in which they are used where no other is left, as in `choose`.
    slow = [node.name for node in gateway.snapshot.on_cpu if name in node.on_cpu]
    shunned: list[str] = []
    lost: list[str] = []
    for node in troubled:
        known = pool.nodes.get(node)
        if known is not None and _failed(known, name, now):
            (lost if known.lost and name in known.lost else shunned).append(node)
    last = [node for node, model in gateway.health.canaries if model == name]
    last += exchange.tried
    failed = [node for node in shunned + lost if node not in last] + last
    late = dict.fromkeys([node for node in slow if node not in failed] + failed)
    words = [NEVER + node for node in never]
    words += [LATE + node for node in late if node in pool.nodes and node not in never]
    return tuple(words)


def _failed(node: Node, model: str, now: float) -> bool:
    return node.shunned_until > now or (bool(node.lost) and node.lost.get(model, 0.0) > now)
