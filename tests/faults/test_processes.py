"""A killed process of the stack is back within three seconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.process import until
from support.servers import answers
from support.up import Up, pids

from corral.stack import status


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    started = Up(tmp_path_factory.mktemp("stack") / "state")
    try:
        started.ready()
        yield started
    finally:
        started.stop()


@pytest.mark.parametrize("name", ["valkey", "control", "gateway-1", "haproxy", "node-1"])
def test_a_killed_process_is_back_within_three_seconds(
    up: Up, name: str, matrix: Callable[[str, str, str], None]
) -> None:
    before = pids(up)[name]
    stack = up.state.stack() or {}
    urls = {
        "control": stack["control"]["url"] + "/health",
        "gateway-1": stack["gateways"][0]["url"] + "/health",
        "haproxy": up.url + "/health",
        "node-1": stack["nodes"][0]["url"] + "/api/version",
    }

    def back() -> bool:
        return status.valkey_ok(stack["valkey"]["url"]) if name == "valkey" else answers(urls[name])

    os.kill(before, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: not Path(f"/proc/{before}").exists() and back(), f"{name} is back", 10)
    took = time.monotonic() - killed
    matrix(f"{name} killed (-9)", "back <= 3 s", f"{took:.1f} s")
    assert took < 3.0
    until(lambda: pids(up)[name] not in (None, before), "the supervisor knows the new process", 30)
