"""Which models control tries to continue answers of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from corral.control.measured import Residence
from corral.control.prober import Member
from corral.control.selftest import SelfTest


def test_a_runner_that_hangs_is_not_tried() -> None:
    entry = {"name": "m:latest", "digest": "sha256:" + "1" * 64}
    member = Member("n", "http://n", up=True, ps=[entry])
    residence = member.measured.residents["m:latest"] = Residence(since=0.0, fresh=False, failing=True)
    fleet: Any = SimpleNamespace(members={"n": member})
    made = SelfTest(fleet, {}, lambda name: None, lambda known: None)  # type: ignore[arg-type,return-value]
    assert made._due(0.0) == []
    residence.failing = False
    assert made._due(0.0) == [(member, entry)]
