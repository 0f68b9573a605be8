"""Step 4: what is asked. The body becomes one upstream dialect (`corral.wire`), held to key and fleet."""

from __future__ import annotations

from time import time
from typing import TYPE_CHECKING, Final

from corral.fleet.node import canonical_name
from corral.gateway.authenticate import Key, authorize, check, disabled, not_found
from corral.gateway.settle import outcome_of
from corral.gateway.snapshot import Snapshot
from corral.wire.decode import DECODERS, Decoded
from corral.wire.errors import ApiError

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

SHOW: Final = b"/api/show"


def decode(route: str, body: bytes, request_id: str, key: Key, snapshot: Snapshot) -> Decoded:
    """The typed request with its upstream body and its responder.

    Raises:
        ApiError: 400 naming the field; 403 for a model that is disabled; 404 for one that no node holds or the key may
            not use; 507 for one that no node has the memory for.
    """
    decoded = DECODERS[route](body, request_id, snapshot.policy, snapshot.caps)
    pool, name = snapshot.pool(key.tenant), canonical_name(decoded.model)
    authorize(key, decoded.model, pool.held, snapshot.disabled)
    _enabled(decoded.model, snapshot)
    if name in pool.too_large and decoded.upstream_path != SHOW:
        raise ApiError(507, "insufficient_memory", f"model '{decoded.model}' fits on no node: {pool.too_large[name]}")
    if snapshot.known and name not in pool.held:
        raise not_found(key, decoded.model, pool.held, snapshot.disabled)
    return decoded


def may_go_on(exchange: Exchange) -> bool:
    """Whether a request that no node has at the moment may still have one. Who may not hears what a new one would."""
    snapshot = exchange.gateway.snapshot
    try:
        check(snapshot.keys.get(exchange.key_id), time())
        _enabled(exchange.model, snapshot)
    except ApiError as error:
        exchange.give_up(error, outcome_of(error.status))
        return False
    return True


def _enabled(model: str, snapshot: Snapshot) -> None:
    if snapshot.disabled and canonical_name(model) in snapshot.disabled:
        raise disabled(model)
