"""A control that runs, and the node that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.control import FakeNode, Running


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
