"""Limits that admit nobody while the store is away (`limits.on_store_failure: deny`)."""

from __future__ import annotations

import asyncio

import pytest
from support.limits import Gateway, gateways, unused
from support.servers import Server

from corral.store.budget import LIMITS, Budget

WHOSE = pytest.mark.parametrize("whose", ["key", "tenant"])


def key(gateway: Gateway, whose: str, limit: str) -> Budget:
    """One with this limit, of its own or of its tenant's."""
    if whose == "key":
        return gateway.budget(unused(), **{limit: 10})
    return gateway.budget(unused(), Budget("t:" + unused(), **{limit: 10}))  # type: ignore[arg-type]


@WHOSE
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_whose_policy_is_to_deny(store: Server, limit: str, whose: str) -> None:
    async def work() -> None:
        async with gateways(store.url, 1, denied=(limit,)) as made:
            gateway = made[0]
            denied = key(gateway, whose, limit)
            others = [key(gateway, whose, other) for other in LIMITS if other != limit]
            assert (await gateway.ask(denied, "before", 1)).refused == ""
            gateway.store.connected = False
            assert (await gateway.ask(denied, "a", 1)).refused == "store"
            assert (await gateway.ask(denied, "list", 0)).refused == "store", "whether it has tokens or not"
            assert "a" not in denied.in_flight
            for budget in others:
                assert (await gateway.ask(budget, "b", 1)).refused == ""
            gateway.store.connected = True
            assert (await gateway.ask(denied, "c", 1)).refused == ""

    asyncio.run(work())
