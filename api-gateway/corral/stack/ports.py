"""Free ports, and who holds one that is taken."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from pathlib import Path

from corral.config.local import listeners


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose(names: Iterable[str], before: dict[str, int], avoid: Iterable[int] = ()) -> dict[str, int]:
    """A free loopback port for each name; the one of last time where it is still free.

    Outside the range that the kernel gives to outgoing connections: one of those could otherwise take the port of a
    server that is being restarted.
    """
    chosen: dict[str, int] = {}
    taken = set(avoid)
    first = _first_ephemeral()
    low = 20_000 if first > 24_000 else 1_200
    for name in names:
        port = before.get(name, 0)
        while port in taken or not 0 < port < 65536 or not is_free(port):
            port = random.randrange(low, first if first > low else 65_000)
        taken.add(port)
        chosen[name] = port
    return chosen


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


def holder(port: int) -> str:
    """Who listens on a TCP port, such as ``nginx (pid 812)``; "another program" where that cannot be seen."""
    pid = listeners([port]).get(port)
    if pid is None:
        return "another program (of another user, or in another container)"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = ""
    return f"{command.strip()[:120] or 'a program'} (pid {pid})"
