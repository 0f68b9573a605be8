"""Step 9: the record of a request, made once, however it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

OUTCOMES = {400: "refused", 401: "refused", 404: "refused", 413: "refused", 415: "refused", 429: "limited"}


def outcome_of(status: int) -> str:
    """The word for a status: ok, refused (the caller's fault), limited, overloaded or upstream_error."""
    if status < 400:
        return "ok"
    if status < 500:
        return OUTCOMES.get(status, "refused")
    return "overloaded" if status == 503 else "upstream_error"


def admitted(exchange: Exchange) -> dict[str, Any]:
    """The record that is written before a node hears of the request."""
    return {
        "t": "admit",
        "id": exchange.record_id,
        "request_id": exchange.request_id,
        "ts": exchange.request.wall,
        "gw": exchange.gateway.name,
        "key": exchange.key_id,
        "addr": exchange.address,
        "api": exchange.api,
        "route": exchange.path,
        "model": exchange.model,
    }


def usage(exchange: Exchange, outcome: str) -> tuple[int, int, bool]:
    """Tokens of the prompt and of the answer, and whether they are estimates.

    A node tells what it counted in its last line alone. Of an answer that was cut the prompt is guessed from its
    size and the answer's tokens are its lines; a request that a node failed before any token has cost nobody anything.
    """
    decoded = exchange.decoded
    if decoded is None:
        return 0, 0, False
    responder = decoded.responder
    if outcome == "ok" or responder.prompt_tokens:
        return responder.prompt_tokens, responder.tokens, False
    worked = exchange.first_token or (outcome == "client_gone" and exchange.history.attempts)
    if not worked or not decoded.estimate:
        return 0, responder.tokens, False
    return decoded.estimate, responder.tokens, True


def settled(exchange: Exchange, status: int, outcome: str, sent: int, now: float) -> dict[str, Any]:
    """The record that completes it. `sent` is bytes of answer, `now` monotonic seconds; times are milliseconds."""
    arrived = exchange.request.arrived
    first = exchange.first_token
    prompt_tokens, tokens, estimated = usage(exchange, outcome)
    return {
        "t": "settle",
        "id": exchange.record_id,
        "request_id": exchange.request_id,
        "ts": exchange.request.wall,
        "gw": exchange.gateway.name,
        "key": exchange.key_id,
        "addr": exchange.address,
        "api": exchange.api,
        "route": exchange.path,
        "method": exchange.request.method.decode("latin-1"),
        "model": exchange.model,
        "status": status,
        "outcome": outcome,
        "node": exchange.node_name,
        "attempts": exchange.history.attempts,
        "req_bytes": len(exchange.request.body),
        "resp_bytes": sent,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "estimated": estimated,
        "queue_ms": round(exchange.queue_ms, 3),
        "ttft_ms": round((first - arrived) * 1e3, 3) if first else None,
        "ms": round((now - arrived) * 1e3, 3),
    }
