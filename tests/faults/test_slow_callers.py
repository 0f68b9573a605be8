"""Callers that send a byte a second, that take nothing, or that send much and never end: others do not notice."""

from __future__ import annotations

import re
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import quantiles

import httpx
import pytest
from support.gateway import HEAD, LINE, Gateway, chunk, gateway
from support.late import lateness
from support.process import until

from corral.gateway.listen import BODY_DEADLINE, WRITE_DEADLINE

Matrix = Callable[[str, str, str], None]

SLOW, READERS = 1000, 200
ASKED = 300
ADDED = 0.010
"""Seconds that the 99th percentile of others may grow by, and how late their own process is woken at most."""
BAR = f"others' p99 <= {ADDED * 1e3:.0f} ms more, and how late their process is woken at most"
MEMORY = 64 << 10
"""KiB that a gateway may grow by, and HAProxy by four times that for its buffers."""
PER_READER, OF_HAPROXY = 512, 800
"""KiB: in a gateway what is written before a caller counts as slow, one read of a node's answer (uvloop's 256 KiB), and
what these take with them, 390 to 430 in all where the process is new; and in HAProxy."""


@pytest.fixture(scope="module", autouse=True)
def enough_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    # What is asked here is more than the tokens that a key may have by default.
    limits = {"default": {"tpm": None}}
    with gateway(tmp_path_factory.mktemp("slow"), limits=limits) as started:
        # All who take nothing are answered at once.
        started.slots = 2 * READERS
        started.publish()
        yield started


