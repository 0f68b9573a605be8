"""A server that takes no writes is as good as none: it is left, in words, and used again once it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

import pytest
from support.servers import STORES, Server, valkey

from corral.store import leases
from corral.store.valkey import Valkey, encode

WAYS = {
    "a replica": ((b"REPLICAOF", b"127.0.0.1", b"1"), (b"REPLICAOF", b"NO", b"ONE"), "READONLY"),
    "full": ((b"CONFIG", b"SET", b"maxmemory", b"1"), (b"CONFIG", b"SET", b"maxmemory", b"0"), "OOM"),
}


@pytest.fixture(scope="module", params=STORES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey(tmp_path_factory.mktemp(request.param), program=request.param) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", WAYS)
def test_a_server_that_takes_no_writes_is_not_used(server: Server, how: str, caplog: pytest.LogCaptureFixture) -> None:
    begins, ends, word = WAYS[how]

    async def work() -> None:
        store, listener = Valkey(server.url, leases.SCRIPTS, 5.0, b"probe"), Valkey(server.url, timeout=5.0)
        tasks = [asyncio.create_task(one.run()) for one in (store, listener)]
        try:
            await until(lambda: store.connected and listener.connected)
            assert await listener.request(*begins) == b"OK"
            store.reset()
            await until(lambda: bool(caplog.messages))
            # Tried again and again, each time a while later.
            for _ in range(3):
                tried = store.due
                await until(lambda tried=tried: store.due > tried)  # type: ignore[misc]
            assert not store.connected and store.connections == 1
            (said,) = caplog.messages
            assert "is not used: it says" in said and word in said
            listener.reset()
            await until(lambda: listener.connected and listener.connections == 2)
            assert await listener.request(*ends) == b"OK"
            await until(lambda: store.connected)
            assert len(caplog.messages) == 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with caplog.at_level(logging.WARNING):
        try:
            asyncio.run(work())
        finally:
            asyncio.run(_said(server, ends))


async def _said(server: Server, command: tuple[bytes, ...]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2].partition("/")[0]))
    writer.write(encode(*command))
    with contextlib.suppress(ConnectionError):
        await reader.readline()
    writer.close()
