"""Step 9: the record of a request, made once, however it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.gateway.records import Admitted, Settled
from corral.wire.common import CHARS_PER_TOKEN
from corral.wire.transcript import Transcript

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

LEARN: Final = 0.3
DENSITY_MAX: Final = 4.0

OUTCOMES: Final = {400: "refused", 401: "refused", 404: "refused", 413: "refused", 415: "refused", 429: "limited"}
LEFT: Final = frozenset(("client_gone", "cancelled"))
ENDED_BY_US: Final = frozenset(("cancelled", "interrupted"))
ENDED: Final = {503: "overloaded", 504: "timeout"}


def outcome_of(status: int) -> str:
    """The word for a status: ok, refused (the caller's fault), limited, overloaded, timeout or upstream_error."""
    if status < 400:
        return "ok"
    if status < 500:
        return OUTCOMES.get(status, "refused")
    if status in (501, 507):
        return "refused"  # a route that this version does not serve, a model that no node has the memory for
    return ENDED.get(status, "upstream_error")


def continued(outcome: str) -> str:
    """How a continuation ended, as the metrics name it, by the outcome of its request."""
    return outcome if outcome in ("ok", "client_gone", "cancelled") else "failed"


def admitted(exchange: Exchange) -> Admitted:
    """The first record of a request."""
    hashes = exchange.gateway.hashes
    return Admitted(
        exchange.record_id,
        exchange.request_id,
        exchange.wall,
        exchange.gateway.name,
        exchange.key_id,
        exchange.address,
        exchange.api,
        exchange.path,
        exchange.model,
        None if hashes is None or exchange.decoded is None else hashes.prompt.of_text(exchange.body),
    )


def answered(exchange: Exchange, outcome: str) -> Transcript | str | None:
    """The text that went to the caller, however far it came, or what has read it; None where there was none."""
    if exchange.resumption is not None:
        return exchange.resumption.said()
    decoded = exchange.decoded
    if decoded is None or not exchange.first_token:
        return None
    if decoded.transcript is not None:
        return decoded.transcript
    return decoded.responder.said() if outcome == "ok" else None


def answer_hash(exchange: Exchange, outcome: str) -> str | None:
    """The keyed hash of that text; None where there is none, or nothing is hashed."""
    hashes = exchange.gateway.hashes
    if hashes is None:
        return None
    text = answered(exchange, outcome)
    if text is None:
        return None
    if not isinstance(text, Transcript):
        return hashes.answer.of_text(text.encode())
    digest = text.digest()
    return hashes.answer.of(digest) if digest is not None else None


def said(exchange: Exchange, outcome: str) -> str:
    """As much of that text as is to be kept."""
    text = answered(exchange, outcome)
    return text.captured() if isinstance(text, Transcript) else text or ""


def usage(exchange: Exchange, outcome: str) -> tuple[int, int, bool]:
    """Tokens of the prompt and of the answer, and whether they are estimates.

    A node tells what it counted in its last line alone, and on `/api/embeddings` nowhere. Of an answer that was cut the
    prompt is guessed from its size and the answer's tokens are its lines, the least they can be; of embeddings the
    batches that were whole are known, and the one that a node had is guessed. Who was sent nothing of an answer pays
    for nothing, whatever nodes did for it, unless it was he who left, or whose time was over.
    """
    decoded = exchange.decoded
    left = outcome in LEFT or exchange.overdue
    if decoded is None or not (exchange.opened or left or outcome == "ok"):
        return 0, 0, False
    responder = decoded.responder
    if outcome == "ok":
        if responder.counted:
            return responder.prompt_tokens, responder.tokens, False
    elif responder.kept or decoded.more:
        if exchange.fresh or not exchange.attempts:  # no node has had the batch that is next
            return responder.prompt_tokens, 0, False
        return responder.prompt_tokens + guessed(exchange, len(decoded.body) // CHARS_PER_TOKEN), 0, True
    elif responder.prompt_tokens:
        return responder.prompt_tokens, responder.tokens, False
    worked = exchange.first_token or (left and exchange.attempts)
    if not worked or not decoded.estimate:
        return 0, responder.tokens, False
    return guessed(exchange, decoded.estimate), responder.tokens, True


def guessed(exchange: Exchange, estimate: int) -> int:
    """Tokens of a prompt that no node has told, as its key's prompts were found to have them."""
    key = exchange.key
    return estimate if key is None else int(estimate * key.density)


def far(exchange: Exchange, now: float) -> tuple[str, str, int, int, int, int, float, float | None, float]:
    """How far a request is, as a row of a progress record. `now` is monotonic seconds."""
    prompt_tokens, tokens, _ = usage(exchange, "interrupted")
    arrived, first = exchange.arrived, exchange.first_token
    return (
        exchange.record_id,
        exchange.node_name,
        exchange.attempts,
        prompt_tokens,
        tokens,
        exchange.connection.sent,
        int(exchange.queued(now) * 1e3) / 1e3,
        int((first - arrived) * 1e6) / 1e3 if first else None,
        int((now - arrived) * 1e6) / 1e3,
    )


def learn(density: float, guessed: int, counted: int) -> float:
    """The density of a key's prompts after one more: what a model counted, for what was guessed of it.

    Languages and kinds of text differ more than models do, and a key's prompts less than those of all. It is no less
    than 1, so that nobody can make the next guess too small by sending what has few tokens.
    """
    return max(1.0, density + (min(counted / guessed, DENSITY_MAX) - density) * LEARN)


def settled(exchange: Exchange, status: int, outcome: str, sent: int, now: float) -> Settled:
    """The last record of a request. `sent` is bytes of the answer's body, `now` monotonic seconds."""
    arrived = exchange.arrived
    first = exchange.first_token
    prompt_tokens, tokens, estimated = usage(exchange, outcome)
    key, decoded = exchange.key, exchange.decoded
    # Of embeddings that were left, some may be counted, and no less was guessed for that.
    if (
        prompt_tokens
        and outcome == "ok"
        and not estimated
        and key is not None
        and decoded is not None
        and decoded.estimate
    ):
        key.density = learn(key.density, decoded.estimate, prompt_tokens)
    return Settled(
        exchange.record_id,
        exchange.request_id,
        exchange.wall,
        exchange.gateway.name,
        exchange.key_id,
        exchange.address,
        exchange.api,
        exchange.path,
        exchange.method.decode("latin-1"),
        exchange.model,
        status,
        outcome,
        exchange.node_name,
        exchange.attempts,
        len(exchange.body),
        sent,
        prompt_tokens,
        tokens,
        estimated,
        # Whole microseconds: round() to digits costs more than all the rest here.
        int(exchange.queued(now) * 1e3) / 1e3,
        int((first - arrived) * 1e6) / 1e3 if first else None,
        int((now - arrived) * 1e6) / 1e3,
        exchange.resumption.nodes if exchange.resumption is not None else None,
        answer_hash(exchange, outcome),
        exchange.model_digest,
    )
