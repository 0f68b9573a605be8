"""The result of a run: what result.json holds. Seconds, requests and tokens a second, shares from 0 to 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from corral.loadtest.errors import LoadTestError

VERSION = 1
FILE = "result.json"
MEASURES = {
    "ttft": "time to first token",
    "itl": "time between tokens",
    "e2e": "time to the end",
    "queue": "time in the gateway's queue",
    "stream_rate": "tokens a second of one stream",
}
"""What is sampled, by its name here and in thresholds. All but ``stream_rate`` in seconds; ``itl`` once per token."""


class Summary(msgspec.Struct, forbid_unknown_fields=True):
    """Samples of one measure. ``exact``: percentiles are those of the samples, else within 0.5%.

    ``cdf``: (value, share of samples up to it), ascending; of like values the first and the last.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    min: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0
    exact: bool = True
    cdf: list[tuple[float, float]] = []


class ErrorKind(msgspec.Struct, forbid_unknown_fields=True):
    """One kind of failure: how many, and how many for which reason."""

    count: int
    reasons: dict[str, int]


class Group(msgspec.Struct, forbid_unknown_fields=True):
    """What came of a group of requests.

    ``good``: whole and within the objectives (``load.slo``). ``retries``: refusals waited out (``--retry-after``).
    ``output_tokens``: the server's count, else the events with text that were seen.
    """

    requests: int = 0
    ok: int = 0
    failed: int = 0
    cancelled: int = 0
    good: int = 0
    retries: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    requests_per_s: float = 0.0
    good_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    error_rate: float = 0.0
    status: dict[str, int] = {}
    errors: dict[str, ErrorKind] = {}
    measures: dict[str, Summary] = {}


class Slot(msgspec.Struct, forbid_unknown_fields=True):
    """A slice of the run, ``seconds`` long from ``at`` on. ``started`` by the schedule, the rest when it happened."""

    at: float
    seconds: float
    started: int
    ok: int
    failed: int
    in_flight: int
    tokens: int
    ttft_p50: float | None
    ttft_p95: float | None
    e2e_p50: float | None
    e2e_p95: float | None
    errors: dict[str, int]


class LoadPart(msgspec.Struct, forbid_unknown_fields=True):
    """The load that was asked for. ``slo``: objectives in seconds; ``description``: all of it in words."""

    mode: str
    description: str
    api: str
    route: str
    stream: bool
    models: list[tuple[str, float]]
    keys: list[str]
    requests: int
    duration: float
    concurrency: int
    rate: float
    trace: str
    speed: float
    since: float
    prompt_tokens: str
    max_tokens: str
    warmup: int
    timeout: float
    retry_after: bool
    slo: dict[str, float]
    seed: int


class Client(msgspec.Struct, forbid_unknown_fields=True):
    """What the client itself did. ``late``: from the time a request was due to that at which it was sent (open loop).

    ``cpu_share``: of one core. ``warnings``: why the figures may be the client's more than the server's.
    """

    late: Summary
    cpu_share: float
    in_flight_max: int
    connections: int
    sent_again: int
    warnings: list[str]


class Verdict(msgspec.Struct, forbid_unknown_fields=True):
    """A threshold; ``value`` is None where nothing was measured, which fails."""

    text: str
    value: float | None
    passed: bool


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """A run. ``started`` is UTC (ISO 8601). ``window``: seconds from the first due time to the last end."""

    version: int
    command: str
    url: str
    started: str
    window: float
    interrupted: bool
    versions: dict[str, str]
    machine: dict[str, str]
    load: LoadPart
    total: Group
    by_model: dict[str, Group]
    by_key: dict[str, Group]
    by_node: dict[str, Group]
    series: list[Slot]
    client: Client
    thresholds: list[Verdict]


def encode(result: Result) -> bytes:
    """As JSON, one line."""
    return msgspec.json.encode(result) + b"\n"


def schema() -> dict[str, Any]:
    """The JSON schema of a result."""
    return msgspec.json.schema(Result)


def place(path: Path) -> Path:
    """The file of a result, where a folder of `corral loadtest run` is named too."""
    return path / FILE if path.is_dir() else path


def read(path: Path) -> Result:
    """A result from its file, or from the folder of its run. LoadTestError where it is none."""
    path = place(path)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise LoadTestError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path} is no result of `corral loadtest run`: {error}") from None
    if found.version != VERSION:
        raise LoadTestError(f"{path} has version {found.version}; this Corral reads {VERSION}")
    return found
