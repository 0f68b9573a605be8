"""A control that runs, and the node that it knows; a gateway's leader, and callers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.control import FakeNode, Running
from support.gateway import Gateway
from support.held import leading
from support.leader import Leader


@pytest.fixture
def node() -> Iterator[FakeNode]:
    made = FakeNode()
    yield made
    made.close()


@pytest.fixture
def control(tmp_path: Path, node: FakeNode, database_url: str) -> Iterator[Running]:
    made = Running(tmp_path / "state", nodes=[{"url": node.url}], store={"database": database_url})
    yield made
    made.close()


@pytest.fixture
def leader(gw: Gateway) -> Leader:
    """Who says what stands where, to the gateway of a file's own `gw`."""
    return leading(gw)


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool
