"""How long control listens to a node."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import httpx
import pytest

from corral.control.ollama import NodeFailed, Ollama
from corral.store import answers


class Dripping:
    """Sends the head of an answer, then a byte of it now and then, until the other side has enough."""

    def __init__(self) -> None:
        self.serving: set[asyncio.Task[None] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.add(asyncio.current_task())
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not reader.at_eof():
                writer.write(b" ")
                await writer.drain()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.05)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def test_a_node_that_sends_a_byte_now_and_then_does_not_hold_what_waits_for_it() -> None:
    async def ask() -> None:
        node = Dripping()
        server = await asyncio.start_server(node.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, httpx.AsyncClient(trust_env=False) as client:
            async with asyncio.timeout(30):
                with pytest.raises(httpx.ReadTimeout, match="not whole"):
                    await answers.fetch(client, "GET", url + "/api/ps", timeout=0.5)
                with pytest.raises(NodeFailed) as raised:
                    await Ollama(client, url)._content("GET", "/api/ps", timeout=0.5)
                assert raised.value.gone
                with pytest.raises(TimeoutError):  # a caller's own deadline stays one
                    async with asyncio.timeout(0.2):
                        await answers.fetch(client, "GET", url + "/api/ps", timeout=20)
            await asyncio.gather(*filter(None, node.serving))

    asyncio.run(ask())


@pytest.mark.parametrize("name", ["m|node-9", "a b", "a\x00b", ""])
def test_a_name_that_would_be_read_as_something_else_where_slots_are_counted_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        answers.models(json.dumps({"models": [{"name": "m:latest"}, {"name": name}]}).encode())
