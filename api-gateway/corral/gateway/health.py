"""Runners that hang or fail: seen by their streams, asked for one token, and left alone until they give it.

A runner is a model on a node. It is suspect when no stream on it has progressed for its budget, or when it has failed
so many in a row, and gets no new work (`corral.fleet.choose`). Then it is asked for one token (the canary). One that
gives it is clear; one that does not is ejected: its streams are given up, to be tried or gone on with elsewhere, and it
is asked again until it answers. What is not in the node's memory is loading, and no runner's fault; nor are requests
whose caller takes no more bytes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from corral.fleet.node import Node, NodeState, canonical_name
from corral.fleet.pools import counted
from corral.gateway.crowding import Crowding
from corral.gateway.metrics import WHOLE
from corral.gateway.upstream import Handler, UpstreamConnection
from corral.store.slots import Wanted
from corral.wire.common import decode_line, encode
from corral.wire.errors import UpstreamNonsense

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

SILENCE: Final = 5.0
"""Seconds without progress that any runner may take."""
PREFILL: Final = 3.0
"""So many times what reading its prompts should take a runner may be silent."""
RATE: Final = 100.0
"""Tokens of a prompt a second, until a model's rate is known: what a small machine reads."""
LONG: Final = 64
"""Tokens of a prompt from which on its time says something of that rate."""
GOES_ON: Final = 1.0
"""Seconds since a runner's last progress within which it surely goes on."""
TOOLS: Final = b'"tools":[{'
"""In the body of a request that may be answered by calls of tools: a quote within a JSON string is escaped."""
FAILED: Final = 3
"""Requests in a row that a runner may fail, or answer with nonsense."""
CANARY: Final = 4.0
CANARY_MAX: Final = 64 << 10
"""Bytes of an answer of one token."""
AGAIN: Final = 1.0

log = logging.getLogger(__name__)


class Canary(Handler):
    """One token asked of a suspect runner. ``ejected`` once it has not come; ``due``: when to ask (again)."""

    def __init__(self, gateway: Gateway, node: Node, model: str, due: float) -> None:
        self._gateway, self.node, self.model, self.due = gateway, node, model, due
        self.until = 0.0
        self.answered = self.ejected = False
        self._status = 0
        self._said = b""
        self._slot = ""
        self._connection: UpstreamConnection | None = None

    def ask(self, now: float) -> None:
        """Send it, on a connection and a slot of its own: those of the runner are with the streams that hang."""
        self.until, self._status, self._said = now + CANARY, 0, b""
        gateway = self._gateway
        self._slot = gateway.new_id()
        group = gateway.snapshot.group_of.get(self.node.name, "")
        gateway.queue.slots.claim(Wanted(self._slot, counted(self.model, group)), self.node.name)
        self._gateway.upstreams.connect(self._gateway.nodes_address, self._connected)

    def _connected(self, connection: UpstreamConnection | OSError) -> None:
        if isinstance(connection, OSError):
            return
        if not self.until:
            connection.abort()
            return
        self._connection = connection
        policy = self._gateway.snapshot.policy(self.model)
        options = {"num_predict": 1} | ({"num_ctx": policy.num_ctx} if policy is not None and policy.num_ctx else {})
        asked = {"model": self.model, "prompt": "a", "raw": True, "stream": False, "keep_alive": -1}
        body = encode({**asked, "options": options | (dict(policy.pinned) if policy is not None else {})})
        head = (b"POST /api/generate HTTP/1.1\r\nHost: nodes\r\n", self.node.header, b"Content-Length: ")
        connection.send(b"".join((*head, str(len(body)).encode(), b"\r\n\r\n", body)), self)

    def on_head(self, status: int, proxied: bytes) -> None:
        self._status = 0 if proxied else status

    def on_body(self, data: bytes) -> None:
        """One token or none: the end says it."""
        self._said += data[: CANARY_MAX - len(self._said)]

    def on_end(self) -> None:
        # A model that cannot generate (400) has a runner that answers.
        self.answered = self._status == 400 or (self._status == 200 and _is_done(self._said))
        self._connection = None
        self._end()

    def on_lost(self, untouched: bool) -> None:
        self._connection = None
        self._end()

    def _end(self) -> None:
        self._gateway.queue.end(self._slot)

    def close(self) -> None:
        """Ask no more."""
        self.until = 0.0
        self._end()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()


def _is_done(said: bytes) -> bool:
    try:
        return decode_line(said).get("done") is True
    except UpstreamNonsense:
        return False


