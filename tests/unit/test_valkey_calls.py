"""Calls of requests that come together are one write to the store, and one read of its."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from support.limits import Gateway, run, unused
from support.servers import STORES, Server, valkey

CALLS = 30


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey(tmp_path_factory.mktemp(request.param), program=request.param) as server:
        yield server


def test_both_stores_are_there_in_the_versions_that_are_promised(request: pytest.FixtureRequest, store: Server) -> None:
    """What a machine has of either may be another one: then what passes says nothing of these."""

    async def work(made: list[Gateway]) -> None:
        told = (await made[0].store.request(b"INFO", b"server")).decode().splitlines()
        assert [line for line in told if line.startswith(STORES[request.node.callspec.params["store"]])], told

    run(store, 1, work)


async def reads(gateway: Gateway) -> int:
    """How often the store has read of any connection, this question included."""
    told = (await gateway.store.request(b"INFO", b"stats")).decode()
    found = re.search(r"total_reads_processed:(\d+)", told)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("limits", [{"rpm": 1000, "concurrency": 1000}, {"rpm": 1000, "tpm": 10**6}])
def test_calls_of_one_turn_are_one_write(store: Server, limits: dict[str, int]) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), **limits)

        async def took(together: bool, prefix: str) -> int:
            before = await reads(gateway)
            names = [f"{prefix}{number}" for number in range(CALLS)]
            if together:
                await asyncio.gather(*(gateway.ask(key, name, 1) for name in names))
            else:
                for name in names:
                    await gateway.ask(key, name, 1)
            return await reads(gateway) - before - 1

        # What keeps a gateway's leases asks now and then in between: the least of a few is what the calls took.
        assert min([await took(True, f"a{number}-") for number in range(5)]) == 1
        assert min([await took(False, f"b{number}-") for number in range(5)]) == CALLS

    run(store, 1, work)
