"""Times as Go prints and reads them: RFC 3339 with nanoseconds, durations such as ``1h30m``."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime
from functools import lru_cache

# What Go's largest duration (2**63 nanoseconds) is in seconds: Ollama's "for ever" is this far ahead.
FOREVER = (2**63 - 1) / 1e9

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TERM = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")


def rfc3339(ns: int | None = None) -> str:
    """``ns`` since the epoch (now if None) as ``2026-01-02T03:04:05.678901234Z``, zeros at the end cut."""
    ns = time.time_ns() if ns is None else ns
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{_second(seconds)}.{fraction:09d}".rstrip("0").rstrip(".") + "Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def expiry(seconds: float) -> str:
    """The moment ``seconds`` from now, infinity being Go's largest duration."""
    return rfc3339(time.time_ns() + int(min(seconds, FOREVER) * 1e9))


def parse_duration(text: str) -> float:
    """Seconds of a Go duration. Raises ValueError with Go's text."""
    rest = text.lstrip("+-") if text[:1] in "+-" else text
    sign = -1.0 if text.startswith("-") else 1.0
    if rest == "0":
        return 0.0
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if not rest or not (rest[0].isdigit() or rest[0] == "."):
        raise ValueError(f"time: invalid duration {quoted}")
    total, at = 0.0, 0
    while at < len(rest):
        match = _TERM.match(rest, at)
        if match is None:
            raise ValueError(f"time: invalid duration {quoted}")
        number, unit = match.groups()
        if not unit:
            raise ValueError(f"time: missing unit in duration {quoted}")
        if unit not in _UNITS:
            raise ValueError(f'time: unknown unit "{unit}" in duration {quoted}')
        total += float(number) * _UNITS[unit]
        at = match.end()
    return sign * total


def keep_alive(value: object) -> float:
    """Seconds of a request's ``keep_alive``; negative means for ever (infinity). Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("Unsupported type: 'bool'")
    if isinstance(value, int | float):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = parse_duration(value)
    else:
        kind = "[]interface {}" if isinstance(value, list) else "map[string]interface {}"
        raise ValueError(f"Unsupported type: '{kind}'")
    return math.inf if seconds < 0 else seconds
