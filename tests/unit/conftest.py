"""What several unit tests look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.results import result
from support.servers import STORES, Server, valkey

from corral.loadtest.result import Result


@pytest.fixture(scope="session")
def made() -> Result:
    """A load test's result."""
    return result()


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real Valkey and a real Redis."""
    with valkey(tmp_path_factory.mktemp(request.param), program=request.param) as server:
        yield server
