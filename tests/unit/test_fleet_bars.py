"""benchmarks/fleet: what the scheduler makes of Azure's trace stays within its bars, all of it (35 s of CPU)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from fleet import CASES, Case, compare  # noqa: E402

BARRED = [case for case in CASES if case.ratio or case.seconds]


def test_the_bars_are_those_that_are_stated() -> None:
    assert [(case.name, case.ratio, case.seconds) for case in BARRED] == [
        ("azure 35%, room for 2 of 6", 1.5, 0.0),
        ("azure 50%, room for 2 of 6", 2.5, 0.0),
        ("azure 20%, room for 1 of 6", 0.0, 18.0),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", BARRED, ids=lambda case: case.name)
def test_the_time_to_the_first_token_stays_within_its_bar(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    runs, held = compare(case, seed=0, others=False)
    assert [name for name, _ in runs] == ["room for every model", "Corral"]
    asked = len(runs[0][1].first)
    assert asked > 19_000 and all(len(outcome.first) == asked for _, outcome in runs), "everybody is served"
    assert held, capsys.readouterr().out
