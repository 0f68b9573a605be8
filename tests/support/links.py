"""Links between Corral and a node that a test may break: network namespaces, with packet filters or a slow link."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from support.fleet import SimulatedNode
from support.process import Process
from support.servers import answers, python_env

TUN = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
"""linux/if_tun.h"""

_numbers = itertools.count(os.getpid() % 60 * 4)


class Namespace:
    """A network of its own behind one link; ``address`` is that of its end. Needs root."""

    def __init__(self) -> None:
        number = next(_numbers) % 250
        self.name, self._link = f"corral-{os.getpid()}-{number}", f"crl{os.getpid() % 10000}n{number}"
        self.address = f"10.231.{number}.2"
        _run("ip", "netns", "add", self.name)
        self._connect()
        _run("ip", "addr", "add", f"10.231.{number}.1/30", "dev", self._link)
        _run("ip", "link", "set", self._link, "up")
        self.inside("ip", "addr", "add", f"{self.address}/30", "dev", "eth0")
        self.inside("ip", "link", "set", "eth0", "up")
        self.inside("ip", "link", "set", "lo", "up")

    def _connect(self) -> None:
        """Make the two ends of the link: `_link` here, eth0 in it."""
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)

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


class SlowNamespace(Namespace):
    """A network whose link may be slow and lose packets, as the kernel's netem makes one where that is built in: here a
    thread carries them between two TUN devices.

    While it is slow, each packet takes ``delay`` seconds, and of those that the far end ``sent`` a share of ``loss``
    is ``lost``, by chance.
    """

    delay, loss = 0.3, 0.05

    def __init__(self) -> None:
        self.sent = self.lost = 0
        self._slow = False
        self._wake, self._over = os.pipe()
        super().__init__()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _connect(self) -> None:
        inner = f"{self._link}i"
        self._near, self._far = _tun(self._link), _tun(inner)
        _run("ip", "link", "set", inner, "netns", self.name, "name", "eth0")

    def worsen(self) -> None:
        """From now on the link is slow, and loses packets; ``sent`` and ``lost`` begin again."""
        self.sent = self.lost = 0
        self._slow = True

    def mend(self) -> None:
        self._slow = False
        super().mend()

    def _carry(self) -> None:
        across = {self._near: self._far, self._far: self._near}
        # When it is due, at which end, and the packet; none overtakes another.
        under_way: deque[tuple[float, int, bytes]] = deque()
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            ready, _, _ = select.select([*across, self._wake], [], [], wait)
            if self._wake in ready:
                return
            for end in ready:
                packet = os.read(end, 65536)
                slow = self._slow
                if slow and end == self._far:
                    self.sent += 1
                    if random.random() < self.loss:
                        self.lost += 1
                        continue
                under_way.append((time.monotonic() + self.delay * slow, across[end], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, end, packet = under_way.popleft()
                with suppress(OSError):  # an end that is down loses it, as any link does
                    os.write(end, packet)

    def close(self) -> None:
        """Have it be gone; what runs in it has ended."""
        os.close(self._over)
        self._thread.join()
        for end in (self._near, self._far, self._wake):
            os.close(end)
        super().close()


N = TypeVar("N", bound=Namespace)


@contextmanager
def namespace(kind: type[N] = Namespace) -> Iterator[N]:  # type: ignore[assignment]
    """A namespace, gone with the block."""
    made = kind()
    try:
        yield made
    finally:
        made.close()


def _tun(name: str) -> int:
    """A new device of this name, whose packets are read and written here; gone with its file descriptor."""
    end = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return end


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
