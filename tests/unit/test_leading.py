"""Who leads among control processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from corral.control import leading as module
from corral.control.leading import LEISURE, QUICK, TICK, Leading, pause
from corral.control.placement import Placement
from corral.store import lease
from corral.store.database import Database
from corral.store.demand import Seen


def test_no_leader_is_missing_where_none_is_wanted() -> None:
    nothing: Any = None
    leading = Leading(nothing, nothing, nothing, nothing)
    assert leading.missing
    leading.leads = True
    assert not leading.missing
    leading.leads = leading.wanted = False
    assert not leading.missing


def test_a_lease_that_is_not_renewed_is_over_whatever_its_holder_s_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path}/corral.db")
    database.migrate()
    # Its clock was an hour ahead; then it was killed.
    first = database.write_now(lease.take, "ahead", time.time() + 3600, 8.0)
    assert first == 1
    assert database.write_now(lease.take, "other", time.time(), 8.0) is None
    monkeypatch.setattr(module, "LEASE", 1.0)  # s; a machine that halts for less does not keep it from being renewed
    monkeypatch.setattr(module, "RENEW", 0.05)

    async def run(seconds: float, renewed: bool) -> int:
        # It writes the lease alone: without a store nothing is led.
        leading = Leading(database, None, None, lambda term: None)  # type: ignore[arg-type, return-value]
        task = asyncio.create_task(leading._renew())
        try:
            async with asyncio.timeout(seconds):
                while not leading.leads:
                    if renewed:
                        await database.write(lease.take, "ahead", time.time() + 3600, 8.0)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        finally:
            task.cancel()
            await asyncio.wait({task})
        return leading.term

    assert asyncio.run(run(2.5, renewed=True)) == 0
    assert asyncio.run(run(20.0, renewed=False)) == first + 1
    database.close()


@pytest.mark.parametrize(
    ("hurries", "took", "expected"),
    [(False, 0.01, TICK), (True, 0.01, QUICK), (True, 0.05, LEISURE * 0.05), (True, 3.0, TICK)],
)
def test_a_look_that_is_waited_for_comes_soon_but_takes_no_more_of_a_core(
    hurries: bool, took: float, expected: float
) -> None:
    assert pause(hurries, took) == pytest.approx(expected)


def test_how_busy_a_model_is_does_not_depend_on_how_often_the_leader_looks() -> None:
    nothing: Any = None
    found = []
    for every in (TICK, QUICK):
        placement = Placement(nothing, nothing, nothing)
        for look in range(int(20 / every)):
            busy = 4 if look * every < 10.0 else 0
            placement._demand("m", Seen(used={"n1": busy}), [], [], look * every)
        found.append(placement.known["m"].busy.value)
    assert found[1] == pytest.approx(found[0], rel=0.25) and found[0] > 1.0
