"""How long a gateway that is told to end waits for its answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

import pytest

from corral.gateway import life
from corral.gateway.life import Stop

TERM, INT = signal.SIGTERM, signal.SIGINT
HOURS = 7200.0


async def waits(drain: float, before: Sequence[int], during: Sequence[int]) -> bool:
    """Whether it still waits for an answer that does not end, after signals before the drain and while it lasts."""
    stop = Stop(drain)
    for number in before:
        stop.signal(number)
    waiting = asyncio.ensure_future(stop.wait(asyncio.Event()))
    for number in during:
        await asyncio.sleep(0)
        stop.signal(number)
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    waiting.cancel()
    await asyncio.wait([waiting])
    return not done


@pytest.mark.parametrize(
    ("before", "during"),
    [([TERM], []), ([INT], []), ([TERM, INT], []), ([TERM], [INT])],
)
def test_answers_have_their_time(before: list[int], during: list[int]) -> None:
    assert asyncio.run(waits(HOURS, before, during))


@pytest.mark.parametrize(
    ("before", "during"),
    [
        ([TERM, TERM], []),
        ([TERM], [TERM]),
        ([INT, INT], []),
        ([INT], [TERM]),
        ([TERM], [INT, INT]),
        ([TERM, INT], [TERM]),
        ([TERM], [TERM, INT]),
    ],
)
def test_a_further_signal_ends_them(before: list[int], during: list[int]) -> None:
    assert not asyncio.run(waits(HOURS, before, during))


@pytest.mark.parametrize(("before", "during"), [([INT], []), ([TERM, INT], []), ([TERM], [INT])])
def test_with_the_stack_they_have_little(monkeypatch: pytest.MonkeyPatch, before: list[int], during: list[int]) -> None:
    assert life.HASTE == 25.0
    monkeypatch.setattr(life, "HASTE", 0.01)
    assert not asyncio.run(waits(HOURS, before, during))
    monkeypatch.setattr(life, "HASTE", HOURS)
    assert not asyncio.run(waits(0.01, before, during)), "never more than the drain"


def test_it_waits_for_no_longer_than_there_are_answers() -> None:
    async def run() -> None:
        stop, idle = Stop(HOURS), asyncio.Event()
        asyncio.get_running_loop().call_soon(idle.set)
        await stop.wait(idle)
        stop.signal(TERM)
        stop.signal(TERM)

    asyncio.run(run())
