"""Valkey dies or hangs under load: requests go on, limits hold in shares, and its return is the end of it."""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from support.cut_off import behind_a_line
from support.fleet import MODEL, QUICK, Fleet
from support.late import lateness
from support.leader import Leader
from support.load import CHAT, WHOLE, Answer, Client, body_of
from support.process import until
from support.servers import valkey

from corral.store.lua import PREFIX

Matrix = Callable[[str, str, str], None]

ADDED = 0.050
OVER = 1.1
EXACT = 5.0
GATEWAY, OTHER = "gateway-2", "gateway-1"


@pytest.fixture(autouse=True)
def mended(fleet: Fleet) -> Iterator[None]:
    """Valkey answers again, and both gateways use it."""
    yield
    revive(fleet)


def kill(fleet: Fleet) -> None:
    """kill -9."""
    fleet.valkey.process.end(signal.SIGKILL)


def revive(fleet: Fleet) -> None:
    """Start it again, empty, where it was killed; wait until both gateways count in it."""
    # Not as control sees it, which may not have connected again to one that only hung.
    if not fleet.valkey.process.alive:
        port = urlsplit(fleet.valkey.url).port
        fleet.valkey = fleet.enter(valkey(fleet.folder, port))
    until(fleet.store_used, "both gateways are back in the store", every=0.1)


def burst(
    fleet: Fleet, key: str, count: int, tokens: int = 1, model: str = QUICK, url: str | None = None
) -> list[Answer]:
    """Requests at once, each on a connection of its own, at the edge or at a gateway."""

    def one(number: int) -> Answer:
        client = Client(url or fleet.stack.url, key)
        answer = client.ask(CHAT, body_of(CHAT, model, tokens), f"burst-{number}")
        client.close()
        return answer

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(count)))


def admitted(answers: list[Answer]) -> int:
    """How many were answered; the others were told 429 with Retry-After."""
    assert {answer.status for answer in answers} <= {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status == 429)
    return Counter(answer.status for answer in answers)[200]


def test_requests_go_on_without_it(fleet: Fleet, matrix: Matrix) -> None:
    with fleet.load(name="store-killed") as load:
        load.more(20)
        kill(fleet)
        load.more(60)
        revive(fleet)
        load.more(40)
    assert load.unlike(WHOLE) == []
    assert {answer.attempts for answer in load.answers} == {1}
    matrix("Valkey killed (-9) under load", "0 requests lost", f"0 of {len(load.answers)}")


def test_the_rate_is_held_in_shares_and_counts_on_after_the_loss(fleet: Fleet, matrix: Matrix) -> None:
    limit = 60
    # Both made before: what a command takes is a refill of as many requests.
    spent, fresh = (fleet.key(name, "--rpm", str(limit)) for name in ("spent", "fresh"))
    began = time.monotonic()
    first = admitted(burst(fleet, spent, limit + 20))
    assert limit - 5 <= first <= limit + max(5.0, (time.monotonic() - began) * limit / 60)
    used_up = time.monotonic()
    kill(fleet)
    passed = admitted(burst(fleet, spent, limit))
    came_back = 2 + (time.monotonic() - used_up) * limit / 60
    assert passed <= max(limit * (OVER - 1), came_back), "its minute was used up before the loss"
    during = admitted(burst(fleet, fresh, 2 * limit))
    assert limit * 0.5 <= during <= limit * OVER
    revive(fleet)
    assert admitted(burst(fleet, fresh, limit)) <= limit * 0.3, "its minute was used up during the loss"
    matrix("a limit while Valkey is away", "over-admission <= 10%", f"{during} admitted of a limit of {limit}")


def test_what_a_gateway_admitted_just_before_the_loss_is_known_to_the_other(fleet: Fleet, matrix: Matrix) -> None:
    limit, at_once = 20, 10
    one, other = [gateway["url"] for gateway in fleet.stack.corral("status")["gateways"]]
    key = fleet.key("hasty", "--rpm", str(limit), "--concurrency", str(at_once))
    leases, store = PREFIX + b"leases:" + key.split("_")[1].encode(), Leader(fleet.valkey.url)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        # Three seconds each: they run still when the other one is asked.
        running = pool.submit(burst, fleet, key, at_once, 120, MODEL, one)
        until(lambda: store.ask(b"ZCARD", leases) == at_once, "they run", every=0.002)
        kill(fleet)
        beside = admitted(burst(fleet, key, at_once, url=other))
        assert beside <= at_once * (OVER - 1), "all that may run at once runs"
        assert admitted(running.result()) == at_once
    passed = at_once + beside + sum(admitted(burst(fleet, key, limit, url=url)) for url in (one, other))
    assert passed <= limit * OVER + (time.monotonic() - began) * limit / 60
    measured = f"{passed} of {limit} a minute, {at_once + beside} of {at_once} at once"
    matrix("a limit while Valkey is away, a burst before", "over-admission <= 10%", measured)


def test_concurrency_is_held_in_shares(fleet: Fleet) -> None:
    limit = 8
    key = fleet.key("wide", "--concurrency", str(limit))
    # Three seconds each: the last one comes while the first still runs, also on a machine that halts.
    assert admitted(burst(fleet, key, 16, tokens=120, model=MODEL)) == limit
    kill(fleet)
    assert limit // 2 <= admitted(burst(fleet, key, 16, tokens=120, model=MODEL)) <= limit
    revive(fleet)
    assert admitted(burst(fleet, key, 16, tokens=120, model=MODEL)) == limit


