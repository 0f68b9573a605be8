"""Links between Corral and a node that a test may break: a network namespace with packet filters, or a slow relay."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.fleet import SimulatedNode
from support.process import Process, free_port
from support.servers import answers, python_env

_numbers = itertools.count(os.getpid() % 60 * 4)


class Namespace:
    """A network of its own behind one link; ``address`` is that of its end. Needs root."""

    def __init__(self) -> None:
        number = next(_numbers) % 250
        self.name, self._link = f"corral-{os.getpid()}-{number}", f"crl{os.getpid() % 10000}n{number}"
        self.address = f"10.231.{number}.2"
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "addr", "add", f"10.231.{number}.1/30", "dev", self._link)
        _run("ip", "link", "set", self._link, "up")
        self.inside("ip", "addr", "add", f"{self.address}/30", "dev", "eth0")
        self.inside("ip", "link", "set", "eth0", "up")
        self.inside("ip", "link", "set", "lo", "up")

    def inside(self, *command: str) -> None:
        """Run a command in it."""
        _run("ip", "netns", "exec", self.name, *command)

    def drop(self) -> None:
        """From now on packets vanish, both ways."""
        for chain in ("INPUT", "OUTPUT"):
            self.inside("iptables", "-A", chain, "-p", "tcp", "-j", "DROP")

    def reset(self) -> None:
        """From now on every connection is answered with a reset."""
        self.inside("iptables", "-A", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def drop_asked(self, path: str, *ports: int) -> None:
        """From now on requests for a path of these ports vanish; no other does."""
        for port in ports:
            match = ("-m", "string", "--string", f"GET {path} ", "--algo", "bm")
            self.inside("iptables", "-A", "INPUT", "-p", "tcp", "--dport", str(port), *match, "-j", "DROP")

    def mend(self) -> None:
        """The link is as it was."""
        self.inside("iptables", "-F")

    def close(self) -> None:
        """Have it be gone; what runs in it has ended."""
        _run("ip", "netns", "del", self.name)


class RemoteNode(SimulatedNode):
    """A simulated node in a namespace."""

    def __init__(self, name: str, folder: Path, namespace: Namespace) -> None:
        self.namespace = namespace
        super().__init__(name, folder)

    def start(self) -> None:
        self.url = f"http://{self.namespace.address}:{self.port}"
        self.process = Process(
            ["ip", "netns", "exec", self.namespace.name, *self.command(self.namespace.address)],
            self._folder / f"{self.name}.log",
            python_env(),
        )
        self.process.wait_until(lambda: answers(self.url + "/api/version"))


class SlowNode(SimulatedNode):
    """A simulated node behind a relay that delays each piece, and one in twenty by a retransmission more.

    That is what a link with a delay of 300 ms and a loss of 5% is to TCP; not every kernel can have one (netem).
    """

    delay, loss, retransmission = 0.3, 0.05, 0.6

    def __init__(self, name: str, folder: Path) -> None:
        self.near = free_port()
        super().__init__(name, folder)
        self._direct, self.url = self.url, f"http://127.0.0.1:{self.near}"
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._relay(ready)), daemon=True).start()
        assert ready.wait(30)

    async def _relay(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._join, "127.0.0.1", self.near)
        ready.set()
        async with server:
            await server.serve_forever()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def send() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                writer.write(data)

        sender = asyncio.create_task(send())
        last = 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(1400):
                lost = self.retransmission if random.random() < self.loss else 0.0
                last = max(last, loop.time() + self.delay + lost)
                queue.put_nowait((last, data))
        queue.put_nowait((max(last, loop.time()), b""))
        await sender
        with contextlib.suppress(OSError):
            writer.close()


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace, gone with the block."""
    made = Namespace()
    try:
        yield made
    finally:
        made.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
