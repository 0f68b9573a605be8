"""What control tells a gateway that starts: the sums of this day and month, and who shares the limits."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from support.control import FakeNode, Running, make_key

from corral.control.spent import Spent
from corral.gateway.recall import Recall
from corral.gateway.snapshot import Snapshot
from corral.store.budget import DAY, Budget, month_of
from corral.store.database import configured
from corral.store.limits import Limits
from corral.store.spool import encode_frame

NOW = datetime(2026, 5, 14, 9, tzinfo=UTC).timestamp()
TODAY = int(NOW // DAY)
LIMITS = {"rpm": None, "tpm": None, "concurrency": None, "daily_tokens": None, "monthly_tokens": None}


def settled(number: int, key: str, ts: float, prompt: int | None, answer: int | None) -> bytes:
    record = {"t": "settle", "id": f"r{number}", "key": key, "ts": ts, "outcome": "ok"}
    return encode_frame(record | {"prompt_tokens": prompt, "tokens": answer})


def record(control: Running, *frames: bytes) -> None:
    path = "/internal/spool/gateway-1/00000001.seg"
    offset = getattr(control, "shipped", 0)
    answer = control.internal.post(path, params={"offset": offset}, content=b"".join(frames))
    assert answer.status_code == 200, answer.text
    control.shipped = answer.json()["offset"]  # type: ignore[attr-defined]


def told(control: Running, now: float) -> dict[str, Any]:
    database = configured(control.settings.store, control.state)

    async def ask() -> dict[str, Any]:
        spent = Spent(database, lambda: now)
        while not (answer := await spent.told())["complete"]:
            pass
        return answer

    try:
        return asyncio.run(ask())
    finally:
        database.close()


def test_the_sums_of_day_and_month_by_key_and_tenant(control: Running) -> None:
    red = make_key(control, name="red", tenant="a")["id"]
    blue = make_key(control, name="blue", tenant="a")["id"]
    record(
        control,
        settled(1, red, NOW, 10, 5),
        settled(1, red, NOW, 10, 5),  # the same request, told twice
        settled(2, red, TODAY * DAY, 100, 0),  # this day's first
        settled(3, red, TODAY * DAY - 0.001, 1000, None),  # yesterday's last
        settled(4, red, datetime(2026, 4, 30, 23, 59, 59, tzinfo=UTC).timestamp(), 10**6, 0),
        settled(5, blue, datetime(2026, 5, 1, tzinfo=UTC).timestamp(), None, 7),
        settled(6, "", NOW, 1, 1),
    )
    used = {red: [115, 1115], blue: [0, 7], "t:a": [115, 1122]}
    assert told(control, NOW) == {"day": TODAY, "month": month_of(NOW), "used": used, "complete": True}
    assert told(control, datetime(2026, 6, 1, tzinfo=UTC).timestamp())["used"] == {}


def test_a_gateway_that_starts_knows_what_was_used(tmp_path: Path, node: FakeNode, database_url: str) -> None:
    control = Running(tmp_path / "state", nodes=[{"url": node.url}], store={"database": database_url})
    try:
        key = make_key(control, daily_tokens=1000)["id"]
        now = datetime.now(UTC).timestamp()
        record(control, settled(1, key, now, 300, 50))
        token = control.internal.headers["authorization"].removeprefix("Bearer ")
        snapshot = Snapshot(LIMITS)
        snapshot.apply(control.snapshot().json())
        limits = Limits(None, "gateway-9")
        asyncio.run(Recall(snapshot, limits, control.url, token).first())
        budget = snapshot.keys[key].budget
        assert (budget.day_used, budget.month_used) == (350, 350)
        assert httpx.get(control.url + "/internal/spent").status_code == 401
    finally:
        control.close()


def test_what_is_recalled_never_makes_less_of_what_is_known() -> None:
    budget = Budget("k", daily_tokens=1000, day=TODAY, day_used=500, month=5, month_used=700)
    assert not budget.recall(TODAY, 400, 5, 600)
    assert (budget.day_used, budget.month_used) == (500, 700)
    assert budget.recall(TODAY, 600, 5, 600)
    assert (budget.day_used, budget.month_used) == (600, 700)
    assert budget.recall(TODAY + 1, 3, 6, 3)
    assert (budget.day, budget.day_used, budget.month, budget.month_used) == (TODAY + 1, 3, 6, 3)
    assert not budget.recall(TODAY, 900, 5, 900), "a day that is over"


def test_a_gateway_hears_which_others_share_the_limits(control: Running) -> None:
    """Also where its snapshot is the present one: it may have begun with a file of that."""
    version = control.snapshot("gateway-11").json()["version"]
    said = control.snapshot("gateway-12", since=version)
    assert said.status_code == 304
    assert {"gateway-11", "gateway-12"} <= set(said.headers["x-corral-gateways"].split(","))
    control.internal.get("/internal/snapshot", headers={"X-Corral-Gateway": "gateway-11", "X-Corral-Leaving": "1"})
    assert "gateway-11" not in control.snapshot("gateway-12").headers["x-corral-gateways"].split(",")


def test_a_gateway_hears_whether_others_have_the_store(control: Running) -> None:
    def asks(gateway: str, store: str = "") -> bool:
        told = {"X-Corral-Gateway": gateway} | ({"X-Corral-Store": store} if store else {})
        return "x-corral-store-elsewhere" in control.internal.get("/internal/snapshot", headers=told).headers

    # Others have asked as well, but said nothing of the store: they serve nobody.
    assert not asks("gateway-21", "1"), "itself is no other"
    assert asks("gateway-22", "0")
    assert not asks("gateway-23", "0"), "two of three have not"
    assert asks("gateway-22", "1") and asks("gateway-23", "0")
    asks("gateway-21"), asks("gateway-22")
    assert not asks("gateway-23", "0"), "those that end count no more"
