"""What a simulated node says of its own work: tests hold gateways to it."""

from __future__ import annotations

import asyncio

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
