"""`Retry-After` of each refusal of the gateway's own: by what is known, for some callers later, for none too early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.fleet.node import NodeState
from corral.gateway import admit, catalogue, recover, schedule, throughput
from corral.gateway.journal import Journal
from corral.gateway.snapshot import POLL, Snapshot
from corral.gateway.throughput import Throughput
from corral.store.budget import Budget
from corral.store.share import Verdict
from corral.wire.errors import ApiError, jittered, overloaded

TIMES = 200
"""Of two values that are as likely, one alone is not seen so often in a row (1 in 10^60)."""


def waits(refusal: Callable[[], ApiError]) -> set[int]:
    found = set()
    for _ in range(TIMES):
        error = refusal()
        assert error.status in (429, 503) and error.retry_after is not None
        found.add(error.retry_after)
    return found


def raised(call: Callable[[], object]) -> Callable[[], ApiError]:
    def refusal() -> ApiError:
        with pytest.raises(ApiError) as error:
            call()
        return error.value

    return refusal


@given(st.floats(0.0, 1e6))
def test_no_retry_is_too_early_and_none_much_too_late(seconds: float) -> None:
    found = {jittered(seconds) for _ in range(TIMES)}
    assert seconds <= min(found) and max(found) <= max(1.0, seconds + 1) + min(max(1.0, seconds / 10), 60)
    assert len(found) > 1, "not all come back in the same second"


def known(state: NodeState = NodeState.DOWN) -> Snapshot:
    """One with a model on a node, that control just told."""
    snapshot = Snapshot({})
    tags = [{"name": "m:latest", "model": "m:latest"}]
    node = {"name": "a", "url": "http://a", "state": state.value, "slots": 1, "tags": tags, "ps": [], "version": "0"}
    key = {"id": "k", "verifiers": []}
    snapshot.apply({"version": "1", "keys": [key], "nodes": [node]})
    snapshot.heard = time.monotonic()
    return snapshot


def test_of_a_fleet_that_is_away() -> None:
    snapshot, now = known(), time.monotonic()
    found = waits(raised(lambda: schedule.schedule(snapshot, "", "m", snapshot.heard)))
    assert found == {2, 3}, "control looks in a second, and is asked half a second later at most"
    assert schedule.looked_at_in(snapshot, snapshot.heard + POLL / 2) == pytest.approx(1.25)
    assert schedule.looked_at_in(snapshot, snapshot.heard + 60) == 1.0, "control is away: this gateway looks itself"
    ready = known(NodeState.READY)
    ready.nodes["a"].shunned_until = now + 4.5
    assert schedule.ready_in(ready, "", "m:latest", now) == pytest.approx(4.5)


class Tried:
    """What a request went through."""

    attempts = orphaned = crashes = lost = connects = 0


def test_of_a_node_that_is_not_reached() -> None:
    assert waits(lambda: recover.final_error(recover.Failure.CONNECT, Tried(), None, 6.5)) == {7, 8}


def test_of_a_fleet_that_has_told_nothing() -> None:
    snapshot = known()
    snapshot.nodes["a"].version = ""
    snapshot.heard -= 60
    assert waits(raised(lambda: catalogue.answer("/api/version", "", snapshot, snapshot.keys["k"]))) == {1, 2}


def test_of_limits() -> None:
    budget = Budget("k", 60)
    assert waits(lambda: admit.refusal(Verdict("store", 0, 0.0, 0.3), budget)) == {1, 2}
    assert waits(lambda: admit.refusal(Verdict("rpm", 0, 60.0, 6.2), budget)) == {7, 8}
    assert waits(raised(lambda: admit.duration({admit.DEADLINE: b"0"}, 60.0))) == {1, 2}


def test_the_mean_of_what_is_done_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throughput, "monotonic", lambda: now)
    bodies = Throughput()
    assert bodies.time_for(10, 60.0) == 60.0
    for _ in range(1000):
        now += 0.1
        bodies.done(100)
    assert bodies.time_for(5000, 60.0) == pytest.approx(5.0, rel=0.01)
    assert bodies.time_for(0, 60.0) == bodies.time_for(-5, 60.0) == 0.0
    now += 30
    assert 60.0 < bodies.time_for(5000, 1e9) < 120.0


def test_of_a_disk_that_takes_no_records(tmp_path: Path) -> None:
    async def run() -> None:
        journal = Journal(tmp_path, "", asyncio.get_running_loop())
        now = 1000.0
        assert [journal.pause(now + after) for after in (0.0, 3.0, 20.0, 300.0)] == [0.0, 3.0, 20.0, 30.0]
        assert waits(lambda: overloaded("", journal.pause(now + 3.0))) == {3, 4}
        journal.close()

    asyncio.run(run())
