"""One engine and one site for all of these tests; what was killed is printed at the end."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from deploy import images
from deploy.engine import Docker, engine, other, run
from deploy.site import VERSION, Site

_said: list[str] = []


@pytest.fixture(scope="session")
def say() -> Iterator[list[str]]:
    """Lines for the end of the run's output."""
    yield _said


@pytest.fixture(scope="session")
def docker(say: list[str]) -> Iterator[Docker]:
    """An engine that has every image."""
    if os.geteuid() != 0:
        pytest.fail("these tests start a Docker engine, which needs root", pytrace=False)
    compose = run("scripts/install-compose", timeout=900).strip()
    # Sockets need a short path.
    with images.alone(), tempfile.TemporaryDirectory(prefix="corral-") as folder, ExitStack() as exits:
        if pid := other():
            pytest.fail(
                f"a Docker engine runs already (pid {pid}): these tests start their own, stop it", pytrace=False
            )
        made = exits.enter_context(engine(Path(folder), compose))
        began = time.monotonic()
        kind = images.provide(made, f"corral:{VERSION}")
        say.append(f"images: {kind}, ready in {time.monotonic() - began:.0f} s")
        yield made


@pytest.fixture(scope="session")
def empty(docker: Docker, say: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The Compose files in a folder of their own; nothing is started yet."""
    made = Site(docker, tmp_path_factory.mktemp("site"))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def site(empty: Site) -> Site:
    """The same, started."""
    empty.start()
    return empty


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _said:
        terminalreporter.section("deployment")
        for line in _said:
            terminalreporter.write_line(line)
