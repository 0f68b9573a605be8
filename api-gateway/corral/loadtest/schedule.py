"""When each request is due, of which model, with which key and how long: pure, and the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from corral.loadtest.lengths import Lengths
from corral.loadtest.traces import Arrival

REQUESTS_MAX = 1_000_000
CLOSED, CONSTANT, POISSON, TRACE = "closed", "constant", "poisson", "trace"


@dataclass(frozen=True, slots=True)
class Load:
    """What load is made. ``rate``: requests a second; ``duration``: seconds in which requests begin.

    ``models`` and ``keys``: (name, weight); a key's name stands for its secret, which is not here.
    ``since``: where in the trace ``arrivals`` begin (s); ``cap_prompt``, ``cap_output`` cut its lengths (tokens).
    """

    mode: str
    models: tuple[tuple[str, float], ...]
    keys: tuple[str, ...]
    requests: int
    duration: float
    concurrency: int = 0
    rate: float = 0.0
    trace: str = ""
    arrivals: Sequence[Arrival] = field(default=(), repr=False)
    speed: float = 1.0
    since: float = 0.0
    prompt_tokens: Lengths | None = None
    max_tokens: Lengths | None = None
    cap_prompt: int | None = None
    cap_output: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One request: ``due`` in seconds since the start, None where the end of another sets it off."""

    number: int
    due: float | None
    model: str
    key: int
    prompt_tokens: int
    max_tokens: int
    blocks: tuple[int, ...] = ()


def constant(rate: float) -> Iterator[float]:
    """Arrivals with the same time between them, from 0 on."""
    return (number / rate for number in itertools.count())


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Arrivals with exponential times between them, the first after such a time."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def zipf(models: Sequence[str], exponent: float) -> tuple[tuple[str, float], ...]:
    """Weights 1, 1/2^s, 1/3^s, … in the order of the models."""
    return tuple((model, rank**-exponent) for rank, model in enumerate(models, 1))


def jobs(load: Load) -> Iterator[Job]:
    """The requests in the order of their time; at most ``load.requests``, none due at ``load.duration`` or later."""
    # A generator each, so that a model more does not move the arrivals.
    times, draws = random.Random(f"times {load.seed}"), random.Random(f"draws {load.seed}")
    sizes = random.Random(f"sizes {load.seed}")
    names = [name for name, _ in load.models]
    sums = list(itertools.accumulate(weight for _, weight in load.models))
    for number, arrival in enumerate(itertools.islice(_arrivals(load, times), min(load.requests, REQUESTS_MAX))):
        due, prompt, output, blocks = arrival
        if due is not None and due >= load.duration:
            return
        if prompt is None:
            prompt = load.prompt_tokens.draw(sizes) if load.prompt_tokens else 64
        if output is None:
            output = load.max_tokens.draw(sizes) if load.max_tokens else 64
        model = draws.choices(names, cum_weights=sums)[0]
        key = draws.randrange(len(load.keys)) if len(load.keys) > 1 else 0
        yield Job(number, due, model, key, prompt, output, blocks)


_Arrival = tuple[float | None, int | None, int | None, tuple[int, ...]]


def _arrivals(load: Load, rng: random.Random) -> Iterator[_Arrival]:
    if load.mode == TRACE:
        for arrival in load.arrivals:
            prompt = min(arrival.prompt_tokens, load.cap_prompt or arrival.prompt_tokens)
            output = min(arrival.output_tokens, load.cap_output or arrival.output_tokens)
            yield arrival.at / load.speed, prompt, output, arrival.blocks
    elif load.mode == CLOSED:
        yield from itertools.repeat((None, None, None, ()))
    else:
        times = constant(load.rate) if load.mode == CONSTANT else poisson(load.rate, rng)
        for at in times:
            yield at, None, None, ()
