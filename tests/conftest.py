"""Fixtures that every group of tests may use. Servers are started once a run and ended with it."""

from __future__ import annotations

import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from support import process, servers, tampers
from support.postgres import Postgres
from support.postgres import postgres as run_postgres
from support.stack import Stack
from support.stack import stack as run_stack

from corral.config.values import database_url as database_address
from corral.stack import binaries

# A run in the background of a script ignores SIGINT, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's: one that halts for a fifth of a second is no fault of what is tested.
settings.register_profile("corral", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")

_made_context = httpx._transports.default.create_ssl_context


@cache
def _default_context(trust_env: bool) -> ssl.SSLContext:
    return _made_context(trust_env=trust_env)


def _context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
    """Read once what is trusted by default: for each `httpx.get`, of HTTP as well, it takes 50 ms of a processor."""
    if verify is True and cert is None:
        return _default_context(trust_env)
    return _made_context(verify=verify, cert=cert, trust_env=trust_env)


httpx._transports.default.create_ssl_context = _context

# Who asks without a time-out of its own would give up after httpx's five seconds, which a busy machine may take. Here
# these are only tests: what is tested states its own (`corral.store.asking`).
PATIENCE = 30.0
httpx._config.DEFAULT_TIMEOUT_CONFIG.__init__(PATIENCE)  # type: ignore[misc]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tamper table, where a run had it."""
    tampers.write_table(terminalreporter)


@pytest.fixture
def free_port() -> int:
    """A port nobody listens on."""
    return process.free_port()


@pytest.fixture(scope="session")
def haproxy() -> str:
    """HAProxy's program."""
    return binaries.haproxy()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A Valkey for the whole run; a test that stops it starts its own with servers.valkey."""
    with servers.valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A real Ollama 0.17.4 with smollm2:135m."""
    with servers.ollama(tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture(scope="session")
def embedded_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """The embedded node over llama.cpp with smollm2:135m."""
    with servers.embedded_node(tmp_path_factory.mktemp("node")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for the whole run; a test that stops it starts its own."""
    with run_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """`store.database` of an empty database: the test runs on each of the two kinds."""
    if request.param == "sqlite":
        return "sqlite:///corral.db"
    server: Postgres = request.getfixturevalue("postgres")
    return database_address(server.database())


StartStack = Callable[..., Stack]


@pytest.fixture(scope="session")
def start_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartStack]:
    """Start a stack with the arguments of `corral up`; it is stopped at the end of the run."""
    with ExitStack() as stacks:

        def start(*arguments: str, state: Path | None = None) -> Stack:
            return stacks.enter_context(run_stack(state or tmp_path_factory.mktemp("state"), *arguments))

        yield start


@pytest.fixture(scope="session")
def stack(start_stack: StartStack) -> Stack:
    """A stack with two embedded nodes."""
    return start_stack("--nodes", "2", "--node-backend", "llama")
