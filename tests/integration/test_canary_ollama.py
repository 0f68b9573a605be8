"""The canary before a real Ollama: it gets its token, loads nothing, and no model stays longer for it."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.servers import MODEL, ollama

from corral.config.settings import CanarySettings
from corral.control.canary import Canary
from corral.control.prober import Fleet, Member

KEPT = 600.0

pytestmark = pytest.mark.ollama


def ps(url: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = httpx.get(url + "/api/ps", timeout=60).json()["models"]
    return listed


def runners(log: Path) -> int:
    """How often Ollama has started a runner, by its log."""
    return log.read_text(errors="replace").count("starting runner")


async def canaries(url: str, count: int) -> Member:
    """Probe a node and send canaries until so many have got their token."""
    fleet, member = Fleet(), Member("a", url)
    answered: set[float | None] = {None}
    enough = asyncio.Event()

    async def nobody(name: str) -> int | None:
        answered.add(member.measured.canary_success)
        if len(answered) > count:
            enough.set()
        return None

    await fleet.start([member])
    task = asyncio.create_task(Canary(fleet, CanarySettings(interval=0.2, timeout=30.0), {}, nobody).run())
    try:
        async with asyncio.timeout(240):
            await enough.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await fleet.close()
    return member


def test_a_canary_changes_nothing(tmp_path: Path) -> None:
    with ollama(tmp_path) as server:
        body = {"model": MODEL, "prompt": "a", "keep_alive": f"{KEPT:g}s", "options": {"num_predict": 1}}
        httpx.post(server.url + "/api/generate", json=body, timeout=120).raise_for_status()
        ends = time.time() + KEPT
        log = tmp_path / "ollama.log"
        before = runners(log)
        assert before > 0, "the log says otherwise what a load is"
        member = asyncio.run(canaries(server.url, 3))
        assert member.measured.canary_ok is True
        assert member.measured.canary_duration is not None and member.measured.canary_duration < 30
        assert runners(log) == before
        (entry,) = ps(server.url)
        # Each canary moves the end by its own duration at most.
        moved = datetime.fromisoformat(entry["expires_at"]).timestamp() - ends
        assert abs(moved) < KEPT / 10, f"the model's end has moved by {moved:.1f} s"
