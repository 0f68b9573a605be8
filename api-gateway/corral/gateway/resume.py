"""Step 8, after the first token: another node goes on with an answer that its node left.

Four requests to that node, one after the other: one that renders the prompt, two that count the prompt without and with
what was sent, and one for what comes behind that (`corral.wire.continuation`). The exchange goes on meanwhile as if
nothing were amiss.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Final

from corral.fleet.node import Node, canonical_name
from corral.fleet.slots import ABORTED
from corral.gateway import schedule
from corral.gateway.recover import Failure, may_retry
from corral.gateway.snapshot import Snapshot
from corral.wire.common import Decoded, Responder
from corral.wire.continuation import GENERATE, Aside, Counting, Rendering, Rest, Resumed, rest_of
from corral.wire.transcript import Transcript

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.relay import Attempt

CHAT: Final = b"/api/chat"

log = logging.getLogger(__name__)


def keep(decoded: Decoded, snapshot: Snapshot, hashed: bool, most: int) -> None:
    """Have what is said kept, where the model can be gone on with; `hashed`: and in any stream, hashed.

    `most`: characters of it that are captured for the record.
    """
    if decoded.transcript is not None:
        return
    kept = decoded.resumable and canonical_name(decoded.model) in snapshot.continuable
    if kept or (hashed and decoded.responder.stream):
        decoded.transcript = Transcript(decoded.upstream_path == CHAT, kept, hashed, most)


class Resume:
    """An answer that other nodes go on with. ``first`` is the request; ``nodes`` wrote it, joined by commas."""

    def __init__(self, first: Decoded, digest: str, rest: Rest, node: str) -> None:
        self.first, self._digest, self._rest = first, digest, rest
        self.nodes = node
        self._inner: Responder = first.responder
        self._asked: Aside | None = None
        self._prompt = ""
        self._counts: list[int] = []
        self._resumed: Resumed | None = None

    def said(self) -> str:
        """All text that went to the caller."""
        return self._resumed.sent() if self._resumed is not None else self._rest.sent

    def again(self) -> None:
        """The node that went on has failed too: what it added is sent, and counts."""
        resumed, self._resumed, self._asked = self._resumed, None, None
        if resumed is not None:
            self._rest = self._rest.more(resumed.sent(), resumed.tokens)

    def node(self, snapshot: Snapshot, tenant: str, now: float, tried: tuple[str, ...]) -> Node | None:
        """The node to go on with: one whose model is the same file."""
        return schedule.elsewhere(snapshot, tenant, self.first.model, self._digest, now, tried)

    def suits(self, node: Node) -> bool:
        """Whether a node holds the very same file."""
        return schedule.digest_on(node, canonical_name(self.first.model)) == self._digest

    def begin(self, node: Node) -> Decoded:
        """The first of the requests."""
        self.nodes += f",{node.name}"
        first = self.first
        self._counts = []
        self._asked = rendering = Rendering(self._rest.tokens)
        body = self._rest.rendering
        return Decoded(first.upstream_path, first.model, body, first.estimate, first.max_tokens, rendering)

    def then(self) -> Decoded | None:
        """The next one, after one was answered; None: that was the last. Raises UpstreamNonsense."""
        asked, self._asked = self._asked, None
        if asked is None:
            return None
        asked.finish()
        rest, counts = self._rest, self._counts
        if isinstance(asked, Rendering):
            self._prompt = asked.prompt
        elif isinstance(asked, Counting):
            counts.append(asked.found)
        if len(counts) < 2:
            self._asked = counting = Counting(rest.tokens)
            return self._generate(rest.count(self._prompt + rest.sent if counts else self._prompt), counting)
        self._rest = rest = rest.counted(counts[0], counts[1])
        mark = {"continued": self.nodes.split(",")}
        chat = self.first.upstream_path == CHAT
        self._resumed = resumed = Resumed(self._inner, chat, rest, self.first.estimate, mark)
        return self._generate(rest.request(self._prompt), resumed)

    def _generate(self, body: bytes, responder: Responder) -> Decoded:
        first = self.first
        return Decoded(GENERATE, first.model, body, first.estimate, first.max_tokens, responder)


def take_over(exchange: Exchange, failure: Failure, node: Node) -> bool:
    """Have another node go on with an answer of which the caller has the beginning; False where none can."""
    gateway = exchange.gateway
    told = gateway.metrics.continuations
    resume = exchange.resumption
    begun = resume.first if resume is not None else exchange.decoded
    if begun is not None and begun.responder.done:
        return False  # its end was read, though it is not sent: nobody can write that again
    if resume is not None:
        resume.again()
    else:
        resume = _resume(exchange, node)
        if resume is None:
            told["ineligible"] += 1
            return False
    now = monotonic()
    other = resume.node(gateway.snapshot, exchange.tenant, now, exchange.tried)
    if other is None or not may_retry(failure, exchange, len(gateway.snapshot.nodes), gateway.retries, now):
        if exchange.resumption is None:
            told["no_node"] += 1
        return False
    log.warning("%s: another goes on with what %s left: %s", exchange.request_id, node.name, failure.value)
    exchange.resumes(resume)
    return True


def end_early(exchange: Exchange, attempt: Attempt | None) -> None:
    """The answer is whole, though its node would go on."""
    if attempt is not None:
        attempt.abandon()
        if exchange.gateway.suspects.suspects:
            exchange.gateway.crashing.answered(exchange)  # while it still has its runner
        exchange.gateway.queue.leave(exchange, ABORTED)
        exchange.answered()


def goes_on(exchange: Exchange, node: Node) -> bool:
    """Whether it was a prompt or a count that a node answered with, or one batch of several, and there is more to ask.

    Raises:
        UpstreamNonsense: it was neither.
    """
    resume, asked = exchange.resumption, exchange.decoded
    if resume is None and asked is not None and asked.more:
        asked.go_on()
        exchange.fresh, exchange.queued_at = True, 0.0
        exchange.gateway.queue.again(exchange, monotonic())
        return True
    decoded = resume.then() if resume is not None else None
    if decoded is None:
        return False
    exchange.decoded, exchange.seen = decoded, decoded.responder.tokens
    exchange.ask(node, decoded, monotonic())
    return True


def _resume(exchange: Exchange, node: Node) -> Resume | None:
    """How the answer that `node` left in the midst can be gone on with; None where it cannot.

    It cannot where the model has not passed control's test of it on just this file, or the answer is more than text.
    """
    decoded = exchange.decoded
    transcript = decoded.transcript if decoded is not None else None
    if decoded is None or transcript is None or not transcript.close():
        return None
    name = canonical_name(decoded.model)
    digest = schedule.digest_on(node, name)
    if not digest or exchange.gateway.snapshot.continuable.get(name) != digest:
        return None
    if exchange.model_digest != node.digests.get(name):
        return None  # it has a new version since it was asked
    rest = rest_of(decoded.body, transcript.text, transcript.tokens)
    return Resume(decoded, digest, rest, node.name) if rest is not None else None
