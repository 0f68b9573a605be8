"""Durations, sizes, addresses: how they are written in corral.yaml and what they are in the program."""

from __future__ import annotations

import ipaddress
import math
import re
import sys
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((letter, 1024), (letter + "b", 1000), (letter + "ib", 1024))
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw]?)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
WILDCARDS = frozenset(("0.0.0.0", "::"))
"""Hosts that mean every address of this machine."""
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def duration(value: object) -> float:
    """Seconds of ``30``, ``"30s"``, ``"1h30m"`` or ``"250ms"``. ValueError otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    if isinstance(value, str) and (text := value.strip().lower()):
        parts = list(_DURATION.finditer(text))
        # A bare number is seconds, but only alone: "1h30" is more likely a slip than 30 seconds.
        bare = any(not part[2] for part in parts)
        if "".join(part[0] for part in parts) == text and not (bare and len(parts) > 1):
            seconds = sum(float(part[1]) * _SECONDS[part[2]] for part in parts)
            if math.isfinite(seconds):
                return seconds
    raise ValueError("expected a duration such as 500ms, 30s, 30m, 12h or 400d")


def bare(value: object) -> str:
    """The number of a duration that is written without a unit; "" of any other."""
    text = str(value).strip()
    return text if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII) else ""


def retention(value: object) -> float:
    """Seconds of a duration that has a unit (or is 0): nobody keeps a record for 30 seconds. ValueError otherwise."""
    seconds = duration(value)
    if seconds and (number := bare(value)):
        raise ValueError(
            f"a number alone would be seconds: write {number}d for days (or {number}h, {number}w, {number}s)"
        )
    return seconds


def duration_text(seconds: float) -> str:
    """``30m`` of 1800.0: in the largest unit that leaves no rest; `duration` makes the same number of it again."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{Decimal(repr(seconds)).normalize():f}s"


def size_text(octets: int) -> str:
    """``32MiB`` of 33554432: in the largest power of 1024 that leaves no rest."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if octets and octets % 1024**power == 0:
            return f"{octets // 1024**power}{unit}"
    return f"{octets}B"


def size(value: object) -> int:
    """Bytes of ``1024``, ``"22GiB"`` (powers of 1024) or ``"22GB"`` (of 1000). ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())) and match[2].lower() in _BYTES:
        number = float(match[1]) if "." in match[1] else int(match[1])
        return int(number * _BYTES[match[2].lower()])
    raise ValueError("expected a size such as 64KiB, 32MiB or 22GiB")


def host_port(text: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:8080`` or ``[::1]:8080``. ValueError otherwise."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError("expected host:port such as 127.0.0.1:8080")
    _check_host(host, bracketed)
    return host, int(port)


def loopback(host: str) -> bool:
    """Whether this machine alone reaches an address to listen on."""
    return host in ("localhost", "::1") or host.startswith("127.")


def joined(host: str, port: int) -> str:
    """host:port, in brackets where they are needed."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_host(host: str, ipv6: bool) -> None:
    if ipv6:
        ipaddress.IPv6Address(host)
    elif not _HOST.fullmatch(host):
        raise ValueError("expected host:port such as 127.0.0.1:8080")


def _listen(value: str) -> str:
    host_port(value)
    return value


def base_url(value: str) -> str:
    """``http(s)://host[:port]`` and nothing behind it: it names a server, and ends up in haproxy.cfg."""
    wanted = "expected an address such as http://10.0.0.11:11434"
    if not value.strip().isprintable():
        raise ValueError(wanted)  # urlsplit would drop line ends without a word
    try:
        parts = urlsplit(value.strip())
        port = parts.port
        host = parts.hostname or ""
        _check_host(host, ":" in host)
    except ValueError:
        raise ValueError(wanted) from None
    if parts.scheme not in ("http", "https") or port == 0:
        raise ValueError(wanted)
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{wanted}: no user, path or query")
    return f"{parts.scheme}://{parts.netloc}"


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected lower-case letters, digits and hyphens, such as node-1")
    return value


def _registry(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,252}(:\d{1,5})?", value.lower(), re.ASCII):
        raise ValueError("expected a host, or host:port")
    return value.lower()


def _host_pattern(value: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", value):
        raise ValueError(
            "expected a host name such as llm.example.com, *.example.com or *, in lower case and without port"
        )
    return value


def _origin(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+", value):
        raise ValueError("expected an origin such as https://app.example.com")
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError("expected a network such as 10.0.0.0/8") from None
    return value


def _redis_url(value: str) -> str:
    parts = urlsplit(value)
    known = parts.scheme in ("redis", "rediss", "valkey", "valkeys", "unix")
    if not known or not (parts.hostname or parts.path):
        raise ValueError("expected an address such as redis://127.0.0.1:6379/0")
    return value


def database_url(value: str) -> str:
    """A database's address, with the driver that Corral has for it: psycopg 3 for PostgreSQL."""
    scheme, separator, rest = value.partition("://")
    if scheme in ("postgres", "postgresql"):
        scheme = "postgresql+psycopg"
    if not separator or scheme not in ("sqlite", "postgresql+psycopg"):
        raise ValueError("expected sqlite:///file or postgresql://user@host/name")
    return f"{scheme}://{rest}"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


_TEXT_OR_NUMBER = ["string", "number"]
Duration = Annotated[
    float,
    BeforeValidator(duration),
    PlainSerializer(duration_text, when_used="json"),
    WithJsonSchema({"type": _TEXT_OR_NUMBER, "examples": ["30s", "30m", "400d"]}),
]
Retention = Annotated[
    float,
    BeforeValidator(retention),
    PlainSerializer(duration_text, when_used="json"),
    WithJsonSchema({"type": "string", "examples": ["30d", "400d"]}),
]
Size = Annotated[
    int,
    BeforeValidator(size),
    PlainSerializer(size_text, when_used="json"),
    WithJsonSchema({"type": _TEXT_OR_NUMBER, "examples": ["32MiB"]}),
]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Listen = Annotated[str, AfterValidator(_listen)]
ListenOrNone = Annotated[
    str,
    BeforeValidator(lambda value: "" if value is None else value),
    AfterValidator(lambda value: value and _listen(value)),
]
BaseUrl = Annotated[str, AfterValidator(base_url)]
Name = Annotated[str, AfterValidator(_name)]
Network = Annotated[str, AfterValidator(_network)]
Registry = Annotated[str, AfterValidator(_registry)]
HostPattern = Annotated[str, AfterValidator(_host_pattern)]
Origin = Annotated[str, AfterValidator(_origin)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
DatabaseUrl = Annotated[str, AfterValidator(database_url)]
