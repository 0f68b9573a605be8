"""A gateway is killed, for good or not, or stands still, under load: what it had begun ends so that the caller sees it,
nothing is unrecorded, and no node has more running than it has slots."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx
from support.counted import Counted
from support.fleet import MODEL, Fleet
from support.leader import Leader
from support.load import CHAT, CUT, TOLD, WHOLE, after, body_of
from support.process import until
from support.servers import python_env

from corral.store.keeper import POLL, RENEW
from corral.store.lua import PREFIX
from corral.store.slots import LEASE

Matrix = Callable[[str, str, str], None]

BACK_WITHIN = 3.0
SLOTS_BACK_WITHIN = LEASE + 2 * POLL
"""The lease, and the next one's look at it; another half second for a machine that is busy."""
STALLED = 15.0
EVERY = 0.05
SLOTS = 4
"""Of each node (`contended` in conftest.py)."""
LONG, RATE = 40, 40.0
"""Tokens of a stream, and how many of them the model gives a second."""
ROUNDS = 3
MORE = f"{SLOTS // 2} more on a node for a gateway that lost the store, which in one of up to {ROUNDS} rounds none did"
"""What bars say of those that the machine cuts off, not the fault."""


class Lost:
    """How many connections to the store a fleet's gateways, or those that are named, have lost from now on.

    On a machine that halts for 50 ms a gateway misses the store, and gives its share of the slots beside what the other
    one runs; what it had given, and what ended meanwhile, the store hears with the next connection.
    """

    def __init__(self, fleet: Fleet, *names: str) -> None:
        self._fleet = fleet
        names = names or tuple(gateway["name"] for gateway in fleet.stack.corral("status")["gateways"])
        self._known, self._gateways = {name: self._made(name) for name in names}, len(names)
        self._before = 0.0

    def _made(self, gateway: str) -> float:
        return self._fleet.gateway_says(gateway, "corral_limit_store_connections_total")

    def killed(self, gateway: str) -> None:
        """One is about to be."""
        self._before += self._made(gateway) - self._known.pop(gateway)

    def back(self, gateway: str) -> None:
        """Its next process is there, and counts from its first connection."""
        self._known[gateway] = 1.0

    @property
    def count(self) -> int:
        """How many."""
        return int(self._before + sum(max(0.0, self._made(name) - known) for name, known in self._known.items()))

    def bound(self, count: int) -> int:
        """How many may have run on a node: as it has slots, and a share for each of these gateways that lost one."""
        return SLOTS + min(count, self._gateways) * SLOTS // 2


def strict(fleet: Fleet, fault: Callable[[], tuple[int, str]]) -> str:
    """What was seen of a fault when no gateway lost the store beside it: only then would one slot given twice be seen.

    ``fault`` makes it, holds what it saw to the bound, and tells how many connections were lost, and what it saw.
    """
    lost: list[int] = []
    for _ in range(ROUNDS):
        fleet.all_ready()
        for node in fleet.nodes.values():
            node.count_anew()
        count, seen = fault()
        lost.append(count)
        if not count:
            return f"{seen}, connections to the store lost: {', '.join(map(str, lost))}"
    raise AssertionError(f"each round had lost connections, {lost}: whether slots are granted twice was not seen")


def peaks(fleet: Fleet) -> list[int]:
    """The most that ran at once on each node, as the nodes saw it."""
    return [node.work()["most"] for node in fleet.nodes.values()]