def waits(fleet: Fleet, key: str, count: int) -> list[float]:
    """Seconds that each of so many requests waited before a node had it."""
    client = fleet.client(key)
    answers = [client.ask(CHAT, body_of(CHAT, QUICK, 1), f"waits-{number}") for number in range(count)]
    client.close()
    assert {answer.status for answer in answers} == {200}
    return [float(answer.headers["x-corral-queue-ms"]) / 1e3 for answer in answers]


def adds_little(matrix: Matrix, fault: str, before: list[float], during: list[float], late: list[float]) -> None:
    measured = f"longest wait {max(during) * 1e3:.0f} ms, {max(before) * 1e3:.0f} ms before"
    matrix(fault, f"<= {ADDED * 1e3:.0f} ms added", measured)
    assert max(during) <= ADDED + max(before) + 0.01 + max(late)
    assert statistics.median(during) <= statistics.median(before) + 0.01, "each request pays, not only the first"


def test_a_hung_store_adds_50_ms_at_most(fleet: Fleet, matrix: Matrix) -> None:
    before = waits(fleet, "", 100)
    fleet.valkey.process.send(signal.SIGSTOP)
    try:
        with lateness() as late:
            during = waits(fleet, "", 200)
    finally:
        fleet.valkey.process.send(signal.SIGCONT)
    adds_little(matrix, "Valkey hangs (-STOP)", before, during, late)
    until(fleet.store_used, "both gateways are back in the store", every=0.1)


@pytest.mark.parametrize(
    ("why", "begins", "ends"),
    [
        ("it became a replica", b"REPLICAOF 127.0.0.1 1", b"REPLICAOF NO ONE"),
        ("it is full", b"CONFIG SET maxmemory 1", b"CONFIG SET maxmemory 0"),
    ],
)
def test_a_store_that_takes_no_writes_adds_50_ms_at_most(
    fleet: Fleet, matrix: Matrix, why: str, begins: bytes, ends: bytes
) -> None:
    key = fleet.key(f"wide: {why}", "--rpm", "60000", "--tpm", "10000000", "--concurrency", "100")
    before = waits(fleet, key, 100)
    with fleet.valkey_client() as store:

        def does(command: bytes) -> None:
            store.sendall(command + b"\r\n")
            assert store.recv(64) == b"+OK\r\n"

        does(begins)
        try:
            with lateness() as late:
                during = waits(fleet, key, 100) + waits(fleet, "", 100)
        finally:
            does(ends)
    adds_little(matrix, f"Valkey takes no writes: {why}", before, during, late)
    until(fleet.store_used, "both gateways are back in the store", every=0.1)


def test_a_gateway_that_alone_has_lost_the_store_is_sent_nobody(fleet: Fleet, matrix: Matrix) -> None:
    limit = 60
    keys = [fleet.key(f"cut-off-{number}", "--rpm", str(limit)) for number in range(2)]
    with behind_a_line(fleet, GATEWAY) as way:
        fleet.all_ready()
        until(lambda: fleet.gateway_says(GATEWAY, "corral_limit_store_up"), "it has the store", every=0.1)
        with lateness() as woken, fleet.load(name="cut-off") as load:
            load.more(20)
            woken.clear()
            way.cut()
            cut = time.monotonic()
            load.until(lambda _: fleet.edge_says(GATEWAY) == "NOLB", "it is sent nobody")
            took, late = time.monotonic() - cut, max(woken)
            assert fleet.gateway_says(GATEWAY, "corral_cut_off") == 1.0
            load.more(20)
            began = time.monotonic()
            passed = admitted(burst(fleet, keys[0], 2 * limit))
            refilled = (time.monotonic() - began) * limit / 60
            load.more(20)
            fleet.edge_does(f"set server gateways/{OTHER} state maint")
            load.more(20)  # it serves where it is the only one, and nobody is lost on the way
            fleet.edge_does(f"set server gateways/{OTHER} state ready")
            until(lambda: fleet.edge_says(OTHER) == "UP", "the other one is back", every=0.1)
            # From here on nobody has it.
            kill(fleet)
            until(lambda: fleet.edge_says(GATEWAY) == "UP", "all have lost it, and none is left out", every=0.1)
            load.more(20)
            during = admitted(burst(fleet, keys[1], 2 * limit))
            way.mend()
            revive(fleet)
            until(lambda: fleet.gateway_says(GATEWAY, "corral_cut_off") == 0.0, "it is not left out", every=0.1)
            until(lambda: fleet.edge_says(GATEWAY) == "UP", "it is sent callers", every=0.1)
            load.more(20)
    assert load.unlike(WHOLE) == []
    assert took <= EXACT + late
    assert limit <= passed <= limit * OVER + refilled
    assert limit * 0.5 <= during <= limit * OVER
    bar = "0 lost, sent nobody <= 5 s later (and how late its caller is woken at most), over-admission <= 10% then"
    measured = f"0 of {len(load.answers)}, {took:.1f} s, {passed} of {limit} admitted"
    matrix("one gateway cut off from Valkey", bar, measured)
