"""What control knows of gateways' spools, and the requests that it settles for them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import select
from support.control import WITHIN, Running, until

from corral.control import ledger
from corral.store import recovery
from corral.store.database import Database, resolve
from corral.store.spool import encode_frame
from corral.store.tables import spools


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "GRACE", 0.0)
    monkeypatch.setattr(ledger, "ROUND", 0.2)


def test_what_gateways_have_shipped_is_kept_for_those_that_wait_for_it(quick: None, control: Running) -> None:
    database = Database(resolve(control.settings.store.database, control.state))

    def said(ago: float = 0.0, by: str = "gateway-2", **told: str) -> Any:
        headers = {"X-Corral-Gateway": by, "X-Corral-As-Of": f"{time.time() - ago:.3f}", **told}
        control.internal.get("/internal/snapshot", headers=headers).raise_for_status()
        now = time.time()
        rows = database.read_now(lambda c: c.execute(select(spools).where(spools.c.gateway == "gateway-2")).all())
        return [(now - row.shipped, row.ended) for row in rows]

    try:
        (row,) = until("a round", lambda: said(**{"X-Corral-Backlog": "60.0"}))
        assert 60 <= row[0] < 60 + WITHIN
        assert not row[1]
        path = "/internal/spool/gateway-1/0000000000000001.seg"
        frames = [encode_frame({"t": "admit", "id": "e1", "ts": time.time(), "api": "native", "model": "m:latest"})]
        frames.append(encode_frame({"t": "begin", "gw": "gateway-1", "ts": time.time()}))
        for number, frame in enumerate(frames):
            offset = sum(map(len, frames[:number]))
            control.internal.post(path, params={"offset": offset}, content=frame).raise_for_status()
        asked = {"model": "m:latest"}
        outcome = lambda: control.admin.get("/admin/audit", params=asked).json()["audit"][0]["outcome"]  # noqa: E731
        assert outcome() is None
        until("a question that control took after 70 s", lambda: 70 <= said(70)[0][0] < 70 + WITHIN)
        assert outcome() is None
        until("all is here", lambda: said()[0][0] < 60)
        assert outcome() is None, "its gateway may have been asked once more since it began"
        said(by="gateway-1")
        until("nothing is waited for", lambda: outcome() == "interrupted")
        assert not said(**{"X-Corral-Leaving": "1", "X-Corral-Backlog": "5.0"})[0][1], "it has something left"
        assert said(**{"X-Corral-Leaving": "1"})[0][1], "at once: control may end too"
    finally:
        database.close()
