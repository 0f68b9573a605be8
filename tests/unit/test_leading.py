"""Who leads among control processes."""

from __future__ import annotations

from typing import Any

import pytest

from corral.control.leading import LEISURE, QUICK, TICK, Leading, pause
from corral.control.placement import Placement
from corral.store.demand import Seen


def test_no_leader_is_missing_where_none_is_wanted() -> None:
    nothing: Any = None
    leading = Leading(nothing, nothing, nothing, nothing)
    assert leading.missing
    leading.leads = True
    assert not leading.missing
    leading.leads = leading.wanted = False
    assert not leading.missing


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
            placement._demand("m", Seen(used={"n1": busy}), look * every)
        found.append(placement.known["m"].busy.value)
    assert found[1] == pytest.approx(found[0], rel=0.25) and found[0] > 1.0
