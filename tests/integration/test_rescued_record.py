"""Requests beside damage in a spool: settled where their gateway was killed, and where it lives once they are over."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.json import encode
from support.control import Running, until

from corral.control import ledger
from corral.gateway.shipper import Shipper
from corral.store import recovery
from corral.store.spool import SpoolWriter, encode_frame, put_aside, segments


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "GRACE", 0.0)
    monkeypatch.setattr(ledger, "ROUND", 0.2)


def admit(number: int) -> dict[str, Any]:
    return {"t": "admit", "id": f"e{number}", "ts": time.time(), "api": "native", "model": "m:latest"}


def settle(number: int) -> dict[str, Any]:
    return {**admit(number), "t": "settle", "outcome": "ok", "tokens": number}


def begin() -> dict[str, Any]:
    return {"t": "begin", "gw": "gateway-1", "ts": time.time()}


def wrong_byte(frame: bytes) -> bytes:
    return frame[:-3] + b"?" + frame[-2:]


def wrong_length(frame: bytes) -> bytes:
    return (1 << 19).to_bytes(4, "little") + frame[4:]


BAD = [wrong_byte, wrong_length]


def outcomes(control: Running) -> dict[str, str | None]:
    rows = control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]
    return {row["id"]: row["outcome"] for row in rows}


def ship(control: Running, writer: SpoolWriter, folder: Path) -> None:
    """Ship a spool to its end, as its gateway does."""
    token = control.internal.headers["authorization"].removeprefix("Bearer ")

    async def all_of_it() -> None:
        shipper = Shipper(writer, folder, control.url, token, folder.name)
        async with httpx.AsyncClient(trust_env=False) as client:
            await shipper.ship_all(client)
            await shipper.ship_all(client)
        assert shipper.backlog() == 0

    asyncio.run(all_of_it())


def says(control: Running, shipped: float) -> None:
    """The gateway says that all it wrote until then is there."""
    headers = {"X-Corral-Gateway": "gateway-1", "X-Corral-As-Of": f"{shipped:.3f}"}
    control.internal.get("/internal/snapshot", headers=headers).raise_for_status()


@pytest.mark.parametrize("damage", BAD)
def test_what_an_earlier_life_left_behind_damage_is_settled(control: Running, tmp_path: Path, damage: Any) -> None:
    folder = tmp_path / "spool/gateway-1"
    killed = SpoolWriter(folder)
    left = [encode_frame(one) for one in (begin(), admit(1), settle(99), admit(2), admit(3), settle(3), admit(4))]
    left[2] = damage(left[2])
    killed.segment.write_bytes(b"".join(left))
    # The edge replayed the fourth.
    other = SpoolWriter(tmp_path / "spool/gateway-2")
    other.append(encode(admit(4)))
    other.flush()
    ship(control, other, tmp_path / "spool/gateway-2")
    writer = SpoolWriter(folder)
    mine = [encode_frame(one) for one in (begin(), admit(5), settle(98), admit(6))]
    mine[2] = damage(mine[2])
    writer.segment.write_bytes(b"".join(mine))
    ship(control, writer, folder)
    says(control, time.time())
    until("the dead are settled", lambda: outcomes(control)["e2"] == "interrupted")
    waiting = {"e4": None, "e5": None, "e6": None}
    assert outcomes(control) == {"e1": "interrupted", "e2": "interrupted", "e3": "ok", **waiting}
    for number, of, at in ((4, other, "gateway-2"), (5, writer, "gateway-1"), (6, writer, "gateway-1")):
        of.append(encode(settle(number)))
        of.flush()
        ship(control, of, tmp_path / "spool" / at)
    done = dict.fromkeys(["e3", "e4", "e5", "e6"], "ok")
    assert outcomes(control) == {"e1": "interrupted", "e2": "interrupted", **done}
    assert (len(segments(folder)), len(put_aside(folder))) == (1, 2)
    writer.close()
    killed.close()
    other.close()


@pytest.mark.parametrize("damage", BAD)
def test_a_request_whose_end_a_living_gateway_lost_is_settled_once(
    tmp_path: Path, database_url: str, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LATE", 0.3)
    sections = {"store": {"database": database_url}, "gateway": {"max_duration": "1s"}}
    control = Running(tmp_path / "state", **sections)
    folder = tmp_path / "spool/gateway-1"
    writer = SpoolWriter(folder)

    def used() -> list[tuple[int, int, int]]:
        rows = control.admin.get("/admin/usage", params={"by": "model"}).json()["usage"]
        return [(row["requests"], row["estimated"], row["tokens"]) for row in rows]

    try:
        frames = [encode_frame(one) for one in (begin(), admit(1), settle(1), admit(2), settle(2))]
        frames[2] = damage(frames[2])
        writer.segment.write_bytes(b"".join(frames))
        ship(control, writer, folder)
        came = time.time()
        until("a while", lambda: (says(control, came), time.time() > came + 3)[1])
        assert outcomes(control) == {"e1": None, "e2": "ok"}, "it has not said that all until then is here"
        until("it is over", lambda: (says(control, time.time()), outcomes(control)["e1"])[1])
        assert outcomes(control) == {"e1": "interrupted", "e2": "ok"}
        assert used() == [(2, 1, 2)]
        for number in (1, 3):
            for one in (admit(number), settle(number)):
                writer.append(encode(one))
        writer.flush()
        ship(control, writer, folder)
        assert outcomes(control) == {"e1": "interrupted", "e2": "ok", "e3": "ok"}
        assert used() == [(3, 1, 5)], "what comes late all the same counts no more"
    finally:
        control.close()
        writer.close()
