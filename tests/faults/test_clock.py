"""The wall clock of the whole machine is set an hour on, and back: no lease, limit or deadline goes by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.clock import Clock, jumping
from support.fleet import MODEL, QUICK, Fleet
from support.fleet import fleet as run_fleet
from support.load import CHAT, WHOLE, body_of
from support.process import until

HOUR = 3600.0
LIMIT = 30
ALONE = "corral_local_admissions_total"


@pytest.fixture(scope="module")
def jumpy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Clock]]:
    """A fleet, all of whose processes go by a clock that can be set: gateways, control, HAProxy, Valkey and nodes."""
    folder = tmp_path_factory.mktemp("clock")
    with jumping(folder) as (clock, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with run_fleet(folder, "20s") as made:
            for name in environment:
                patch.delenv(name)
            made.all_ready()
            yield made, clock


def wall(fleet: Fleet) -> float:
    """How far control's clock is from ours, by what it says of when it heard a gateway last."""
    return float(fleet.stack.admin("status")["gateways"][0]["last_seen"]) - time.time()


def admitted(fleet: Fleet, key: str, count: int) -> int:
    """Of requests at once, those that a limit let through."""

    def one(number: int) -> int:
        client = fleet.client(key)
        answer = client.ask(CHAT, body_of(CHAT, QUICK, 1), f"limited-{number}")
        client.close()
        assert answer.status in (200, 429), str(answer)
        return answer.status

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count))).count(200)


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_jump_ends_and_resets_nothing(
    jumpy: tuple[Fleet, Clock], matrix: Callable[[str, str, str], None], jump: float
) -> None:
    fleet, clock = jumpy
    fleet.all_ready()
    ejections = fleet.sum_of("corral_ejections_total")
    key = fleet.key(f"jump{jump:+.0f}".replace("+", "p").replace("-", "m"), "--rpm", str(LIMIT))
    began, alone = time.monotonic(), fleet.sum_of(ALONE)
    passed = admitted(fleet, key, 40)
    # What comes back meanwhile, and what a gateway admits of its share that misses the store for 50 ms.
    assert passed <= LIMIT + 1 + (time.monotonic() - began) * LIMIT / 60 + fleet.sum_of(ALONE) - alone
    states: list[set[str]] = []
    with fleet.load(MODEL, clients=8, paths=[CHAT], tokens=[80, 8], name=f"jump{jump:.0f}") as load:
        load.more(16)
        clock.set(jump)
        jumped = time.monotonic()
        until(lambda: abs(wall(fleet) - jump) < 60, "the stack's clock has jumped")
        # A minute that is used up stays so, and from the first request on it passes.
        first = admitted(fleet, key, 1)
        while time.monotonic() < jumped + 8:
            states.append(set(fleet.states().values()))
            time.sleep(0.1)
        again = admitted(fleet, key, 40)
        load.more(16)
        clock.set(0.0)
        load.more(16)
        load.until(lambda _: time.monotonic() > jumped + 12, "it has jumped back a while ago")
    fleet.all_ready()
    assert load.unlike(WHOLE) == []
    assert {answer.attempts for answer in load.answers} == {1}
    assert states and all(each == {"ready"} for each in states)
    assert fleet.sum_of("corral_ejections_total") == ejections
    # Eight seconds refill four. One window more may be let in, and nobody is shut out for an hour.
    assert 1 <= again + first <= 38
    measured = f"0 of {len(load.answers)} requests failed, 0 ejections; "
    measured += f"limit of {LIMIT} a minute: {first + again} in 8 s"
    matrix(f"clock jumps {jump / 60:+.0f} min", "no mass expiry or reset", measured)
