"""What a gateway runs and waits for, told to control when it asks (`feed.py`), and how an operator ends a request.

Nothing is kept for it: it is read off the requests when somebody asks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from corral.fleet.node import canonical_name
from corral.wire.errors import ApiError

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

MOST = 1000
"""Requests that are told at once, the oldest of them."""
MODELS_MAX = 50
"""Models whose queues are told with each question for a snapshot, the longest of them."""

log = logging.getLogger(__name__)


class Report:
    """Answers control's questions of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def answer(self, question: Mapping[str, Any]) -> Any:
        """The answer to a question: ``what`` is list, find or cancel, ``id`` a record's or a request's id; to list and
        find, of one ``tenant`` where it is named.

        A list is {"requests", "total"}; find has those of an id; cancel says whether that record's was ended.
        """
        what, id, tenant = question.get("what"), question.get("id"), question.get("tenant")
        now = monotonic()
        running = [one for one in self._gateway.running if tenant is None or one.tenant == tenant]
        if what == "list":
            found = sorted(running, key=lambda exchange: exchange.arrived)
            return {"requests": [self._entry(exchange, now) for exchange in found[:MOST]], "total": len(found)}
        if what == "find":
            found = [one for one in running if one.record_id == id] or [one for one in running if one.request_id == id]
            return {"requests": [self._entry(exchange, now) for exchange in found[:MOST]], "total": len(found)}
        if what == "cancel":
            return any(self._cancel(one) for one in running if one.record_id == id)
        return None  # of a control that is newer

    def queues(self) -> str:
        """By model: how many wait for a slot, how long the oldest has (seconds), and what an estimate needs; JSON in
        ASCII, "" where nobody waits."""
        waiting = self._gateway.queue.waiting
        if not waiting:
            return ""
        now = monotonic()
        found: dict[str, list[float]] = {}
        for exchange in waiting.values():
            answer = exchange.answer
            seconds = self._gateway.queue.seconds(exchange.model)
            slots, load = (answer.slots, answer.load) if answer is not None else (0, 0.0)
            one = found.setdefault(canonical_name(exchange.model), [0, 0.0, 0, 0.0, round(seconds, 3)])
            one[0] += 1
            one[1] = max(one[1], round(now - exchange.queued_at, 3))
            one[2], one[3] = max(one[2], slots), max(one[3], load)
        longest = sorted(found.items(), key=lambda item: -item[1][0])[:MODELS_MAX]
        return json.dumps(dict(longest), separators=(",", ":"))

    def _cancel(self, exchange: Exchange) -> bool:
        log.info("%s is cancelled by an operator", exchange.request_id)
        exchange.abandon()
        # No status that a client's library takes for a reason to send the request again.
        exchange.give_up(ApiError(403, "cancelled", "the request was cancelled by an operator"), "cancelled")
        return True

    def _entry(self, exchange: Exchange, now: float) -> dict[str, Any]:
        wanted, answer, decoded = exchange.wanted, exchange.answer, exchange.decoded
        queue = self._gateway.queue
        waits = exchange.waiting or (wanted is not None and not wanted.node)
        name = canonical_name(exchange.model)
        node = "" if waits else exchange.node_name
        if waits:
            state = "queued" if answer is None or answer.slots else "loading"
            waited = now - (exchange.queued_at or exchange.arrived)
        else:
            known = self._gateway.snapshot.nodes.get(node)
            resident = known is None or name in known.resident
            state = "running" if exchange.first_token or resident else "loading"
            waited = exchange.queued(now) / 1e3
        position, slots, load = (
            (answer.position, answer.slots, answer.load) if waits and answer is not None else (0, 0, 0)
        )
        if waits and wanted is not None and wanted.id in queue.local.waiting:
            position = queue.local.ledger.position(wanted.id, wanted.model)
        return {
            "id": exchange.record_id,
            "request_id": exchange.request_id,
            "key": exchange.key_id,
            "tenant": exchange.tenant,
            "route": exchange.path,
            "model": name,
            "state": state,
            "position": position or None,
            "waited": round(waited, 3),
            "node": node or None,
            "tokens": decoded.responder.tokens if decoded is not None else 0,
            "attempts": exchange.attempts,
            "age": round(now - exchange.arrived, 3),
            # Of who waits, for control: where its ticket is, and what its estimate is made of.
            "ticket": [wanted.model, wanted.id, slots, load, queue.seconds(exchange.model)]
            if waits and wanted
            else None,
        }
