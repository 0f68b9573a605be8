"""What several unit tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Runner
from support.results import result
from support.servers import STORES, Server, valkey

from corral.loadtest.result import Result
from corral.store.database import Database, resolve


@pytest.fixture(scope="session")
def made() -> Result:
    """A load test's result."""
    return result()


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real Valkey and a real Redis."""
    with valkey(tmp_path_factory.mktemp(request.param), program=request.param) as server:
        yield server


@pytest.fixture
def database(tmp_path: Path, database_url: str) -> Iterator[Database]:
    """An empty one of this schema, of either kind."""
    made = Database(resolve(database_url, tmp_path))
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Commands without a stack, and without what the operator of this machine has set."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "CORRAL_URL",
        "CORRAL_ADMIN_KEY",
        "CORRAL_CONFIG",
        "CORRAL_STATE",
        "CORRAL_KEY",
        "OLLAMA_URL",
        "REDIS_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    return Runner(tmp_path / "state")
