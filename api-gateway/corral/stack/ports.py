"""Free ports, and who holds one that is taken."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from corral.config.local import listeners
from corral.stack import guard


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


def claim(port: int, host: str = "127.0.0.1") -> socket.socket | None:
    """Keep an address for one stack for as long as the socket is open, here or in a child; None if another has it.

    A free port says nothing of who is about to take it, and HAProxy would share it without a word (SO_REUSEPORT, by
    which a reload loses nothing). What is bound here is a name of the kernel's, which goes with its last holder and
    is, as ports are, of one network namespace.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(f"\0corral-port-{'127.0.0.1' if host == 'localhost' else host}:{port}")
    except OSError:
        held.close()
        return None
    return held


def choose(
    names: Iterable[str],
    before: dict[str, int],
    avoid: Iterable[int] = (),
    take: Callable[[int], bool] = lambda port: True,
) -> dict[str, int]:
    """A free loopback port for each name; the one of last time where it is still free. ``take`` claims one.

    Outside the range that the kernel gives to outgoing connections: one of those could otherwise take the port of a
    server that is being restarted.
    """
    chosen: dict[str, int] = {}
    taken = set(avoid)
    first = _first_ephemeral()
    low = 20_000 if first > 24_000 else 1_200
    for name in names:
        port = before.get(name, 0)
        while port in taken or not 0 < port < 65536 or not is_free(port) or not take(port):
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
    """Who listens on a TCP port: ``nginx (pid 812)``, or which Corral; "another program" where that cannot be seen."""
    pid = listeners([port]).get(port)
    if pid is None:
        return "another program (of another user, or in another container)"
    if state := guard.stack_of(pid):
        return f"the Corral with the state folder {state} (`corral down --state {state}` stops it)"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = ""
    return f"{command.strip()[:120] or 'a program'} (pid {pid})"
