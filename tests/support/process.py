"""Processes that tests start: ready by a condition with a deadline, ended by pid, output in a file."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Self

import httpx

from corral.stack import ports


class NotReady(AssertionError):
    """A condition did not come true in time."""


_given: deque[int] = deque(maxlen=500)
_PORTS, _EACH = range(12_000, 20_000), 1000
"""Below those of a stack's own choice, so that no part of one takes a port that a test has and does not use yet."""


@cache
def _own_ports() -> tuple[range, socket.socket | None]:
    """The ports that this process of tests chooses from, and what keeps them from others for as long as it runs.

    Processes beside each other would take each other's: ports that were asked for and are not listened on yet, those of
    what is stopped and comes back, those at which nobody is to listen. What is bound here is a name of the kernel's.
    """
    for first in range(_PORTS.start, _PORTS.stop, _EACH):
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            held.bind(f"\0corral-test-ports-{first}")
        except OSError:
            held.close()
        else:
            atexit.register(held.close)
            return range(first, first + _EACH), held
    return _PORTS, None  # so many at once are no run of the tests: the last ones share


def free_port() -> int:
    """A loopback port nobody listens on, outside the range of outgoing connections, and no other process of tests gets;
    not one of the last 500."""
    # Ports are asked for before anybody listens: chosen at random, two of one test were the same now and then.
    own, _ = _own_ports()
    while (port := random.choice(own)) in _given or not ports.is_free(port):
        pass
    _given.append(port)
    return port


def until(condition: Callable[[], object], what: str, seconds: float = 60.0, every: float = 0.05) -> None:
    """Wait for ``condition`` to be true. NotReady with ``what`` and the last exception after ``seconds``.

    Nobody who listens yet, or answers in time, is no error but a reason to ask again.
    """
    deadline = time.monotonic() + seconds
    while True:
        problem: Exception | None = None
        # A look that began in time counts: a machine that halts may have spent all of the time on one.
        late = time.monotonic() > deadline
        try:
            if condition():
                return
        except (OSError, httpx.TransportError) as error:
            problem = error
        if late:
            raise NotReady(f"not within {seconds:g} s: {what}" + (f" ({problem})" if problem else ""))
        time.sleep(every)


@contextmanager
def heeded(seconds: int) -> Iterator[None]:
    """A block whose event loop heeds nobody any more, not even a time-out, fails after so many seconds."""

    def stands_still(*_: object) -> None:
        raise AssertionError("nothing else runs any more")

    before = signal.signal(signal.SIGALRM, stands_still)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_all(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """The files among them, and what they hold: one that goes while it is looked for is not there."""
    for path in paths:
        data = None
        with suppress(FileNotFoundError, ProcessLookupError):
            data = path.read_bytes() if path.is_file() else None
        if data is not None:
            yield path, data


class Process:
    """A program in the background, which ends with the test run even if that is killed."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        cpu: int | None = None,
    ) -> None:
        """Start it. ``env`` is added to this process's; ``cpu`` is the one core it may use."""
        command = [str(part) for part in argv]
        if cpu is not None:
            command = ["taskset", "-c", str(cpu), *command]
        if guard := shutil.which("setpriv"):
            command = [guard, "--pdeathsig", "TERM", *command]
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def wait_until(self, ready: Callable[[], object], seconds: float = 60.0) -> Self:
        """Wait until ``ready`` is true; NotReady with the end of the log if it is not, or the program has ended."""

        def check() -> object:
            if (status := self._popen.poll()) is not None:
                raise NotReady(f"{self._popen.args} ended with status {status}:\n{self.tail()}")
            return ready()

        try:
            until(check, f"{self._popen.args} is ready", seconds)
            # It may have been another program that answered on a port this one could not have.
            check()
        except NotReady as error:
            self.end()
            raise NotReady(f"{error}\n{self.tail()}") from None
        return self

    def comes_first(self) -> None:
        """Have it compute before others, where this user may have that."""
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, self.pid, -10)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def tail(self, characters: int = 3000) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-characters:]

    def end(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send it a signal and wait; it is killed if it stays. Its status."""
        if self._popen.poll() is None:
            self._popen.send_signal(number)
            try:
                self._popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        return self._popen.wait()
