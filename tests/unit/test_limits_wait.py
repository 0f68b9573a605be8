"""How long a caller is told to wait for one of the requests of its key that run."""

from __future__ import annotations

import pytest
from support.limits import Gateway, run, unused
from support.servers import Server

from corral.store.budget import Budget


@pytest.mark.parametrize("kind", ["plain", "metered", "tenant"])
def test_the_wait_for_one_of_many_is_how_long_they_take_by_now(store: Server, kind: str) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        tenant = Budget("t:" + unused(), concurrency=4) if kind == "tenant" else None
        limits = {"tenant": {}, "plain": {"concurrency": 4}, "metered": {"concurrency": 4, "tpm": 10**6}}[kind]
        key = gateway.budget(unused(), tenant, **limits)

        async def told(*took: float) -> float:
            for seconds in took:
                name = unused()
                assert (await gateway.ask(key, name, 1)).refused == ""
                gateway.limits.release(key, name, 1, seconds)
            running = [unused() for _ in range(4)]
            for name in running:
                assert (await gateway.ask(key, name, 1)).refused == ""
            refused = await gateway.ask(key, unused(), 1)
            assert refused.refused.removeprefix("tenant_") == "concurrency"
            gateway.store.connected = False
            assert (await gateway.ask(key, unused(), 1)).retry_after == refused.retry_after
            gateway.store.connected = True
            for name in running:
                await gateway.settle(key, name, 1)
            return refused.retry_after

        assert await told() == 1, "nothing is known yet"
        assert await told(20.0) == 5
        assert 5 < await told(60.0) < 10, "not by the last one alone"
        assert await told(*[0.1] * 100) == 1
        assert await told(*[3000.0] * 100) == 60

    run(store, 1, work)
