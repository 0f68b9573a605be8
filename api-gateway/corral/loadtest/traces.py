"""Traces of real services: when a request came, how long its prompt and its answer were.

Two forms are read, both told apart by their content: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) and
Mooncake's JSON lines (timestamp in ms, input_length, output_length, hash_ids of 512-token prefix blocks).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from corral.loadtest.errors import LoadTestError
from corral.loadtest.lengths import LONGEST

BLOCK = 512
REQUESTS_MAX = 1_000_000
_DATA = Path(__file__).resolve().parents[3] / "benchmarks" / "data"
KNOWN = {"azure": "azure-llm-2023-conv.csv", "mooncake": "mooncake-conversation.jsonl"}


@dataclass(frozen=True, slots=True)
class Arrival:
    """``at``: seconds since the first request; lengths in tokens; ``blocks``: ids of shared prefix blocks."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def locate(name: str) -> Path:
    """The file of ``azure``, ``mooncake`` or a path. LoadTestError where there is none."""
    path = _DATA / KNOWN[name] if name in KNOWN else Path(name)
    if not path.is_file():
        hint = (
            f"it is {KNOWN[name]} in the repository's benchmarks/data: give that file" if name in KNOWN else "no file"
        )
        raise LoadTestError(f"trace {name}: {hint}")
    return path


def load(name: str) -> list[Arrival]:
    """The arrivals of a trace in the order of time, the first at 0. LoadTestError naming file and line."""
    path = locate(name)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            found = list(_validated(path.name, _rows(path.name, lines)))
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path.name} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    if not found:
        raise LoadTestError(f"{path.name}: there is no request in it")
    start = found[0].at
    return [Arrival(a.at - start, a.prompt_tokens, a.output_tokens, a.blocks) for a in found]


def _rows(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Arrival]]:
    decoder = msgspec.json.Decoder(_Mooncake)
    columns: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        try:
            if text.startswith("{"):
                entry = decoder.decode(text)
                yield (
                    number,
                    Arrival(entry.timestamp / 1e3, entry.input_length, entry.output_length, tuple(entry.hash_ids)),
                )
            elif not columns:
                columns = next(csv.reader([text]))
                if missing := {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(columns):
                    raise ValueError(f"column {sorted(missing)[0]} is missing")
            else:
                row = dict(zip(columns, next(csv.reader([text])), strict=True))
                # Seven digits of a second are one more than datetime takes.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                yield number, Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, msgspec.DecodeError) as error:
            raise LoadTestError(f"{name}:{number}: {error}") from None


def _validated(name: str, rows: Iterable[tuple[int, Arrival]]) -> Iterator[Arrival]:
    last = -math.inf
    for count, (number, arrival) in enumerate(rows):
        if count >= REQUESTS_MAX:
            raise LoadTestError(f"{name}: more than {REQUESTS_MAX:,} requests")
        if not math.isfinite(arrival.at) or arrival.at < last:
            raise LoadTestError(f"{name}:{number}: the time goes back")
        if not (0 < arrival.prompt_tokens <= LONGEST and 0 < arrival.output_tokens <= LONGEST):
            raise LoadTestError(f"{name}:{number}: tokens must be from 1 to {LONGEST:,}")
        last = arrival.at
        yield arrival
