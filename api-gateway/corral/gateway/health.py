"""Runners that hang or fail: seen by their streams, asked for one token, and left alone until they give it.

A runner is a model on a node. It is suspect when it has had work for its budget and given no token
(`corral.fleet.hanging`), or when it has failed so many in a row, and gets no new work (`corral.fleet.choose`). Then it
is asked for one token (the canary). One that gives it is clear; one that does not is ejected: its streams are given up,
to be tried or gone on with elsewhere, and it is asked again until it answers. What is not in the node's memory is
loading, and no runner's fault; nor are requests whose caller takes no more bytes. While a node loads a model, the
runners of its others have more time, up to a bound.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from corral.fleet.hanging import SILENCE, Rates, Runner, patience, stays
from corral.fleet.node import Node, NodeState, canonical_name
from corral.fleet.pools import counted
from corral.gateway.admit import EMBEDS
from corral.gateway.crowding import Crowding
from corral.gateway.decode import SHOW
from corral.gateway.recover import holds
from corral.gateway.upstream import Handler, UpstreamConnection
from corral.store.reading import Reading
from corral.store.slots import Wanted
from corral.wire.common import Decoded, decode_line, encode
from corral.wire.continuation import Rendering
from corral.wire.errors import UpstreamNonsense

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

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
    """One token asked of a suspect runner. ``ejected`` once it has not come; ``due``: when to ask (again); ``open``: it
    may come yet. ``excused``: for how many seconds of its silence loads of other models were the reason.

    ``embeds``: it is asked to embed one, as nothing else was: most such models can do nothing else, and their node
    would say so for them.
    """

    def __init__(self, gateway: Gateway, node: Node, model: str, due: float, embeds: bool, excused: float) -> None:
        self._gateway, self.node, self.model, self.due, self.embeds = gateway, node, model, due, embeds
        self.excused = excused
        self.asked = self.until = 0.0
        self.answered = self.ejected = self.open = False
        self._status = 0
        self._said = b""
        self._slot = ""
        self._connection: UpstreamConnection | None = None

    def ask(self, now: float) -> None:
        """Send it, on a connection and a slot of its own: those of the runner are with the streams that hang."""
        self.asked, self.until, self._status, self._said = now, now + CANARY, 0, b""
        self.open = True
        gateway = self._gateway
        self._slot = gateway.new_id()
        group = gateway.snapshot.group_of.get(self.node.name, "")
        gateway.queue.slots.claim(Wanted(self._slot, counted(self.model, group)), self.node.name)
        self._gateway.upstreams.connect(self._gateway.nodes_address, self._connected)

    def _connected(self, connection: UpstreamConnection | OSError) -> None:
        if isinstance(connection, OSError):
            self.open = False
            return
        if not self.until:
            connection.abort()
            return
        self._connection = connection
        policy = self._gateway.snapshot.policy(self.model)
        options: dict[str, Any] = {} if self.embeds else {"num_predict": 1}
        if policy is not None:
            options |= ({"num_ctx": policy.num_ctx} if policy.num_ctx else {}) | dict(policy.pinned)
        asked: dict[str, Any] = {"model": self.model, "keep_alive": -1, "options": options}
        asked |= {"input": "a"} if self.embeds else {"prompt": "a", "raw": True, "stream": False}
        body = encode(asked)
        path = b"embed" if self.embeds else b"generate"
        head = (b"POST /api/%b HTTP/1.1\r\nHost: nodes\r\n" % path, self.node.header, b"Content-Length: ")
        connection.send(b"".join((*head, str(len(body)).encode(), b"\r\n\r\n", body)), self)

    def on_head(self, status: int, proxied: bytes) -> None:
        self._status = 0 if proxied else status

    def on_body(self, data: bytes) -> None:
        """One token or none: the end says it."""
        self._said += data[: CANARY_MAX - len(self._said)]

    def on_end(self) -> None:
        # A model that cannot generate (400) has a runner that answers.
        says = self._said.find(b'"embeddings"') >= 0 if self.embeds else _is_done(self._said)
        self.answered = self._status == 400 or (self._status == 200 and says)
        self._connection = None
        self._end()

    def on_lost(self, untouched: bool) -> None:
        self._connection = None
        self._end()

    def _end(self) -> None:
        self.open = False
        self._gateway.queue.end(self._slot)

    def close(self) -> None:
        """Ask no more."""
        self.until = 0.0
        self._end()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()


def _embeds(streams: list[Exchange]) -> bool:
    return all([one.decoded is not None and one.decoded.upstream_path in EMBEDS for one in streams])


def _is_done(said: bytes) -> bool:
    try:
        return decode_line(said).get("done") is True
    except UpstreamNonsense:
        return False


class Health:
    """What a gateway knows of runners. ``ejections`` counts them, ``frozen`` those that were too many at once."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._runners: dict[tuple[str, str], Runner] = {}
        self._rates, self._embed_rates = Rates(), Rates()
        self.canaries: dict[tuple[str, str], Canary] = {}
        self._asked_for: set[tuple[str, str]] = set()
        self.crowding = Crowding()
        self.reading = Reading()
        self.ejections = self.frozen = 0

    def sent(self, exchange: Exchange, node: Node, now: float) -> None:
        """A request is sent to a node."""
        exchange.sent, exchange.token, exchange.runner = now, 0.0, None
        decoded = exchange.decoded
        if decoded is None or decoded.upstream_path == SHOW or isinstance(decoded.responder, Rendering):
            return  # the node answers that itself
        key = node.name, canonical_name(exchange.model)
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = Runner(key[0], key[1], now)
        exchange.runner = runner

    def token(self, exchange: Exchange, first: bool, now: float) -> None:
        """A runner gave a token, or a part of what has none. Of the rates at which prompts are read the slowest counts,
        and fades; what was read beside a load says nothing of it."""
        runner = exchange.runner
        if runner is not None:
            runner.token = exchange.token = now
        decoded = exchange.decoded
        if first and decoded is not None and (runner is None or not runner.excused):
            self.rates(decoded).learn(exchange.model, decoded.reads, now - exchange.sent)

    def rates(self, decoded: Decoded) -> Rates:
        """At which models read, or embed: one that does both does not do it as fast."""
        return self._embed_rates if decoded.upstream_path in EMBEDS else self._rates

    def answered(self, exchange: Exchange, node: Node, now: float) -> None:
        """A node's answer is whole, whatever was in it."""
        holds(node, exchange.model)
        if self._gateway.suspects.suspects:
            self._gateway.crashing.answered(exchange)
        if exchange.runner is not None:
            exchange.runner.token = now

    def look(self, now: float) -> None:
        """Look at every stream, and go on with what is suspect. Each half second."""
        gateway = self._gateway
        nodes = gateway.snapshot.nodes
        used: dict[Runner, list[Exchange]] = {}
        reads: dict[tuple[str, str], tuple[float, float]] = {}
        for exchange in gateway.running:
            runner = exchange.runner
            if runner is None:
                continue
            streams = used.setdefault(runner, [])
            if exchange.paused:
                continue
            streams.append(exchange)
            need, decoded = SILENCE, exchange.decoded
            if not exchange.token and decoded is not None:
                need = self.rates(decoded).needs(exchange.model, decoded.reads)
                if decoded.upstream_path not in EMBEDS and now - exchange.sent > need and now - runner.token < GOES_ON:
                    self.crowding.note((runner.node, runner.model), exchange.record_id, now)
            runner.works(exchange.sent, need)
            if need > SILENCE:
                key = runner.node, runner.model
                reads[key] = max(need, reads[key][0] if key in reads else 0.0), runner.token
        self.reading.own = reads
        for key, (need, token) in self.reading.others(now).items():
            if key in self._runners:
                self._runners[key].beside(need, token)
        # Where nobody leads, nodes load what requests ask of them, and control has not begun it.
        self._asked_for = {
            (runner.node, runner.model)
            for runner, streams in used.items()
            if runner.model not in _resident(nodes, runner) and any([not one.token for one in streams])
        }
        for key, runner in list(self._runners.items()):
            hangs = runner.look(now, runner.model in _resident(nodes, runner), self._patience(key, now))
            if hangs and key not in self.canaries and not self._holds_back(runner, used[runner], now):
                self._suspect(key, now, "no token comes of", _embeds(used[runner]))
            if runner not in used and runner.unused(now):
                del self._runners[key]
        for node in nodes.values():
            if node.failed:
                self._failing(node, now)
        for key, canary in list(self.canaries.items()):
            self._go_on(key, canary, used, now)

    def _patience(self, key: tuple[str, str], now: float) -> float:
        """For how long in all the loads of its node's other models excuse a runner's silence (seconds)."""
        name, model = key
        snapshot = self._gateway.snapshot
        node = snapshot.nodes.get(name)
        # A control that is away says no more that a load is over.
        told = node is not None and node.loading and snapshot.led(now)
        found = node.patience(model) if node is not None and told else 0.0
        if self._asked_for and any([one[0] == name and one[1] != model for one in self._asked_for]):
            found = max(found, patience())
        return found

    def _holds_back(self, runner: Runner, streams: list[Exchange], now: float) -> bool:
        """Whether a silent runner's node may hold back what may become a call of a tool.

        Who comes behind that may wait: only a stream of plain text that stands still says that the runner does.
        """
        if runner.waited > self._gateway.between_tokens:
            return False
        withheld = False
        # The one that came first may be silent for less, where callers leave: nobody is before it.
        oldest = min([exchange.sent for exchange in streams])
        for exchange in streams:
            since = exchange.deadline - self._gateway.between_tokens if exchange.token else exchange.sent
            silent = now - since > SILENCE  # the deadline of one that was paused moved as it went on
            if exchange.decoded is None or not (silent or exchange.sent == oldest):
                continue
            if exchange.decoded.body.find(TOOLS) >= 0:
                withheld = True
            elif silent and exchange.token:
                return False
        return withheld

    def _failing(self, node: Node, now: float) -> None:
        for model, count in list(node.failed.items()):
            runner = node.name, model
            if count >= FAILED and runner not in self.canaries and model in node.resident:
                self._suspect(runner, now, f"{count} requests in a row failed at")

    def _suspect(self, runner: tuple[str, str], now: float, why: str, embeds: bool = False) -> None:
        node = self._gateway.snapshot.nodes.get(runner[0])
        if node is None or node.state is not NodeState.READY:
            return
        log.warning("%s: %s %s: it gets no new ones until it gives a token", node.name, why, runner[1])
        node.suspects |= {runner[1]}
        known = self._runners.get(runner)
        excused = known.excused if known is not None else 0.0
        self.canaries[runner] = Canary(self._gateway, node, runner[1], now, embeds, excused)

    def _go_on(self, key: tuple[str, str], canary: Canary, used: dict[Runner, list[Exchange]], now: float) -> None:
        node, runner = canary.node, self._runners.get(key)
        if canary.answered or self._gateway.snapshot.nodes.get(node.name) is not node or key[1] not in node.resident:
            self._clear(key, canary, now)
        elif not canary.until:
            if now >= canary.due:
                canary.ask(now)
        elif runner is not None and runner.last > canary.asked:
            self._clear(key, canary, now)  # a stream went on: the token waits in a queue
        elif now >= canary.until and not canary.ejected and canary.open and canary.excused < self._patience(key, now):
            canary.excused += CANARY  # its token may come late for the same reason: it stays asked
            canary.until = now + CANARY
        elif now >= canary.until:
            canary.close()
            canary.due = now + AGAIN
            streams = used.get(runner, []) if runner is not None else []
            # Not for good: once other nodes are down it may be what is left.
            goes = not self._too_many(canary, now)
            if goes and not canary.ejected:
                self.ejections += 1
                log.warning("%s: %s gives no token: its %d streams go elsewhere", node.name, key[1], len(streams))
            elif canary.ejected and not goes:
                log.warning("%s: %s gives no token, and keeps its streams: too little is left", node.name, key[1])
            canary.ejected = goes
            if goes:
                for exchange in streams:
                    exchange.deadline = min(exchange.deadline, now)  # the next look at deadlines gives it up

    def _clear(self, key: tuple[str, str], canary: Canary, now: float) -> None:
        canary.close()
        runner = self._runners.get(key)
        if runner is not None:
            runner.token = now  # the token counts as a stream's would
        canary.node.suspects -= {key[1]}
        canary.node.failed.pop(key[1], None)
        del self.canaries[key]
        log.warning("%s: %s gives tokens again, or has left", canary.node.name, key[1])

    def _too_many(self, canary: Canary, now: float) -> bool:
        """Whether with it too much would be out of use, by all gateways together: each says to control what it suspects
        as soon as it asks its canary, so that the others know when that is over.

        Beside one that is ejected already, only what this gateway has ejected counts: a suspect that comes later stays
        itself, and brings back none.
        """
        snapshot = self._gateway.snapshot
        out = {key for key, one in self.canaries.items() if one.ejected or one is canary or not canary.ejected}
        if snapshot.led(now) and not canary.ejected:
            me = self._gateway.name
            ready = {node.name for node in snapshot.nodes.values() if node.state is NodeState.READY}
            others: dict[str, set[tuple[str, str]]] = {}
            for node in snapshot.nodes.values():
                for model, by in node.doubted.items():
                    for name in by:
                        others.setdefault(name, set()).add((node.name, model))
            for name, said in others.items():
                # Who doubts more than half of what it can doubt sees wrongly itself, and ejects no more of it.
                if name != me and len({node for node, _ in said if node in ready}) * 2 <= len(ready):
                    out |= said
        if not stays(canary.node, canary.model, out, snapshot.nodes, snapshot.group_of):
            return False
        self.frozen += 1
        return True


def _resident(nodes: dict[str, Node], runner: Runner) -> frozenset[str]:
    node = nodes.get(runner.node)
    return node.resident if node is not None else frozenset()
