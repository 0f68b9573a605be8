"""Runs a load test: sends requests as the schedule says, or as others end, and records what comes of them.

Open loop: a request goes out when it is due, whatever became of those before it, and its latencies count from then;
a client or a server that falls behind is seen in them (no coordinated omission). Bounded: no request begins after
``load.duration``, each ends within ``timeout``, and there are at most ``load.requests``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import secrets
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import uvloop

from corral.loadtest import answers, machine, schedule
from corral.loadtest.answers import CANCELLED, NOT_SENT, RATE_LIMITED, UNAVAILABLE, Raw
from corral.loadtest.client import Answer, Client
from corral.loadtest.errors import LoadTestError
from corral.loadtest.guard import Target
from corral.loadtest.measure import Objectives, Recorder
from corral.loadtest.prompts import Corpus
from corral.loadtest.requests import Shape
from corral.loadtest.schedule import Job, Load

Watch = Callable[[Recorder, bool], None]
"""Told of the state of a run now and then; the second value is True at its end."""

WATCH = 0.5
RETRIES_MAX = 10
BURST = 64


@dataclass(frozen=True, slots=True)
class Options:
    """A run. ``secrets``: the keys, as ``load.keys`` names them; ``timeout``: seconds a request may take."""

    target: Target
    shape: Shape
    load: Load
    secrets: tuple[str, ...] = field(repr=False)
    warmup: int = 0
    timeout: float = 120.0
    objectives: Objectives = field(default_factory=Objectives)
    retry_after: bool = False
    max_in_flight: int = 4096
    tls: ssl.SSLContext | None = field(default=None, repr=False)


@dataclass(slots=True)
class Run:
    """What a run came to. ``cpu_share``: of one core, of this process."""

    recorder: Recorder
    started: float
    cpu_share: float = 0.0
    interrupted: bool = False
    connections: int = 0
    sent_again: int = 0


def run(options: Options, watch: Watch | None = None, seen: Callable[[Answer, float], None] | None = None) -> Run:
    """Run it to its end, or to SIGINT or SIGTERM; ``seen`` hears of each answer and the time it was due.

    Raises LoadTestError where a warm-up request fails.
    """
    wanted = options.load.concurrency or options.max_in_flight
    if machine.raise_file_limit(wanted + 64) < wanted + 64:
        raise LoadTestError(f"{wanted} connections at once need as many open files: raise `ulimit -n`")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Runner(options, watch, seen).run())


def discover(target: Target, key: str, tls: ssl.SSLContext | None = None) -> list[str]:
    """The models that the target lists for this key. LoadTestError where it lists none to us."""

    async def ask() -> list[str]:
        client, raw = Client(target, tls), Raw()
        answer = await client.ask(Shape(target, "native", "chat", True).get("/api/tags", key), raw, 10.0)
        await client.close()
        if answer.kind != answers.OK:
            raise LoadTestError(
                f"{target.url}/api/tags: {answers.KINDS.get(answer.kind, answer.kind)}: {answer.reason}"
            )
        try:
            return sorted(str(model["name"]) for model in json.loads(raw.body)["models"])
        except (ValueError, KeyError, TypeError):
            raise LoadTestError(f"{target.url}/api/tags is no list of models: name one with --model") from None

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(ask())


class _Runner:
    def __init__(self, options: Options, watch: Watch | None, seen: Callable[[Answer, float], None] | None) -> None:
        self._options, self._watch, self._seen = options, watch, seen
        self._corpus = Corpus(options.load.seed)
        self._client = Client(options.target, options.tls)
        self._name = f"lt-{secrets.token_hex(4)}"
        self._tasks: set[asyncio.Task[None]] = set()
        self._recorder: Recorder

    async def run(self) -> Run:
        options = self._options
        await self._warm_up()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        with _signals(loop, stop):
            # What exists now lives to the end: a collection in mid-run would look at it in vain.
            gc.collect()
            gc.freeze()
            started, cpu = time.time(), time.process_time()
            self._recorder = recorder = Recorder(options.objectives, perf_counter())
            work = self._closed if options.load.mode == schedule.CLOSED else self._open
            load = asyncio.create_task(work(schedule.jobs(options.load)))
            watcher = asyncio.create_task(self._watching())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({load, stopped}, return_when=asyncio.FIRST_COMPLETED)
            interrupted = stop.is_set()
            for task in [load, *self._tasks] if interrupted else []:
                task.cancel()
            results = await asyncio.gather(load, *self._tasks, return_exceptions=True)
            elapsed = perf_counter() - recorder.start
            used = time.process_time() - cpu
            watcher.cancel()
            stopped.cancel()
            await asyncio.gather(watcher, stopped, return_exceptions=True)
            gc.unfreeze()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
        if self._watch:
            self._watch(recorder, True)
        await self._client.close()
        share = used / elapsed if elapsed else 0.0
        return Run(recorder, started, share, interrupted, self._client.connected, self._client.again)

    async def _warm_up(self) -> None:
        load = self._options.load
        for number in range(self._options.warmup):
            model = load.models[number % len(load.models)][0]
            job = Job(-1 - number, None, model, number % len(load.keys), 16, 4)
            answer = await self._send(job, self._request(job))
            if answer.kind != answers.OK:
                what = answers.KINDS.get(answer.kind, answer.kind)
                raise LoadTestError(
                    f"a warm-up request for {model} failed, and nothing was measured: {what}: {answer.reason}"
                )

    async def _watching(self) -> None:
        while self._watch:
            await asyncio.sleep(WATCH)
            self._watch(self._recorder, False)

    # -- the two loops

    async def _closed(self, jobs: Iterator[Job]) -> None:
        end = self._recorder.start + self._options.load.duration

        async def caller() -> None:
            for job in jobs:
                request = self._request(job)
                due = perf_counter()
                if due >= end:
                    return
                await self._one(job, request, due)

        count = min(self._options.load.concurrency, self._options.load.requests)
        self._tasks = {asyncio.create_task(caller()) for _ in range(count)}
        await asyncio.gather(*self._tasks)

    async def _open(self, jobs: Iterator[Job]) -> None:
        start, since = self._recorder.start, 0
        for job in jobs:
            request = self._request(job)
            assert job.due is not None
            due = start + job.due
            since += 1
            if perf_counter() < due:
                # A timer of whole milliseconds may be early, hence the loop.
                while (delay := due - perf_counter()) > 0:  # noqa: ASYNC110 (what it waits for is the time)
                    await asyncio.sleep(max(delay, 0.001))
                since = 0
            elif since >= BURST:
                # Behind the schedule: answers must be read all the same.
                await asyncio.sleep(0)
                since = 0
            if len(self._tasks) >= self._options.max_in_flight:
                self._not_sent(job, due)
                continue
            task = asyncio.create_task(self._one(job, request, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    # -- one request

    def _request(self, job: Job) -> bytes:
        prompt = self._corpus.prompt(job.number % schedule.REQUESTS_MAX, job.prompt_tokens, job.blocks)
        body = self._options.shape.body(job.model, prompt, job.max_tokens)
        name = f"w{-job.number}" if job.number < 0 else str(job.number)
        return self._options.shape.post(body, self._options.secrets[job.key], f"{self._name}-{name}")

    async def _one(self, job: Job, request: bytes, due: float) -> None:
        recorder, retries = self._recorder, 0
        late = perf_counter() - due if job.due is not None else None
        recorder.begun(due, late)
        answer = Answer(Raw(), kind=CANCELLED)
        try:
            while True:
                sent = await self._send(job, request)
                wait = self._wait(sent, due)
                if wait is None or retries == RETRIES_MAX:
                    answer = sent
                    return
                retries += 1
                await asyncio.sleep(wait)
        finally:
            answer.ended = answer.ended or perf_counter()
            recorder.ended(answer, due, job.model, self._options.load.keys[job.key], retries)
            if self._seen:
                self._seen(answer, due)

    async def _send(self, job: Job, request: bytes) -> Answer:
        options = self._options
        reader = answers.reader(options.shape.api, options.shape.stream)
        return await self._client.ask(request, reader, options.timeout)

    def _wait(self, answer: Answer, due: float) -> float | None:
        """Seconds to wait before a refused request is sent again; None if it is not."""
        if not self._options.retry_after or answer.kind not in (RATE_LIMITED, UNAVAILABLE):
            return None
        text = answer.headers.get("retry-after", "")
        if not text.isdigit() or perf_counter() + int(text) > due + self._options.timeout:
            return None
        return float(text)

    def _not_sent(self, job: Job, due: float) -> None:
        recorder, now = self._recorder, perf_counter()
        recorder.begun(due, now - due)
        limit = f"{self._options.max_in_flight} under way"
        answer = Answer(Raw(), kind=NOT_SENT, reason=limit, ended=now)
        recorder.ended(answer, due, job.model, self._options.load.keys[job.key], 0)


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop``. Once one came the rest is ignored: what remains is to write the report."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            if stop.is_set():
                signal.signal(number, signal.SIG_IGN)
