"""Step 8: what to do when an attempt failed. Pure decisions; nothing here touches a socket."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from corral.fleet.node import Node, canonical_name
from corral.wire.errors import ApiError, overloaded

ATTEMPTS_MAX: Final = 3
CRASHES_MAX: Final = 2
LOST_MAX: Final = 4
"""Nodes that may be lost under one request: it may be what kills them, and must not walk through the whole fleet."""
SHUN: Final = 2.0
LOST: Final = 5.0
"""Seconds in which control asks each node what it holds."""
BUDGET_SHARE: Final = 0.2
BUDGET_FLOOR: Final = 10.0
"""Retries a second that are allowed however few requests there are, as in Finagle's and Linkerd's retry budgets: a node
that fails while there is little to do costs nobody an answer."""
BUDGET_CAP: Final = 100.0


class Failure(Enum):
    """Why an attempt gave no answer."""

    CONNECT = "the node could not be reached"
    RESET = "the node's connection ended before its answer did"
    DOWN = "control found the node down"
    CRASH = "the model's runner crashed"
    NODE = "the node failed"
    TIMEOUT = "the node was silent for too long"
    NONSENSE = "the node's answer made no sense"
    MISSING = "the node does not hold the model any more"
    CALLER = "the request itself is at fault"


ORPHANED: Final = frozenset((Failure.CONNECT, Failure.RESET, Failure.DOWN, Failure.CRASH))
"""At these the request lost its node or its runner: no attempt that the node answered for."""


GONE: Final = frozenset((Failure.RESET, Failure.CONNECT))
"""The node's process may have died, and not be quite gone or quite back yet."""


FAILED: Final = frozenset((Failure.RESET, Failure.CRASH, Failure.NODE, Failure.NONSENSE))
"""At these it did not do what it was asked. Where it was not reached, or was only slow, others look after that."""


GIVEN_UP: Final = frozenset((Failure.DOWN, Failure.TIMEOUT, Failure.NONSENSE))
"""At these it is the gateway that ends the attempt: the node may work on it for a while."""


@dataclass(slots=True)
class RetryBudget:
    """At most a share of the requests may be tries anew, so that a sick fleet is not buried in retries, or so many a
    second where that is more.

    ``tokens`` is what requests have earned, ``floor`` what of this second's is left, as of ``at`` (monotonic seconds).
    """

    tokens: float = 0.0
    floor: float = BUDGET_FLOOR
    at: float = 0.0

    def earn(self) -> None:
        """A request came in."""
        self.tokens = min(BUDGET_CAP, self.tokens + BUDGET_SHARE)

    def spend(self, now: float) -> bool:
        """Take one retry, if the budget has it. It counts against both: they are not added up."""
        self.floor = min(BUDGET_FLOOR, self.floor + max(0.0, now - self.at) * BUDGET_FLOOR)
        self.at = now
        if max(self.floor, self.tokens) < 1.0:
            return False
        self.floor, self.tokens = max(0.0, self.floor - 1.0), max(0.0, self.tokens - 1.0)
        return True


class History(Protocol):
    """What a request went through: attempts, those of them that lost their node or runner, crashes of runners, nodes
    that were lost under it. Until ``held_until`` (monotonic seconds) it is given to no node.
    """

    attempts: int
    orphaned: int
    crashes: int
    lost: int
    held_until: float

    @property
    def connects(self) -> int:
        """Attempts that found no connection."""


def count(history: History, failure: Failure, now: float) -> None:
    """Note a failure. Who was on two nodes that were lost waits a moment: nodes that die together need one to be gone,
    and until then take requests with them that they have never worked on.
    """
    if failure in ORPHANED:
        history.orphaned += 1
    if failure is Failure.CRASH:
        history.crashes += 1
    elif failure is Failure.RESET:
        history.lost += 1
        if history.lost > 1:
            history.held_until = now + SHUN


def may_retry(failure: Failure, history: History, nodes: int, budget: RetryBudget, now: float) -> bool:
    """Whether a request that was answered with nothing yet is tried on another node.

    Orphans (the requests of a dead node or runner, or of one that control calls down) are outside the budget. A request
    that was there at two crashes of runners is not tried a third time. One that nodes are lost under may be on each of
    them once, but on no more than LOST_MAX. Control's word says nothing of the request: only its time ends that. A
    node's own failures are retried within the budget. A node that has just lost the model (removed by hand, an empty
    disk) did no work, so its retry costs nothing either.
    """
    if failure is Failure.CALLER:
        return False
    if failure is Failure.CONNECT:
        return history.connects <= nodes
    if failure is Failure.DOWN:
        return True
    if failure is Failure.RESET:
        return history.lost < min(LOST_MAX, max(nodes, CRASHES_MAX))
    if failure is Failure.CRASH:
        return history.crashes < CRASHES_MAX
    answered_for = history.attempts - history.orphaned
    return answered_for < ATTEMPTS_MAX and (failure is Failure.MISSING or budget.spend(now))


