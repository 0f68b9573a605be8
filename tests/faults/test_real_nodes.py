"""Two real Ollama servers under load, one of them killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.load import TOLD, WHOLE, Load, after
from support.process import free_port
from support.servers import MODEL, Server, ollama
from support.stack import Stack, stack

pytestmark = pytest.mark.ollama


class Pair:
    """Two Ollama servers behind a stack; the first can be killed and started again at its port."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self._folder, self._exits = folder, exits
        self.servers: list[Server] = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            self.servers.append(self._start(name, free_port()))
        attach = [f"--attach={server.url}" for server in self.servers]
        self.stack: Stack = exits.enter_context(stack(folder / "state", *attach))

    def _start(self, name: str, port: int) -> Server:
        cpu = len(self.servers) % (os.cpu_count() or 1)
        return self._exits.enter_context(ollama(self._folder / name, port, cpu))

    def kill(self) -> None:
        """kill -9 of the first, and of the runners that it leaves."""
        pid = self.servers[0].process.pid
        # Any of its threads may have started them.
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        for victim in (pid, *map(int, children)):
            os.kill(victim, signal.SIGKILL)
        self.servers[0].process.end()

    def start(self) -> None:
        """Start the first again."""
        self.servers[0] = self._start("one", urlsplit(self.servers[0].url).port or 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as exits:
        yield Pair(tmp_path_factory.mktemp("pair"), exits)


def test_a_killed_ollama_loses_nothing_and_is_used_again(pair: Pair) -> None:
    with Load(pair.stack.url, pair.stack.key, MODEL, clients=8, tokens=[24]) as load:
        load.more(8, "node-1", seconds=60)
        pair.kill()
        killed = time.monotonic()
        load.until(lambda _: time.monotonic() > killed + 5, "the fleet has settled")
        load.more(8, "node-2", seconds=60)
        pair.start()
        load.more(4, "node-1", seconds=60)
    assert load.unlike(WHOLE, TOLD) == []
    assert [str(a) for a in load.answers if a.fate == TOLD and not a.text] == []
    assert load.fates[TOLD] <= 8
    assert [str(a) for a in load.answers if a.began > killed + 5 and a.fate != WHOLE] == []
    assert {a.node for a in after(load.answers, killed)} == {"node-1", "node-2"}
