"""A load that is played against something that listens, and what its callers waited.

The same jobs (`corral.loadtest.schedule`) drive a discrete-event run and a real one, so that they are compared request
by request in their arrivals, lengths and models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import psutil

from corral.fleet.simulation import Asked
from corral.loadtest import answers, guard, run, schedule
from corral.loadtest.client import Answer
from corral.loadtest.requests import Shape as Requests
from corral.loadtest.schedule import Load
from corral.loadtest.traces import load as trace

TIMEOUT = 600.0
"""No request of a run is given up by its caller (seconds)."""


@dataclass
class Played:
    """What came of a load, in the order of arrival. ``first``: seconds from when a request was due to its first token,
    ``queue``: of those the ones in a gateway's queue; ``failed``: reasons. ``busy``: share of the machine's CPU."""

    first: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    busy: float = 0.0
    loads: int = 0


def piece(name: str, models: Sequence[str], rate: float, since: float, seconds: float, cap: int, seed: int) -> Load:
    """A piece of a trace from ``since`` (s of the trace) on, played for ``seconds`` at a share of its rate.

    Models by a seeded Zipf draw (exponent 1.0); prompts cut at ``cap`` tokens.
    """
    later = [arrival for arrival in trace(name) if arrival.at >= since]
    arrivals = [replace(arrival, at=arrival.at - later[0].at) for arrival in later]
    return Load(
        mode=schedule.TRACE,
        models=schedule.zipf(models, 1.0),
        keys=("load",),
        requests=schedule.REQUESTS_MAX,
        duration=seconds,
        arrivals=arrivals,
        speed=rate,
        cap_prompt=cap,
        seed=seed,
    )


def asked(load: Load) -> list[Asked]:
    """The same requests for a discrete-event run."""
    jobs = schedule.jobs(load)
    return [Asked(job.due or 0.0, job.model, job.prompt_tokens, job.max_tokens, job.blocks) for job in jobs]


def play(url: str, key: str, load: Load) -> Played:
    """Send the load's requests when they are due (native chat, streamed); ends with the last answer."""
    target = guard.target(url, None, {})
    options = run.Options(target, Requests(target, "native", "chat", True), load, (key,), timeout=TIMEOUT)
    found: list[tuple[float, Answer]] = []
    psutil.cpu_percent()
    run.run(options, None, lambda answer, due: found.append((due, answer)))
    played = Played(busy=psutil.cpu_percent() / 100)
    for due, answer in sorted(found, key=lambda one: one[0]):
        if answer.kind != answers.OK:
            played.failed.append(f"{answer.kind} {answer.status}: {answer.reason}")
            continue
        played.first.append(answer.reader.times[0] - due)
        played.queue.append(float(answer.headers.get("x-corral-queue-ms", 0)) / 1e3)
    return played


def percentile(values: Sequence[float], share: float) -> float:
    """Of values in any order; infinite where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.inf