def shun(node: Node, failure: Failure, model: str, now: float) -> None:
    """Leave a node that failed alone for a moment; one that lacks a model, with that model: it would always be free."""
    if failure is Failure.MISSING:
        lost = {name: until for name, until in node.lost.items() if until > now}
        lost[canonical_name(model)] = now + LOST
        node.lost = lost
    else:
        node.shunned_until = now + SHUN
        if failure in FAILED:
            name = canonical_name(model)
            node.failed[name] = node.failed.get(name, 0) + 1
        if failure in GONE:
            node.gone_until = now + SHUN


def holds(node: Node, model: str) -> None:
    """A node has answered for a model."""
    if node.lost:
        node.lost.pop(canonical_name(model), None)
    if node.failed:
        node.failed.pop(canonical_name(model), None)


def final_error(failure: Failure, history: History, cause: ApiError | None, again: float) -> ApiError:
    """What the caller hears when no further attempt is made; a node may be reached in `again` seconds."""
    if failure in (Failure.CALLER, Failure.MISSING) and cause is not None:
        return cause
    if failure is Failure.CONNECT:
        return overloaded("no node could be reached", again)
    said = f"{failure.value} ({history.attempts} attempt{'' if history.attempts == 1 else 's'})"
    if failure is Failure.TIMEOUT:
        return ApiError(504, "upstream_timeout", said)
    # Of a connection that ended, the cause is HAProxy's guess.
    detail = f": {cause.message}" if cause is not None and failure is not Failure.RESET else ""
    return ApiError(502, "upstream_error", f"{said}{detail}")


_CRASHED = (
    "unexpected EOF",
    "runner process has terminated",
    "runner process no longer running",
    "model runner has unexpectedly stopped",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    ": EOF",
)
"""How Ollama tells, under a 500 or in band, that its runner is gone: its own words or those of its connection to it."""


def crashed(message: str) -> bool:
    """Whether a node's error says that the model's runner has crashed."""
    return any(words in message for words in _CRASHED)


_CALLERS = (
    "option ",
    "invalid option",
    "the input length exceeds the context length",
    "invalid JSON schema in format",
    "Failed to create new sequence: no input provided",
    "Failed to create new sequence: invalid image index",
    "this model only supports one image",
)
"""Under a 500 Ollama says so of the request, on whichever node: tried anew, it would have all of them left alone."""


_SEQUENCE = "Failed to create new sequence: "
"""So a runner begins where it cannot read a prompt, such as an image that is damaged or of no known format. Behind it
comes its decoder's word, which may be the "unexpected EOF" that elsewhere tells of a crash."""
_COMPUTED = ("unable to encode", "no mtmd image embedding")
"""Such follows where the image was read, and the runner cannot compute it."""


def classify(status: int, proxied: bool, message: str, template: bool = False, images: bool = False) -> Failure:
    """The kind of an answer that is not a 200. `proxied`: HAProxy made it, no node did; `template`: the request has
    one of its own; `images`: it has some.

    A template that is wrong and is not the request's own is the model's: damaged, or too new for its node.
    """
    if proxied:
        # 502 and 504 mean that the request had reached the node. HAProxy says 502 alike where the node closed, sent
        # what is no HTTP, or a head without end: it does not tell which before its answer is made.
        return Failure.RESET if status == 502 else Failure.TIMEOUT if status == 504 else Failure.CONNECT
    # Ollama answers a wrong option, schema or template with 500, no text to embed, and on /api/embeddings an over-long
    # prompt too: the caller's error under a 5xx. No other status than these is its word on a request: a redirect, a 401
    # or a 429 comes from a node that is set up wrongly, or is none.
    if status == 404:
        return Failure.MISSING  # only a node that was said to hold the model is asked
    if status == 400 or (status >= 500 and message.startswith(_CALLERS)):
        return Failure.CALLER
    if template and status >= 500 and message.startswith("template: "):
        return Failure.CALLER
    unread = message.startswith(_SEQUENCE) and not any(words in message for words in _COMPUTED)
    if images and status >= 500 and unread:
        return Failure.CALLER
    return Failure.CRASH if status >= 500 and crashed(message) else Failure.NODE
