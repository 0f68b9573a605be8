"""What one turn of the shipper sends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from corral.gateway.shipper import Shipper
from corral.store.spool import SpoolWriter


def test_what_comes_while_it_ships_waits_for_the_next_time(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    posted: list[int] = []

    def control(request: httpx.Request) -> httpx.Response:
        posted.append(len(request.content))
        assert len(posted) < 10, "it does not end while records come"
        writer.append(b'{"n":2}')
        writer.flush()
        return httpx.Response(200, json={"offset": int(request.url.params["offset"]) + len(request.content)})

    async def ship() -> int:
        async with httpx.AsyncClient(transport=httpx.MockTransport(control)) as client:
            return await Shipper(writer, tmp_path, "http://control", "token", "g").ship_all(client)

    writer.append(b'{"n":1}')
    writer.flush()
    assert (asyncio.run(ship()), posted) == (15, [15])
    assert (asyncio.run(ship()), posted) == (30, [15, 30]), "the second record, once more the first"
    writer.close()