def ready(gateway: dict[str, str]) -> bool:
    try:
        return httpx.get(gateway["url"] + "/health/ready", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def imports() -> float:
    """Seconds that a process takes here and now to have read what a gateway is made of."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import corral.gateway.main"], env=os.environ | python_env(), check=True)
    return time.monotonic() - began


def test_a_killed_gateway_is_back_and_each_of_its_requests_is_on_record(contended: Fleet, matrix: Matrix) -> None:
    def fault() -> tuple[int, str]:
        gateway = contended.stack.corral("status")["gateways"][0]
        store, lost = Leader(contended.valkey.url), Lost(contended)
        with contended.load(tokens=[40, 8], name="gateway") as load:
            load.more(40)
            # It is made beside others, whose processes want the same cores; by itself it is in test_processes.py.
            bound = BACK_WITHIN + imports()
            # The long ones of both gateways: there is no telling from outside which is whose.
            load.until(lambda _: len(load.streaming) >= 6 and store.waiting(MODEL) >= 4, "streams run, and others wait")
            lost.killed(gateway["name"])
            os.kill(gateway["pid"], signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: not os.path.exists(f"/proc/{gateway['pid']}") and ready(gateway), "the gateway is back")
            back = time.monotonic() - killed
            lost.back(gateway["name"])
            assert back < bound
            load.until(lambda answers: len(after(answers, killed + BACK_WITHIN)) > 40, "requests go on")
            used, holders = store.counts(MODEL)
            assert used == holders > 0, "a slot is counted that nobody has, or not counted"
        until(lambda: store.counts(MODEL) == (0, 0), "its slots are back, and those of all others", SLOTS_BACK_WITHIN)
        returned = time.monotonic() - killed
        ran, misses = peaks(contended), lost.count
        most = lost.bound(misses)
        assert all(SLOTS <= one <= most for one in ran), f"{ran}: all of them were in use, and no more than {most}"

        # What was begun cannot be whole; what was not is the edge's to replay: nobody hears of it.
        assert load.unlike(WHOLE, CUT) == []
        cut = [answer for answer in load.answers if answer.fate == CUT]
        assert cut, "the killed gateway had no stream"
        assert [str(answer) for answer in cut if not answer.first] == []
        assert [str(answer) for answer in cut if answer.began > killed] == []

        ended = [answer.request_id for answer in load.answers if answer.fate == WHOLE]
        contended.records(*ended)
        records = contended.admitted(*(answer.request_id for answer in load.answers))
        for answer, record in zip(load.answers, records, strict=True):
            # Its gateway died before it could say how it ended: what was admitted stands all the same, open for fifteen
            # seconds and then settled by control.
            outcomes = ("ok",) if answer.fate == WHOLE else (None, "interrupted")
            assert record["outcome"] in outcomes, (str(answer), record)
        seen = f"back in {back:.1f} s (imports {bound - BACK_WITHIN:.1f} s), {len(cut)} of {len(load.answers)} cut, "
        seen += f"none held after {returned:.0f} s"
        return misses, f"{seen}, at most {max(ran)} of {SLOTS} slots a node in use"

    bar = f"back <= {BACK_WITHIN:g} s and what imports take here, no slot leaks past its lease and two "
    bar += f"looks ({SLOTS_BACK_WITHIN:g} s) after its load, or counts twice ({MORE})"
    matrix("gateway killed (-9)", bar, strict(contended, fault))


def test_the_slots_of_a_killed_gateway_that_stays_away_return_with_its_lease(contended: Fleet, matrix: Matrix) -> None:
    def fault() -> tuple[int, str]:
        dead, other = contended.stack.corral("status")["gateways"]
        name, store = dead["name"], Leader(contended.valkey.url)
        all_of_them = {other["name"]: 2 * SLOTS}
        lost = Lost(contended)

        with (
            Counted(contended, SLOTS, LONG / RATE) as slots,
            contended.load(clients=14, paths=[CHAT], tokens=[LONG], name="away", fresh=True) as load,
            contended.unsupervised(),
        ):
            load.more(28)
            lost.killed(name)
            load.until(lambda _: 2 <= slots.look()[name] < 2 * SLOTS - 1, "both have slots")
            os.kill(dead["pid"], signal.SIGKILL)
            killed = time.monotonic()
            load.until(lambda _: slots.exact(other["name"]), "its streams are gone from the nodes")
            kept = held = slots.look()[name]
            assert kept, "they were given away while its lease ran"
            while held == kept:
                seen = time.monotonic() - killed
                assert seen < SLOTS_BACK_WITHIN, "its lease has run out, and its slots are still held"
                time.sleep(EVERY)
                held = slots.look()[name]
            returned = time.monotonic() - killed
            assert not held, "some are still held"
            for node in contended.nodes.values():
                node.count_anew()
            load.until(lambda _: slots.look() == all_of_them, "the other gateway has them all")
            load.until(lambda _: slots.exact(other["name"]), "the nodes run what it holds")
            load.more(28)
            assert slots.look().keys() == all_of_them.keys()
            most, misses = peaks(contended), lost.count
        until(lambda: store.counts(MODEL) == (0, 0), "all slots are back", SLOTS_BACK_WITHIN)
        until(lambda: ready(dead), "it is back")
        bound = lost.bound(misses)
        wrong = [what for by, what in slots.wrong if by > bound - SLOTS]
        assert wrong == [], f"{misses} connections to the store were lost"
        assert all(SLOTS <= one <= bound for one in most), f"{most}: all were in use again, and no more than {bound}"
        assert returned > LEASE - 2 * RENEW, "while it might have been alive"
        assert load.unlike(WHOLE, CUT) == []
        cut = [answer for answer in load.answers if answer.fate == CUT]
        assert [str(answer) for answer in cut if answer.began > killed] == []
        # All that was asked for before that may have waited since, where few slots are left.
        began = [answer for answer in load.answers if answer.fate == WHOLE and answer.first > killed]
        meanwhile = [answer for answer in began if answer.ended < killed + returned]
        assert meanwhile, f"others' requests wait for that: {kept} slots were kept"
        said = f"{kept} back after {returned:.1f} s, {len(meanwhile)} answered before that, {len(cut)} cut"
        return misses, f"{said}; nodes and store agreed at {slots.looks} looks"

    bar = f"its slots return within its lease and two looks ({SLOTS_BACK_WITHIN:g} s), none twice ({MORE}); "
    bar += "others' requests go on"
    matrix("gateway killed (-9), stays away", bar, strict(contended, fault))


def test_what_a_killed_gateway_had_of_a_keys_concurrency_returns_with_its_lease(
    contended: Fleet, matrix: Matrix
) -> None:
    dead, other = contended.stack.corral("status")["gateways"]
    headers = {"Authorization": f"Bearer {contended.key('two-at-once', '--concurrency', '2')}"}
    long, short = body_of(CHAT, MODEL, 20 * int(RATE)), body_of(CHAT, MODEL, 1, stream=False)

    def status() -> int:
        return httpx.post(other["url"] + CHAT, content=short, headers=headers, timeout=30).status_code

    answers = []  # who lets go of its lines ends a stream
    with ExitStack() as streams, contended.unsupervised():
        for _ in range(2):
            stream = httpx.stream("POST", dead["url"] + CHAT, content=long, headers=headers, timeout=30)
            answers.append(streams.enter_context(stream).iter_lines())
            next(answers[-1])
        # Not at once where a machine that halts has one of them miss the store.
        until(lambda: status() == 429, "the store has heard of both", every=EVERY)
        lost = Lost(contended, other["name"])
        os.kill(dead["pid"], signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: status() == 200, "the key may ask again", SLOTS_BACK_WITHIN + 5, every=EVERY)
        free = time.monotonic() - killed
    until(lambda: ready(dead), "it is back")
    bar = f"a key's concurrency returns within the gateway's lease and two looks ({SLOTS_BACK_WITHIN:g} s)"
    matrix("gateway killed (-9) with all that a key may run", bar, f"after {free:.1f} s")
    assert free < SLOTS_BACK_WITHIN
    assert free > LEASE - 2 * RENEW or lost.count, "while it might have been alive"


def test_a_gateway_that_stands_still_for_longer_than_its_lease_uses_no_slot_twice(
    contended: Fleet, matrix: Matrix
) -> None:
    def fault() -> tuple[int, str]:
        gateway, other = contended.stack.corral("status")["gateways"]
        store = Leader(contended.valkey.url)
        held_by = PREFIX + b"held:" + gateway["name"].encode()

        def waits() -> bool:
            # Its turn comes while nobody hears of it, and is over before somebody does.
            return sum(text.startswith(b"t ") for text in store.ask(b"HVALS", held_by)) >= 2

        # The one that stands still gives no share of its own: it asks the store first.
        lost = Lost(contended, other["name"])
        with contended.load(clients=12, paths=[CHAT], tokens=[40, 8], name="stalled") as load:
            load.more(24)
            load.until(lambda _: waits(), "some of its requests wait")
            os.kill(gateway["pid"], signal.SIGSTOP)
            stalled = time.monotonic()
            try:
                # The edge has found out by then: these are all the other gateway's.
                load.until(lambda _: time.monotonic() > stalled + BACK_WITHIN, "the edge asks it no more")
                # Fewer than there are places: who asks again may be there before what it has given back.
                with contended.load(clients=10, paths=[CHAT], tokens=[40, 8], name="others") as others:
                    others.until(lambda _: time.monotonic() > stalled + STALLED, "it stands still", STALLED + 5)
                    before = peaks(contended)
                    for node in contended.nodes.values():
                        node.count_anew()
                    os.kill(gateway["pid"], signal.SIGCONT)
                    back = time.monotonic()
                    load.until(lambda answers: len(after(answers, back)) >= 24, "its callers are answered again")
                    used, holders = store.counts(MODEL)
                    assert used == holders > 0, "a slot is counted that nobody has, or not counted"
            finally:
                os.kill(gateway["pid"], signal.SIGCONT)
        until(lambda: store.counts(MODEL) == (0, 0), "all slots are back", SLOTS_BACK_WITHIN)
        assert len(after(others.answers, stalled)) > 24, "nobody had the slots that it could not give back"
        answers = [*load.answers, *others.answers]
        misses = lost.count
        bound = lost.bound(misses)
        assert max(before) <= bound
        assert all(SLOTS <= most <= bound for most in peaks(contended)), (
            f"{peaks(contended)}: all were in use, and no more"
        )
        assert [str(answer) for answer in answers if answer.fate not in (WHOLE, TOLD)] == []
        told = sum(answer.fate == TOLD for answer in answers)
        held = sum(answer.began < stalled + BACK_WITHIN and answer.ended > back for answer in load.answers)
        seen = f"at most {max(peaks(contended))} of {SLOTS} on a node, {held} of its requests went on, {told} told"
        return misses, seen

    bar = f"no slot used twice after {STALLED:g} s, its lease is {LEASE:g} s and renewed each {RENEW:g} s ({MORE})"
    matrix("gateway stalled (-STOP) under load", bar, strict(contended, fault))
