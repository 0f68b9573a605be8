"""What a gateway tells of what it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from corral.gateway.report import MOST, Report


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """Of a gateway with many older requests of one tenant, and two of another."""
    monkeypatch.setattr(Report, "_entry", lambda self, exchange, now: exchange.record_id)

    def one(name: str, tenant: str, arrived: float) -> SimpleNamespace:
        return SimpleNamespace(record_id=name, request_id="same", tenant=tenant, arrived=arrived)

    gateway: Any = SimpleNamespace(
        running=[one(f"r{at}", "red", at) for at in range(MOST + 5)]
        + [one(f"b{at}", "blue", 9e9 - at) for at in (1, 2)]
    )
    return Report(gateway)


def test_the_oldest_are_listed_and_all_are_counted(report: Report) -> None:
    told = report.answer({"what": "list", "id": ""})
    assert told == {"requests": [f"r{at}" for at in range(MOST)], "total": MOST + 7}


def test_of_a_tenant_its_own_are_found_whatever_others_do(report: Report) -> None:
    assert report.answer({"what": "list", "tenant": "blue"}) == {"requests": ["b2", "b1"], "total": 2}
    assert report.answer({"what": "find", "id": "same", "tenant": "blue"})["total"] == 2
    assert report.answer({"what": "find", "id": "r1", "tenant": "blue"})["total"] == 0
    assert report.answer({"what": "find", "id": "r1", "tenant": None})["requests"] == ["r1"]
