"""Whether a runner (a model on a node) hangs, by what its requests show: it has work, and gives no token for too long.

Only tokens, and time with work, are counted: who comes and who leaves says nothing of a runner. Embeddings are read as
prompts are, and the answer to a batch of them counts as a token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from corral.fleet.node import Node, NodeState
from corral.fleet.tickets import LOAD_SHARE

SILENCE: Final = 5.0
"""Seconds without a token that any runner may take."""
PREFILL: Final = 3.0
"""So many times what reading its prompts should take a runner may be silent."""
RATE: Final = 100.0
"""Tokens of a prompt a second, until a model's rate is known: what a small machine reads."""
LONG: Final = 64
"""Tokens from which on the time of reading says something of that rate."""
FADES: Final = 1.05
"""So much faster than the slowest rate that is known the next one may be taken for."""
STEP_MAX: Final = 1.0
"""A look that comes later than so many seconds after the last one says that the gateway stood still, not the runner."""
IDLE: Final = 60.0
"""After so many seconds without work, what was before it is forgotten."""
APART: Final = 0.25
"""So many seconds later than the last one a token is a new one, of those that other gateways tell of."""
LOADS: Final = 15.0
"""Seconds that a load of another model on the same node excuses, at least: as many as one that was never timed."""


def needs(estimate: int, rate: float) -> float:
    """For how long a runner may be silent that reads a prompt of so many tokens, at so many a second (seconds)."""
    return max(SILENCE, PREFILL * estimate / rate)


def patience(load: float = 0.0) -> float:
    """For how long in all a runner may be silent beside a load of another model that should take so long (seconds; 0:
    nobody knows). The load takes the disk, the bus and the memory that the runner's tokens need.

    It is a bound, so that a load that hangs hides no runner that does.
    """
    return max(LOADS, LOAD_SHARE * load)


class Rates:
    """At how many tokens a second models read, at the slowest; that fades with each time they are faster."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}

    def of(self, model: str) -> float:
        """A model's rate."""
        return self._known.get(model, RATE)

    def needs(self, model: str, estimate: int) -> float:
        """See `needs`."""
        return needs(estimate, self.of(model))

    def learn(self, model: str, estimate: int, seconds: float) -> None:
        """So many tokens were read in so many seconds, the wait before them among these."""
        if estimate >= LONG:
            rate, known = estimate / max(0.001, seconds), self._known.get(model)
            self._known[model] = rate if known is None else min(rate, known * FADES)


class Runner:
    """A runner as the requests that were sent to it show it. Times are monotonic seconds.

    ``token`` is when it last gave one to a request of this gateway, ``heard`` to another's, as that says; ``waited`` is
    for how many seconds it has had work since then, and ``budget`` for how many it may: as the longest prompt needs
    that it has, or had a moment ago. ``excused`` are those that loads of other models took beside it, and no part of
    ``waited``.

    At each look, `works` is called for each request that it has, `beside` where other gateways have some, then `look`.
    """

    def __init__(self, node: str, model: str, now: float) -> None:
        self.node = node
        self.model = model
        self.token = self.heard = 0.0
        self.waited = 0.0
        self.excused = 0.0
        self.budget = SILENCE
        self._looked = now
        self._worked = now
        self._gone = 0.0
        self._has = False
        self._sent = 0.0
        self._needs = SILENCE

    def works(self, sent: float, need: float) -> None:
        """It has a request that was sent at `sent` and, while its prompt is read, `need`s so many seconds for that."""
        if not self._has or sent < self._sent:
            self._sent = sent
        self._needs = max(self._needs, need)
        self._has = True

    def beside(self, need: float, token: float) -> None:
        """Another gateway has prompts there that `need` so many seconds, and got a token last at `token`."""
        self._needs = max(self._needs, need)
        # The clocks of two gateways are compared by way of the store: what is hardly later is the same token.
        if token > self.last + APART:
            self.heard = token
            self.anew()

    @property
    def last(self) -> float:
        """When it last gave anybody a token, as far as is known here."""
        return max(self.token, self.heard)

    def look(self, now: float, loaded: bool = True, patience: float = 0.0) -> bool:
        """Whether it has given no token for longer than it may, and has work now.

        One that is not ``loaded`` never has, however long the load takes: its time begins when it is in memory.
        While its node loads another model it has not either, for up to ``patience`` seconds of one silence.
        """
        before, has, need = self._looked, self._has, self._needs
        self._looked, self._has, self._needs = now, False, SILENCE
        if not loaded or self.token >= before or (not has and now - self._worked > IDLE):
            self.anew()
        if not has:
            return False
        self._worked = now
        if not loaded:
            return False
        step = min(STEP_MAX, max(0.0, now - max(before, self._sent, self.token)))
        excused = self.excused < patience
        if excused:
            self.excused += step
            step = 0.0
        self.waited += step
        if need >= self.budget:
            self.budget, self._gone = need, 0.0
        else:
            # Who asked for that has left. The runner may have read for them until now: the others have not had all of
            # it yet. Nor is it forgotten for good, or a prompt that nobody waits for would excuse a runner for ever.
            self._gone += step
            if self._gone > SILENCE:
                self.budget, self._gone = need, 0.0
        return not excused and self.waited > self.budget

    def anew(self) -> None:
        """What was before says nothing of it any more: it gave a token, or was loaded again."""
        self.waited = self.excused = self._gone = 0.0
        self.budget = SILENCE

    def unused(self, now: float) -> bool:
        """Whether nothing is known of it that counts."""
        return now - max(self._worked, self.token) > IDLE


def stays(
    node: Node,
    model: str,
    out: Collection[tuple[str, str]],
    nodes: Mapping[str, Node],
    groups: Mapping[str, str],
) -> bool:
    """Whether a runner stays in use though it hangs. `out`: what is suspect, itself too (names of node and model).

    So it does where no other node of its group would take its streams: they have nowhere else to go. Where more than
    half of all nodes hang: then it is who looks that sees wrongly. And where with it more than half of its group would
    be out, those that are down among them: they are dead by other eyes than these, but their work is on the rest, and
    what is slow for that must not go too, one after the other. What is drained or removed is missed by nobody, so an
    operator who gives up a dead node has the hung one of three go.

    A suspect that stays gets no new work while another node takes it (`choose`): only its streams wait.
    """
    serving = {name for name, one in nodes.items() if one.state is not NodeState.DRAINING}
    hang = {name for name, _ in out if name in serving}
    group = groups.get(node.name, "")
    alike = {name for name in serving if groups.get(name, "") == group}
    lost = {name for name in alike if name in hang or nodes[name].state is NodeState.DOWN}
    if len(hang) * 2 > len(serving) or len(lost) * 2 > len(alike):
        return True
    for other in nodes.values():
        if other is node or groups.get(other.name, "") != group:
            continue
        if other.state is NodeState.READY and model in other.held and (other.name, model) not in out:
            return False
    return True
