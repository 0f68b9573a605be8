"""What a simulated node says of its own work: tests hold gateways to it."""

from __future__ import annotations

import asyncio

import pytest

from corral.node import simulated
from corral.node.models import Model
from corral.node.options import Options
from corral.node.runners import Completion

QUICK = {"models": [{"name": "a:latest", "load": 0.0, "prefill": 1e6, "decode": 1e4}]}


def test_what_runs_is_counted_until_its_last_line_but_no_canary() -> None:
    backend = simulated.SimulatedBackend(simulated.load(QUICK))
    found = backend.store.find("a")
    assert isinstance(found, Model)
    runner = backend.runner(found, Options(), 4)

    def works() -> tuple[int, int, int, int]:
        of = backend.work.listing()["a:latest"]
        return of["running"], of["most"], of["tokens"], of["loads"]

    async def work() -> None:
        await runner.start()
        answers = [runner.complete(Completion("x", Options(num_predict=count))) for count in (3, 3, 1)]
        for answer in answers:
            assert not (await anext(answer)).done
        assert works() == (2, 2, 2, 1)
        async for piece in answers[0]:
            assert works()[0] == (1 if piece.done else 2), "it runs no more when its caller hears of the end"
        assert works() == (1, 2, 4, 1)
        await answers[1].aclose()  # type: ignore[attr-defined]
        await answers[2].aclose()  # type: ignore[attr-defined]
        assert works() == (0, 2, 4, 1)
        backend.work.clear()
        assert works() == (0, 0, 0, 0)

    asyncio.run(work())


def test_an_answer_that_hangs_goes_on_to_its_end_once_that_is_over() -> None:
    backend = simulated.SimulatedBackend(simulated.load(QUICK))
    found = backend.store.find("a")
    assert isinstance(found, Model)
    runner = backend.runner(found, Options(), 1)

    async def work() -> None:
        await runner.start()
        backend.faults.add({"kind": "hang"})
        met = asyncio.Event()
        hang = backend.faults.hang

        async def hangs() -> None:
            met.set()
            await hang()

        backend.faults.hang = hangs  # type: ignore[method-assign]

        async def answer() -> int:
            return len([piece async for piece in runner.complete(Completion("x", Options(num_predict=3)))])

        asked = asyncio.create_task(answer())
        await met.wait()
        await asyncio.sleep(0)
        backend.faults.clear()
        assert await asyncio.wait_for(asked, 30) == 4

    asyncio.run(work())


@pytest.mark.parametrize("stalls", [False, True])
def test_a_prefill_stalls_other_answers_where_that_is_asked_for(stalls: bool) -> None:
    model = {"name": "a:latest", "load": 0.0, "prefill": 20.0, "decode": 1e4}
    backend = simulated.SimulatedBackend(simulated.load({"models": [model], "prefill_stalls": stalls}))
    found = backend.store.find("a")
    assert isinstance(found, Model)
    runner = backend.runner(found, Options(), 4)
    # Where it stalls none, it is under way for as long as anybody looks.
    words, pieces = 10 if stalls else 4000, 0

    async def before_its_first() -> int:
        await anext(runner.complete(Completion("x " * words, Options(num_predict=2))))
        return pieces

    async def work() -> int | None:
        nonlocal pieces
        short = runner.complete(Completion("x", Options(num_predict=4)))
        await anext(short)
        long = asyncio.create_task(before_its_first())
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            async for _ in short:
                pieces += 1
        return long.result() if long.done() else None

    # The order of events, not of times: the next token of a stalled one is only due when the prompt has been read.
    assert asyncio.run(work()) == (0 if stalls else None)
    assert pieces == 4
