"""What the command line gives, as a run. Each function raises ValueError (wrong usage) or LoadTestError."""

from __future__ import annotations

import dataclasses
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from corral.config.values import duration
from corral.loadtest import schedule, traces
from corral.loadtest.errors import LoadTestError
from corral.loadtest.measure import Objectives
from corral.loadtest.traces import Arrival

KEY = "CORRAL_KEY"
REQUESTS = 100
DURATION = 600.0
DURATION_MAX = 86_400.0
_KEY = re.compile(r"[!-~]{1,512}")
_CORRAL_KEY = re.compile(r"crl_([a-z0-9]+)_.+")
_SLO = re.compile(r"(ttft|itl|e2e)(?:<=|<|=)(.+)")


def keys(files: Sequence[str], env: Mapping[str, str], without: bool) -> tuple[tuple[str, str], ...]:
    """(name, secret) of each key: of the files, one a line, or of $CORRAL_KEY. A name is never a secret."""
    if without:
        return (("none", ""),)
    secrets: list[str] = []
    for name in files:
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadTestError(f"{name} cannot be read: {getattr(error, 'strerror', '') or 'it is no text'}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise LoadTestError(f"{name}: there is no key in it (one a line)")
        secrets += found
    secrets = secrets or [env[KEY].strip()] if files or env.get(KEY, "").strip() else []
    if not secrets:
        raise ValueError(f"no key: set {KEY}, give --key-file FILE, or --no-key for a server that wants none")
    if not all(_KEY.fullmatch(secret) for secret in secrets):
        raise LoadTestError("a key has characters that no key has")
    named = []
    for number, secret in enumerate(dict.fromkeys(secrets), 1):
        match = _CORRAL_KEY.fullmatch(secret)
        named.append((match[1] if match else f"key-{number}", secret))
    return tuple(named)


def models(given: Sequence[str], zipf: float | None) -> tuple[tuple[str, float], ...]:
    """(name, weight) of ``NAME[=WEIGHT]``; with ``zipf`` the weights are those of the order."""
    found: dict[str, float] = {}
    for text in given:
        name, equals, weight = text.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = 0.0
        if not name or not 0 < value < 1e9:
            raise ValueError(f"--model {text}: expected NAME or NAME=WEIGHT with a weight above 0")
        if name in found:
            raise ValueError(f"--model {name} is given twice")
        found[name] = value
    if zipf is None:
        return tuple(found.items())
    if any("=" in text for text in given):
        raise ValueError("--zipf gives the weights: name the models without theirs, the busiest first")
    return schedule.zipf(list(found), zipf)


def objectives(given: Sequence[str]) -> Objectives:
    """The objectives of ``ttft=2s``, ``itl=100ms``, ``e2e=30s``."""
    found: dict[str, float] = {}
    for text in given:
        match = _SLO.fullmatch(text.replace(" ", ""))
        if not match:
            raise ValueError(f"--slo {text}: expected ttft=TIME, itl=TIME or e2e=TIME, such as ttft=2s")
        found[match[1]] = duration(match[2])
    return Objectives(**found)


def mode(closed: int | None, rate: float | None, poisson: float | None, trace: str | None) -> str:
    """Which load was asked for; exactly one."""
    given = {
        schedule.CLOSED: closed,
        schedule.CONSTANT: rate,
        schedule.POISSON: poisson,
        schedule.TRACE: trace,
    }
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError("give one of --closed CALLERS, --rate R, --poisson R, --trace azure|mooncake|FILE")
    return chosen[0]


def bounds(
    kind: str, requests: int | None, seconds: float | None, arrivals: Sequence[Arrival], speed: float
) -> tuple[int, float]:
    """(requests, seconds): a run is bounded by both; a trace by its own length and end."""
    if seconds is not None and not 0 < seconds <= DURATION_MAX:
        raise ValueError("--duration is from 1ms to 24h")
    if kind == schedule.TRACE:
        until = min(seconds or DURATION_MAX, arrivals[-1].at / speed + 1e-6, DURATION_MAX)
        due = sum(arrival.at / speed < until for arrival in arrivals)
        return min(requests or due, due), until
    if requests is None:
        return (REQUESTS, DURATION) if seconds is None else (schedule.REQUESTS_MAX, seconds)
    return requests, DURATION if seconds is None else seconds


def tls(target_tls: bool, ca: str | None) -> ssl.SSLContext | None:
    """The context for https; ``ca`` is trusted instead of the system's authorities."""
    if not target_tls:
        if ca:
            raise ValueError("--ca goes with an address that begins with https://")
        return None
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise LoadTestError(f"--ca {ca}: {getattr(error, 'strerror', '') or error}") from None


def arrivals_of(kind: str, trace: str | None, since: float) -> list[Arrival]:
    """The trace from ``since`` seconds on, where there is one."""
    if kind != schedule.TRACE or not trace:
        return []
    later = [arrival for arrival in traces.load(trace) if arrival.at >= since]
    if not later:
        raise ValueError(f"--from: the trace ends before {since:g} s")
    return [dataclasses.replace(arrival, at=arrival.at - later[0].at) for arrival in later]
