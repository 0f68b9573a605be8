"""What control adds up of the gateways' records: by key, and what they tell of nodes."""

from __future__ import annotations

from typing import Any

import pytest

from corral.control.prober import Member
from corral.control.usage import Usage
from corral.fleet.dispatch import Speeds
from corral.store.ingest import Taken


class Tenants:
    def tenant(self, key: str) -> str | None:
        return "t" if key == "known" else None


class Members:
    def __init__(self, *members: Member) -> None:
        self.members = {member.name: member for member in members}
        self.speeds = Speeds()


def row(**fields: Any) -> dict[str, Any]:
    known = {"key": "known", "outcome": "ok", "node": "a", "model": "m", "prompt_tokens": 7, "tokens": 21}
    return {**known, "ttft_ms": 100.0, "ms": 1100.0, "ts": 1.0, "queue_ms": 1.0, "attempts": 1, **fields}


def test_usage_of_known_keys_alone() -> None:
    usage, member = Usage(), Member("a", "http://a:1")
    fleet = Members(member)
    member.measured.held(["m:latest"])
    rows = [row(), row(outcome="limited", tokens=0, prompt_tokens=None, node=""), row(key="invented"), row(key=None)]
    usage.ingested(Taken(0, [row()], rows), Tenants(), fleet)  # type: ignore[arg-type]
    assert dict(usage.records) == {"admit": 1, "settle": 4}
    assert dict(usage.requests) == {("known", "t"): 2} and dict(usage.limited) == {("known", "t"): 1}
    assert usage.tokens["known", "t", "generated"] == 21 and usage.tokens["known", "t", "prompt"] == 7
    assert member.measured.rates == {"m:latest": pytest.approx(20.0)}
    assert fleet.speeds.of("a", "m:latest") == pytest.approx(20.0)


@pytest.mark.parametrize(
    "fields",
    [{"tokens": 7}, {"ttft_ms": None}, {"ms": 100.0}, {"outcome": "client_gone"}, {"node": "b"}, {"model": "x"}],
)
def test_what_tells_no_rate(fields: dict[str, Any]) -> None:
    usage, member = Usage(), Member("a", "http://a:1")
    member.measured.held(["m:latest"])
    usage.ingested(Taken(0, [], [row(**fields)]), Tenants(), Members(member))  # type: ignore[arg-type]
    assert member.measured.rates == {}


@pytest.mark.parametrize(("queue_ms", "loads"), [(100.0, [0.9]), (1500.0, [])])
def test_waits_of_batches_make_no_load_shorter(queue_ms: float, loads: list[float]) -> None:
    """Their sum may be longer than it took to the first token: then nobody knows when the first batch was sent."""
    usage, member = Usage(), Member("a", "http://a:1")
    member.measured.asked = True
    member.measured.resident({"m:latest"}, 1.0)
    member.measured.residents["m:latest"].appeared = 12.0  # seen a little later
    told = row(ts=10.0, queue_ms=queue_ms, ttft_ms=1000.0, ms=3000.0, tokens=0)
    usage.ingested(Taken(0, [], [told]), Tenants(), Members(member))  # type: ignore[arg-type]
    assert list(member.measured.load_seconds.values()) == [pytest.approx(load) for load in loads]


@pytest.mark.parametrize(("ttft_ms", "told"), [(100.0, True), (1070.0, False)])
def test_an_answer_that_was_held_back_tells_no_pace(ttft_ms: float, told: bool) -> None:
    """As Ollama holds back what may become the call of a tool: all of it comes with the first token."""
    usage, member = Usage(), Member("a", "http://a:1")
    member.measured.held(["m:latest"])
    member.measured.holds([{"name": "m:latest", "size": 10, "size_vram": 10, "digest": "d"}])
    pace = member.measured.paces["m:latest"]
    usage.ingested(Taken(0, [], [row(ttft_ms=ttft_ms)]), Tenants(), Members(member))  # type: ignore[arg-type]
    assert bool(pace._seen) == told
