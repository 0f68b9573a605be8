"""Who listens on this machine: the kernel's tables, as far as this user may read them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTEN = "0A"


def listeners(ports: Collection[int]) -> dict[int, int]:
    """TCP port → pid of the process that listens there (the first of several); without those that cannot be seen."""
    wanted = dict(_sockets(ports))
    found: dict[int, int] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) if wanted else ():
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:[") and (port := wanted.get(target[8:-1])):
                    found.setdefault(port, pid)
        except OSError:
            continue  # it has ended, or is another user's
    return found


def loopback_port(url: str, default: int) -> int | None:
    """The port of a URL whose host is this machine's loopback; None of any other host."""
    parts = urlsplit(url)
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return None
    return (parts.port or default) if local else None


def _sockets(ports: Collection[int]) -> Iterator[tuple[str, int]]:
    """(inode, port) of sockets that listen."""
    for table in _TABLES:
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and (port := int(fields[1].rpartition(":")[2], 16)) in ports:
                yield fields[9], port