def memory(pid: int) -> int:
    """A process's memory, in KiB."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


def settled(gw: Gateway) -> bool:
    """Whether gateway and HAProxy use no processor."""

    def used() -> int:
        return sum(
            sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            for pid in (gw.process.pid, gw.haproxy.pid)
        )

    before = used()
    threading.Event().wait(0.3)
    return used() - before <= 1


def p99(gw: Gateway, url: str) -> tuple[float, float]:
    """Of requests by others, one after the other; each must be answered. And how late this process was woken."""
    times = []
    with httpx.Client(headers=gw.auth) as client, lateness() as late:
        for _ in range(ASKED):
            began = time.monotonic()
            assert client.post(url + "/api/chat", json=gw.chat(stream=False), timeout=10).status_code == 200
            times.append(time.monotonic() - began)
    return quantiles(times, n=100)[98], max(late)


class Drip:
    """Connections that each send a byte a second, without end, and are made again when they are closed."""

    def __init__(self, port: int, first: bytes, drip: bytes, count: int = SLOW) -> None:
        self._port, self._first, self._drip, self._count = port, first, drip, count
        self._stop = threading.Event()
        self.open: dict[socket.socket, int] = {}
        self.closed = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Drip:
        self._thread.start()
        until(lambda: len(self.open) >= self._count, f"{self._count} connections", 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self.open:
            connection.close()

    def _run(self) -> None:
        poll = selectors.DefaultSelector()
        while not self._stop.is_set():
            second = time.monotonic() + 1
            while len(self.open) < self._count:
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=5)
                connection.sendall(self._first)
                self.open[connection] = 0
                poll.register(connection, selectors.EVENT_READ)
            for key, _ in poll.select(0):
                self._close(poll, key.fileobj)  # type: ignore[arg-type]
            for connection, sent in list(self.open.items()):
                with suppress(OSError):
                    connection.send(self._drip[sent % len(self._drip) :][:1])
                    self.open[connection] = sent + 1
            self._stop.wait(max(0.0, second - time.monotonic()))
        poll.close()

    def _close(self, poll: selectors.BaseSelector, connection: socket.socket) -> None:
        poll.unregister(connection)
        connection.close()
        del self.open[connection]
        self.closed += 1


@contextmanager
def readers(gw: Gateway, port: int) -> Iterator[list[socket.socket]]:
    """Callers of endless answers who take nothing of them."""
    told = threading.Event()

    def endless(connection: socket.socket) -> None:
        connection.sendall(HEAD)
        piece = chunk(LINE % (b"w" * 1000)) * 30
        while not told.is_set():
            connection.sendall(piece)

    for node in gw.nodes:
        node.script = [endless] * READERS
    body = b'{"model":"m","messages":[]}'
    head = (
        f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    sockets: list[socket.socket] = []
    try:
        for _ in range(READERS):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(head.encode() + body)
            sockets.append(connection)
        until(lambda: sum(len(node.script) for node in gw.nodes) == READERS, "all are being answered", 30)
        for node in gw.nodes:
            node.script = []
        until(lambda: settled(gw), "all buffers are full", 30, every=0.5)
        yield sockets
    finally:
        told.set()
        for node in gw.nodes:
            node.script = []
        for connection in sockets:
            connection.close()


@contextmanager
def sipping(sockets: list[socket.socket]) -> Iterator[list[int]]:
    """Take a byte a second of each; how many were taken of each."""
    told, taken = threading.Event(), [0] * len(sockets)

    def sip() -> None:
        while not told.wait(1.0):
            for at, connection in enumerate(sockets):
                with suppress(OSError):
                    taken[at] += len(connection.recv(1, socket.MSG_DONTWAIT))

    thread = threading.Thread(target=sip, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        told.set()
        thread.join()


def seen(quiet: float, busy: float, late: float, before: tuple[int, int], after: tuple[int, int]) -> str:
    times = f"p99 {quiet * 1e3:.1f} -> {busy * 1e3:.1f} ms, woken {late * 1e3:.0f} ms late"
    return f"{times}, gateway and HAProxy KiB {before} -> {after}"


@pytest.mark.parametrize("what", ["head", "body"])
@pytest.mark.parametrize("through", ["edge", "gateway"])
def test_a_thousand_callers_of_a_byte_a_second(gw: Gateway, what: str, through: str, matrix: Matrix) -> None:
    url = gw.edge if through == "edge" else gw.url
    start = b"POST /api/chat HTTP/1.1\r\nHost: a\r\n"
    whole = start + f"Authorization: Bearer {gw.key}\r\nContent-Length: 100000\r\n\r\n".encode()
    first, drip = (start, b"X: y\r\n") if what == "head" else (whole, b"x")
    quiet, _ = p99(gw, url)
    before = memory(gw.process.pid), memory(gw.haproxy.pid)
    with Drip(int(url.rpartition(":")[2]), first, drip) as slow:
        busy, late = p99(gw, url)
        # The gateway waits longer for a body than for a head, and than HAProxy does for either.
        within = BODY_DEADLINE + 20 if through == "gateway" and what == "body" else 20
        until(lambda: slow.closed >= SLOW, "the first ones are sent away", within)
        after = memory(gw.process.pid), memory(gw.haproxy.pid)
    matrix(f"{SLOW} slow callers, {what}, {through}", BAR, seen(quiet, busy, late, before, after))
    assert busy <= quiet + ADDED + late
    assert after[0] - before[0] < MEMORY
    assert after[1] - before[1] < 4 * MEMORY


@pytest.mark.parametrize("through", ["edge", "gateway"])
def test_callers_that_take_nothing(gw: Gateway, through: str, matrix: Matrix) -> None:
    url = gw.edge if through == "edge" else gw.url
    quiet, _ = p99(gw, url)
    before = memory(gw.process.pid), memory(gw.haproxy.pid)
    others = gw.metric("corral_connections")
    with readers(gw, int(url.rpartition(":")[2])):
        busy, late = p99(gw, url)
        after = memory(gw.process.pid), memory(gw.haproxy.pid)
        if through == "gateway":
            # They themselves see nothing of it before they take what was sent to them.
            assert gw.metric("corral_connections") >= READERS
            until(lambda: gw.metric("corral_connections") <= others + 1, "they are left", WRITE_DEADLINE + 20)
    matrix(f"{READERS} callers take nothing, {through}", BAR, seen(quiet, busy, late, before, after))
    assert busy <= quiet + ADDED + late
    assert after[0] - before[0] < READERS * PER_READER
    assert after[1] - before[1] < READERS * OF_HAPROXY


@pytest.mark.parametrize("through", ["edge", "gateway"])
def test_slow_callers_and_slow_readers_together(gw: Gateway, through: str, matrix: Matrix) -> None:
    url = gw.edge if through == "edge" else gw.url
    port = int(url.rpartition(":")[2])
    quiet, _ = p99(gw, url)
    before = memory(gw.process.pid), memory(gw.haproxy.pid)
    with readers(gw, port) as taking, sipping(taking) as taken:
        with Drip(port, b"POST /api/chat HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"):
            busy, late = p99(gw, url)
            after = memory(gw.process.pid), memory(gw.haproxy.pid)
        until(lambda: sum(taken) >= 5 * READERS, "each of them has taken some")
    fault = f"{SLOW} slow callers and {READERS} that take a byte a second, {through}"
    matrix(fault, BAR, seen(quiet, busy, late, before, after))
    assert busy <= quiet + ADDED + late
    assert after[0] - before[0] < READERS * PER_READER + MEMORY
    assert after[1] - before[1] < READERS * OF_HAPROXY + 4 * MEMORY


@pytest.mark.parametrize("key", ["no key", "a key"])
def test_large_bodies_that_never_end(gw: Gateway, key: str, matrix: Matrix) -> None:
    """64 callers with 16 MiB each: a gigabyte, of which the gateway keeps what it may."""
    authorization = f"Authorization: Bearer {gw.key}\r\n" if key == "a key" else ""
    head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\n{authorization}Content-Length: {20 << 20}\r\n\r\n".encode()
    before = memory(gw.process.pid)
    sockets = [socket.create_connection(("127.0.0.1", gw.port), timeout=5) for _ in range(64)]
    try:
        for connection in sockets:
            with suppress(OSError):
                connection.sendall(head)
                for _ in range(16):
                    connection.sendall(bytes(1 << 20))
        answers = []
        for connection in sockets:
            connection.settimeout(0.05)
            with suppress(OSError):
                answers.append(connection.recv(12))
        grown = memory(gw.process.pid) - before
        most = MEMORY + ((256 << 10) if key == "a key" else 0)
        measured = f"{grown} KiB, {len(answers)} refused"
        matrix(f"1 GiB of bodies that never end, {key}", f"memory < {most} KiB more", measured)
        if key == "a key":
            assert grown < (256 << 10) + MEMORY
            assert b"HTTP/1.1 503" in answers
        else:
            assert grown < MEMORY
    finally:
        for connection in sockets:
            connection.close()
    until(lambda: gw.post().status_code == 200, "others are served")
