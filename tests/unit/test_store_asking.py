"""The client by which control and gateways ask each other, nodes and what else there is."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

import corral
from corral.store.asking import http_client


async def _ask() -> None:
    async with http_client(1.0) as client:
        await client.get("http://127.0.0.1:9/")


def _fails(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise AttributeError(said)

    monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", connect)
    monkeypatch.setattr("httpcore._backends.auto.AutoBackend.connect_tcp", connect)


def test_a_connection_that_ends_as_it_is_made_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What anyio raises where the other is killed in that moment."""
    _fails(monkeypatch, "'NoneType' object has no attribute 'getpeername'")
    with pytest.raises(httpx.ConnectError, match="as it was made"):
        asyncio.run(_ask())


def test_a_fault_of_ours_is_not_called_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    _fails(monkeypatch, "of ours")
    with pytest.raises(AttributeError, match="of ours"):
        asyncio.run(_ask())


def test_nothing_of_the_environment_changes_where_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def mounted() -> object:
        async with http_client() as client:
            return client._transport_for_url(httpx.URL("http://control/")) is client._transport

    assert asyncio.run(mounted())


def test_every_client_is_made_there() -> None:
    root = Path(corral.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"\bhttpx\.Async(Client|HTTPTransport)\(", path.read_text())
    }
    # A runner is asked through its own socket, which has no peer's name.
    assert found == {"store/asking.py", "node/llama.py"}
