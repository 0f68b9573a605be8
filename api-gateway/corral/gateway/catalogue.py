"""What the fleet holds, as each API lists it, and only what the key may use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec

from corral.fleet.node import Node, NodeState, canonical_name
from corral.gateway import heads
from corral.gateway.authenticate import Key, disabled, not_found
from corral.gateway.route import model_of
from corral.gateway.schedule import looked_at_in
from corral.gateway.snapshot import Snapshot
from corral.wire.errors import ApiError, overloaded

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

_encode: Final = msgspec.json.Encoder().encode


def answer(path: str, name: str, snapshot: Snapshot, key: Key) -> bytes:
    """The body of a route that the fleet answers; `name` is the model of `/v1/models/{id}`.

    Raises:
        ApiError: 403 for a model that is disabled; 404 for one that nobody holds or the key may not use; 503 with no
            node known.
    """
    if path == "/api/version":
        versions = {node.version for node in snapshot.nodes.values() if node.version}
        if not versions:
            raise overloaded("no node has told its version yet", looked_at_in(snapshot, monotonic()))
        return _encode({"version": min(versions, key=_version)})
    if path == "/api/ps":
        return _encode({"models": _merge(snapshot, key, lambda node: node.ps)})
    tags = _merge(snapshot, key, lambda node: node.tags)
    if path == "/api/tags":
        return _encode({"models": tags})
    if path == "/v1/models":
        return _encode({"object": "list", "data": [_openai(tag) for tag in tags]})
    wanted = canonical_name(name)
    for tag in tags:
        if tag["name"] == wanted:
            return _encode(_openai(tag) | {"id": name})
    if wanted in snapshot.disabled and key.may_use(wanted):
        raise disabled(name)
    raise not_found(key, name, [tag["name"] for tag in tags])


def serve(exchange: Exchange) -> None:
    """Answer such a request, which has waited for no node."""
    key, exchange.nodeless_since = exchange.key, 0.0
    assert key is not None
    try:
        name = model_of(exchange.target) if exchange.path == "/v1/models/{id}" else ""
        body = answer(exchange.path, name, exchange.gateway.snapshot, key)
    except ApiError as error:
        exchange.refuse(error)
        return
    content_type = heads.NATIVE_JSON if exchange.path.startswith("/api/") else heads.JSON
    exchange.finish_whole(200, heads.own(exchange.request_id, exchange.own_headers, content_type), body)


def readiness(snapshot: Snapshot, now: float, stale_after: float) -> tuple[int, bytes]:
    """Status and body of `/health/ready`. `now` is monotonic seconds."""
    if not snapshot.version:
        reason = "no snapshot of keys and nodes yet"
    elif now - snapshot.confirmed > stale_after:
        reason = "the snapshot of keys is too old: control or its database is away"
    elif not any(node.state is NodeState.READY for node in snapshot.nodes.values()):
        reason = "no node is ready"
    else:
        return 200, b'{"status":"healthy"}'
    return 503, _encode({"status": "unhealthy", "reason": reason})


def _merge(snapshot: Snapshot, key: Key, entries: Callable[[Node], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    # One entry a model, from the first node by name that has it; a node that is down lists nothing.
    merged: dict[str, dict[str, Any]] = {}
    for node in sorted(snapshot.pool(key.tenant).nodes.values(), key=lambda node: node.name):
        if node.state is NodeState.DOWN:
            continue
        for entry in entries(node):
            if key.may_use(entry["name"]) and entry["name"] not in snapshot.disabled:
                merged.setdefault(entry["name"], entry)
    return sorted(merged.values(), key=lambda entry: str(entry.get("modified_at", "")), reverse=True)


def _openai(tag: dict[str, Any]) -> dict[str, Any]:
    name = tag["name"]
    owner = name.rpartition("/")[0].rpartition("/")[2] or "library"
    return {"id": name, "object": "model", "created": _epoch(tag.get("modified_at")), "owned_by": owner}


def _epoch(text: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(text)[:19] + str(text)[-6:].replace("Z", "+00:00")).timestamp())
    except ValueError:
        return 0


def _version(text: str) -> tuple[int, ...]:
    # A node's word: "²" is a digit to Python and no number, and one of thousands of digits is refused by int().
    parts = text[:64].split("-")[0].split(".")
    return tuple(int(part) if part.isascii() and part.isdecimal() else 0 for part in parts)
