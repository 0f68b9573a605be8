"""A run as a result: the figures, the load that was asked for, and what to be careful about."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from corral.loadtest import machine, schedule
from corral.loadtest.measure import Recorder, summary
from corral.loadtest.result import VERSION, Client, LoadPart, Result
from corral.loadtest.run import Options, Run
from corral.loadtest.schedule import Load
from corral.loadtest.thresholds import Threshold
from corral.loadtest.units import number, seconds, tick

LATE_BOUND = 0.02
CPU_BOUND = 0.8


def result(options: Options, run: Run, command: str, thresholds: Sequence[Threshold]) -> Result:
    """All that is known of a run."""
    recorder = run.recorder
    total = recorder.total.result(recorder.window, True)
    return Result(
        version=VERSION,
        command=command,
        url=options.target.url,
        started=datetime.fromtimestamp(run.started, UTC).isoformat(timespec="seconds"),
        window=recorder.window,
        interrupted=run.interrupted,
        versions=machine.versions(),
        machine=machine.machine(),
        load=_load(options),
        total=total,
        by_model=recorder.groups("model"),
        by_key=recorder.groups("key"),
        by_node=recorder.groups("node"),
        series=recorder.series.result(),
        client=Client(
            late=summary(recorder.late),
            cpu_share=run.cpu_share,
            in_flight_max=recorder.in_flight_max,
            connections=run.connections,
            sent_again=run.sent_again,
            warnings=warnings(recorder, run.cpu_share),
        ),
        thresholds=[threshold.judge(total) for threshold in thresholds],
    )


def warnings(recorder: Recorder, cpu_share: float) -> list[str]:
    """Why latencies may be the client's own."""
    found = []
    late = recorder.late.percentile(99)
    if late > LATE_BOUND:
        found.append(
            f"client saturated: one request in a hundred went out {seconds(late)} or more after it was due; "
            "latencies include that: use less load, or more machines"
        )
    if cpu_share > CPU_BOUND:
        found.append(f"client saturated: it used {cpu_share:.0%} of a core; latencies may be its own")
    if unsent := recorder.total.group.errors.get("not_sent"):
        found.append(f"{unsent.count} requests were not sent, since the client had {next(iter(unsent.reasons))}")
    return found


def describe(load: Load) -> str:
    """The load in words."""
    bound = f"for {tick(load.duration)}"
    if load.requests < schedule.REQUESTS_MAX:
        bound = f"{number(load.requests)} requests in {tick(load.duration)} at most"
    if load.mode == schedule.CLOSED:
        return f"closed loop, {load.concurrency} callers, {bound}"
    if load.mode == schedule.TRACE:
        pace = f" from {tick(load.since)} on" if load.since else ""
        pace += "" if load.speed == 1 else f", {load.speed:g} times as fast"
        caps = [
            f"{name} cut at {cap}" for name, cap in (("prompts", load.cap_prompt), ("answers", load.cap_output)) if cap
        ]
        drawn = ", models and keys by a seeded draw" if len(load.models) > 1 or len(load.keys) > 1 else ""
        return f"open loop, trace {load.trace}{pace}, {bound}{''.join(f', {cap}' for cap in caps)}{drawn}"
    kind = "constant" if load.mode == schedule.CONSTANT else "Poisson"
    return f"open loop, {kind}, {load.rate:g} requests/s, {bound}"


def _load(options: Options) -> LoadPart:
    load = options.load
    return LoadPart(
        mode=load.mode,
        description=describe(load),
        api=options.shape.api,
        route=options.shape.route,
        stream=options.shape.stream,
        models=list(load.models),
        keys=list(load.keys),
        requests=load.requests,
        duration=load.duration,
        concurrency=load.concurrency,
        rate=load.rate,
        trace=load.trace,
        speed=load.speed,
        since=load.since,
        prompt_tokens=load.prompt_tokens.text if load.prompt_tokens else "",
        max_tokens=load.max_tokens.text if load.max_tokens else "",
        warmup=options.warmup,
        timeout=options.timeout,
        retry_after=options.retry_after,
        slo=options.objectives.given(),
        seed=load.seed,
    )
