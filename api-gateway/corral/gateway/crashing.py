"""Step 8, where a runner crashed: which prompt it was, what becomes of requests meanwhile.

The verdict is the store's, for all gateways (`corral.store.suspects`). Here requests tell it of their crashes, and of
answers that came to their end after all; a suspect's attempt waits for its runner, and a request whose prompt has been
at a crash before waits for the verdict before it is tried again. Where no runner has crashed, none of this is met.
"""

from __future__ import annotations

from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec

from corral.fleet.node import Node, canonical_name
from corral.fleet.pools import counted
from corral.gateway.avoid import unfit
from corral.gateway.decode import decode, may_go_on
from corral.gateway.recover import CRASHES_MAX, LOST_MAX, Failure
from corral.store.slots import Wanted
from corral.store.suspects import Suspects
from corral.wire.common import Decoded, encode
from corral.wire.continuation import Aside
from corral.wire.errors import ApiError

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

APART: Final = 10.0
"""For how long at most a suspect waits for a runner that another suspect has (seconds)."""
APART_OPENED: Final = 2.0
"""The same where its caller has the beginning of the answer."""

_body: Final = msgspec.json.Decoder(dict[str, Any]).decode
_PROMPT = ("messages", "prompt", "system", "suffix", "images", "input")


def fingerprint(tenant: str, decoded: Decoded) -> str:
    """What stands for model and prompt, whatever the options; 32 hexadecimal digits.

    It is a tenant's own: with options that a runner crashes under, nobody can have another's use of a prompt refused.
    Who crashes runners with ever new prompts can, of those that ran beside two of them: whose fault it was shows not.
    """
    body = _body(decoded.body)
    parts: list[Any] = [tenant, canonical_name(decoded.model)]
    parts += [body.get(name) for name in _PROMPT]
    return blake2b(encode(parts), digest_size=16).hexdigest()


def refused() -> ApiError:
    """What the caller hears: 400, since clients repeat what is answered with a 5xx."""
    message = f"this prompt was present at {CRASHES_MAX} crashes of its model: it is refused for some minutes"
    return ApiError(400, "prompt_refused", message)


class Trial:
    """An attempt at a suspect, that waits for its runner until ``until`` (monotonic seconds) or has it."""

    __slots__ = ("name", "node", "runner", "until", "wanted")

    def __init__(self, name: str, runner: str, node: Node, wanted: Wanted, until: float) -> None:
        self.name = name
        self.runner = runner
        self.node = node
        self.wanted = wanted
        self.until = until


class Crashing:
    """A gateway's part in it. ``waiting`` and ``trying`` are its suspects' attempts, before they begin and after."""

    def __init__(self, gateway: Gateway, suspects: Suspects) -> None:
        self._gateway = gateway
        self.suspects = suspects
        suspects.on_free = self._ask_again
        self.waiting: dict[Exchange, Trial] = {}
        self.trying: dict[Exchange, Trial] = {}

    def refuses(self, exchange: Exchange, decoded: Decoded) -> bool:
        """Whether a request's prompt is refused. One that is suspect is noted in it."""
        name = fingerprint(exchange.tenant, decoded)
        if name in self.suspects.suspects:
            exchange.suspect = name
        return name in self.suspects.refused

    def sweep(self, now: float) -> None:
        """Look after suspects. Each half second."""
        self.suspects.sweep(now)
        for exchange in list(self.trying):
            if exchange.token or exchange.wanted is not self.trying[exchange].wanted:
                self.got_on(exchange)
        if self.waiting:
            self._ask_again()

    def begin(self, exchange: Exchange, node: Node, now: float) -> None:
        """Begin a suspect's attempt once no other suspect is at that runner that may have it crash."""
        wanted = exchange.wanted
        assert wanted is not None
        self.got_on(exchange)  # its attempt before is over
        self._gateway.running.add(exchange)
        until = now + (APART_OPENED if exchange.opened else APART)
        self._ask(exchange, Trial(exchange.suspect, self._runner(exchange), node, wanted, until))

    def got_on(self, exchange: Exchange) -> None:
        """A suspect's attempt had its first token, or is over: another suspect may have the runner."""
        trial = self.trying.pop(exchange, None)
        if trial is not None:
            self.suspects.leave(trial.name, trial.runner, trial.node.name)

    def answered(self, exchange: Exchange) -> None:
        """A runner has answered, where prompts are suspect: this one's is not, once that is the whole of it."""
        asked = exchange.decoded
        if exchange.runner is None or asked is None or asked.more or isinstance(asked.responder, Aside):
            return  # it was the node that answered, or only a count, or there is more to ask
        decoded = _asked(exchange)
        if decoded is None:
            return
        name = exchange.suspect or fingerprint(exchange.tenant, decoded)
        if name in self.suspects.suspects:
            self.suspects.clear(name)
            exchange.suspect = ""

    def crashed(self, exchange: Exchange, node: Node, cause: ApiError | None) -> bool:
        """A runner crashed under a request. Whether that goes on later, as its prompt was suspect before."""
        before = bool(exchange.suspect)
        decoded = _asked(exchange)
        if decoded is None:
            return False
        name = exchange.suspect = exchange.suspect or fingerprint(exchange.tenant, decoded)

        def judged(is_refused: bool, crashes: int) -> None:
            if is_refused:
                exchange.crashes = max(CRASHES_MAX, exchange.crashes)
            elif crashes and exchange.attempts < LOST_MAX:
                exchange.crashes = min(crashes, exchange.crashes)  # another prompt is blamed for the others
            if before and not exchange.settled:
                try:
                    exchange.go_on(node, Failure.CRASH, cause)
                except Exception:
                    exchange.broken()

        age = monotonic() - exchange.sent
        self.suspects.crashed(name, self._runner(exchange), node.name, age, exchange.token > 0.0, judged)
        return before

    def _runner(self, exchange: Exchange) -> str:
        pool = self._gateway.snapshot.pool(exchange.tenant)
        return counted(canonical_name(exchange.model), pool.group)

    def _ask_again(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for exchange, trial in waiting.items():
            if exchange.wanted is trial.wanted and may_go_on(exchange):
                self._ask(exchange, trial)

    def _ask(self, exchange: Exchange, trial: Trial) -> None:
        def heard(free: bool) -> None:
            if exchange.wanted is not trial.wanted:
                if free:
                    self.suspects.leave(trial.name, trial.runner, trial.node.name)
                return  # its caller has left
            now = monotonic()
            if not free and now < trial.until:
                self.waiting[exchange] = trial
                return
            if free:
                self.trying[exchange] = trial
            try:
                if unfit(trial.node, trial.wanted, now):
                    self.got_on(exchange)
                    self._gateway.queue.again(exchange, now)
                else:
                    exchange.begin(trial.node, now)
            except Exception:
                exchange.broken()

        self.suspects.begin(trial.name, trial.runner, trial.node.name, heard)


def _asked(exchange: Exchange) -> Decoded | None:
    """What a request asks for, all of it: before another node went on with it, or its batches were counted off."""
    if exchange.resumption is not None:
        return exchange.resumption.first
    decoded, key = exchange.decoded, exchange.key
    if decoded is None or key is None or not decoded.responder.kept:
        return decoded
    try:
        whole = decode(exchange.path, exchange.body, exchange.request_id, key, exchange.gateway.snapshot)
    except ApiError:
        return None  # the key may not ask for that any more
    whole.more = decoded.more
    return whole
