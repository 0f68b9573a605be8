"""Whom a load test may load: this machine, or a host that was named twice."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from corral.config.values import base_url
from corral.loadtest.errors import LoadTestError

ALLOW = "CORRAL_LOADTEST_ALLOW"
Resolve = Callable[[str, int], list[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes. The client connects to ``address`` and asks the resolver no more."""

    url: str
    host: str
    port: int
    tls: bool
    address: str


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name. LoadTestError where it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise LoadTestError(f"{host}: the name is not known") from None
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def target(url: str, may_load: str | None, env: Mapping[str, str], resolver: Resolve = resolve) -> Target:
    """The target of ``url``, which is loopback by every address of its name, or allowed twice.

    ``may_load`` is what --i-may-load names; it and $CORRAL_LOADTEST_ALLOW must both be the URL's host.
    Raises LoadTestError.
    """
    try:
        parts = urlsplit(base_url(url))
    except ValueError as error:
        raise LoadTestError(f"{url}: {error}") from None
    host = parts.hostname or ""
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    addresses = resolver(host, port)
    if not addresses:
        raise LoadTestError(f"{host}: the name has no address")
    elsewhere = [address for address in addresses if not _loopback(address)]
    told = [(given or "").strip().lower() for given in (may_load, env.get(ALLOW))]
    if elsewhere and told != [host.lower()] * 2:
        also = "" if elsewhere == [host] else f" ({', '.join(elsewhere)})"
        raise LoadTestError(
            f"{host}{also} is not this machine: to load it, say so twice: --i-may-load {host} and {ALLOW}={host}"
        )
    return Target(f"{parts.scheme}://{parts.netloc}", host, port, tls, addresses[0])


def _loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