class Health:
    """What a gateway knows of runners. ``ejections`` counts them, ``frozen`` those that were too many at once."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._latest: dict[tuple[str, str], float] = {}
        self._clear_at: dict[tuple[str, str], float] = {}
        self.rates: dict[str, float] = {}
        self.canaries: dict[tuple[str, str], Canary] = {}
        self.crowding = Crowding()
        self.ejections = self.frozen = 0

    def first_token(self, exchange: Exchange, now: float) -> None:
        """A model has read a prompt; of the rates that are seen the slowest counts, and fades."""
        decoded = exchange.decoded
        if decoded is None or decoded.estimate < LONG:
            return
        asked = exchange.deadline - self._gateway.first_token
        rate = decoded.estimate / max(0.001, now - asked)
        known = self.rates.get(exchange.model)
        self.rates[exchange.model] = rate if known is None else min(rate, known * 1.05)

    def look(self, now: float) -> None:
        """Look at every stream, and go on with what is suspect. Each half second."""
        gateway = self._gateway
        budgets: dict[tuple[str, str], float] = {}
        silent: dict[tuple[str, str], list[Exchange]] = {}
        latest: dict[tuple[str, str], float] = {}
        withheld: set[tuple[str, str]] = set()
        stalled: set[tuple[str, str]] = set()
        late: list[tuple[tuple[str, str], Exchange]] = []
        for exchange in gateway.running:
            node = gateway.snapshot.nodes.get(exchange.node_name)
            if node is None or exchange.paused or exchange.waiting or exchange.path in WHOLE:
                continue
            runner = (node.name, canonical_name(exchange.model))
            if runner[1] not in node.resident:
                continue
            silent.setdefault(runner, []).append(exchange)
            # Its deadline moves with each token.
            since = exchange.deadline - (gateway.between_tokens if exchange.first_token else gateway.first_token)
            known = max(self._latest.get(runner, 0.0), self._clear_at.get(runner, 0.0))
            latest[runner] = max(since, latest.get(runner, known))
            budget = SILENCE
            if not exchange.first_token and exchange.decoded is not None:
                budget = max(SILENCE, PREFILL * exchange.decoded.estimate / self.rates.get(exchange.model, RATE))
            budgets[runner] = max(budget, budgets.get(runner, 0.0))
            if now - since > SILENCE and exchange.decoded is not None:
                if not exchange.first_token and now - since > budget:
                    late.append((runner, exchange))
                if exchange.decoded.body.find(TOOLS) >= 0:
                    withheld.add(runner)
                elif exchange.first_token:
                    stalled.add(runner)
        # A node holds back what may become a call of a tool, and who comes behind it may wait: only a stream of plain
        # text that stands still says that the runner does.
        for runner in withheld - stalled:
            budgets[runner] = max(budgets[runner], gateway.between_tokens)
        for runner, exchange in late:
            if now - latest[runner] < GOES_ON:
                self.crowding.note(runner, exchange.record_id, now)
        self._latest = latest
        self._clear_at = {runner: at for runner, at in self._clear_at.items() if runner in latest}
        for runner, budget in budgets.items():
            if runner not in self.canaries and now - latest[runner] > budget:
                self._suspect(runner, now, "no stream progresses of")
        for node in gateway.snapshot.nodes.values():
            if node.failed:
                self._failing(node, now)
        for runner, canary in list(self.canaries.items()):
            self._go_on(runner, canary, silent.get(runner) or [], latest.get(runner, 0.0), now)

    def _failing(self, node: Node, now: float) -> None:
        for model, count in list(node.failed.items()):
            runner = node.name, model
            if count >= FAILED and runner not in self.canaries and model in node.resident:
                self._suspect(runner, now, f"{count} requests in a row failed at")

    def _suspect(self, runner: tuple[str, str], now: float, why: str) -> None:
        node = self._gateway.snapshot.nodes.get(runner[0])
        if node is None or node.state is not NodeState.READY:
            return
        log.warning("%s: %s %s: it gets no new ones until it gives a token", node.name, why, runner[1])
        node.suspects |= {runner[1]}
        self.canaries[runner] = Canary(self._gateway, node, runner[1], now)

    def _go_on(
        self, runner: tuple[str, str], canary: Canary, streams: list[Exchange], progressed: float, now: float
    ) -> None:
        node = canary.node
        if canary.answered or self._gateway.snapshot.nodes.get(node.name) is not node or runner[1] not in node.resident:
            self._clear(runner, canary, now)
        elif not canary.until:
            if now >= canary.due:
                canary.ask(now)
        elif progressed > canary.until - CANARY:
            self._clear(runner, canary, now)  # a stream went on: the token waits in a queue
        elif now >= canary.until:
            canary.close()
            canary.due = now + AGAIN
            if not canary.ejected and not self._too_many(canary):
                canary.ejected = True
                self.ejections += 1
                log.warning("%s: %s gives no token: its %d streams go elsewhere", node.name, runner[1], len(streams))
            if canary.ejected:
                for exchange in streams:
                    exchange.deadline = min(exchange.deadline, now)  # the next look at deadlines gives it up

    def _clear(self, runner: tuple[str, str], canary: Canary, now: float) -> None:
        canary.close()
        self._clear_at[runner] = now  # the token counts as a stream's would
        canary.node.suspects -= {runner[1]}
        canary.node.failed.pop(runner[1], None)
        del self.canaries[runner]
        log.warning("%s: %s gives tokens again, or has left", canary.node.name, runner[1])

    def _too_many(self, canary: Canary) -> bool:
        """Whether one more would make more than half of the nodes: then it is this gateway that sees wrongly. Nor does
        the last one go that has a model: its streams have nowhere else to go on."""
        suspect = {other.node.name for other in self.canaries.values()}
        if len(suspect) * 2 <= len(self._gateway.snapshot.nodes) and not self._last(canary):
            return False
        self.frozen += 1
        return True

    def _last(self, canary: Canary) -> bool:
        """Whether no other node of its group would take the streams of a runner."""
        snapshot = self._gateway.snapshot
        group = snapshot.group_of.get(canary.node.name, "")
        for other in snapshot.nodes.values():
            if other is canary.node or snapshot.group_of.get(other.name, "") != group:
                continue
            held = other.state is NodeState.READY and canary.model in other.held
            if held and canary.model not in other.suspects:
                return False
        return True
