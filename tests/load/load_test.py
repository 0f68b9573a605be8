#!/usr/bin/env python3
"""A simple load test: callers that ask again once answered; average, deviation and percentiles of each batch.

    CORRAL_KEY=crl_… tests/load/load_test.py --url http://127.0.0.1:8080 --model smollm2:135m --concurrency 10 --requests 100

Runs in the checkout's own environment, which it makes on first use. `corral loadtest run` can do more.
Exit status: 0 all requests were answered whole, 1 some were not, 2 wrong usage.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def own_environment() -> None:
    """Go on in the checkout's environment, made where there is none."""
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        subprocess.run([ROOT / "scripts" / "setup"], check=True)
        python = str(ROOT / ".venv" / "bin" / "python")
        os.execv(python, [python, *sys.argv])
    sys.path.insert(0, str(ROOT / "api-gateway"))


def arguments() -> argparse.Namespace:
    """The command line."""
    said = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="load_test.py", description=said[0], epilog="The key is read from CORRAL_KEY."
    )
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8080")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=10, help="callers at once (default 10)")
    parser.add_argument("--requests", type=int, default=100, help="in all (default 100)")
    parser.add_argument("--batch", type=int, help="requests in a batch (default: as many as callers)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take (default 120)")
    parser.add_argument("--i-may-load", metavar="HOST", help="another machine; CORRAL_LOADTEST_ALLOW must name it too")
    given = parser.parse_args()
    for name in ("concurrency", "requests", "batch", "prompt_tokens", "max_tokens", "timeout"):
        value = getattr(given, name)
        if value is not None and not 0 < value <= 1_000_000:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if given.concurrency > 10_000:
        parser.error("--concurrency is at most 10000")
    if not os.environ.get("CORRAL_KEY", "").strip():
        parser.error("no key: set CORRAL_KEY")
    return given


def main() -> int:
    """Run it."""
    given = arguments()
    from corral.loadtest import arguments as words
    from corral.loadtest import guard, lengths
    from corral.loadtest.answers import CANCELLED, KINDS, OK
    from corral.loadtest.client import Answer
    from corral.loadtest.errors import LoadTestError
    from corral.loadtest.histogram import Histogram
    from corral.loadtest.requests import Shape
    from corral.loadtest.run import Options, run
    from corral.loadtest.schedule import CLOSED, Load
    from corral.loadtest.units import seconds

    size = given.batch or given.concurrency
    columns = "{:>9} {:>9} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>12}"

    def show(name: str, failed: int, end: Histogram, first: Histogram) -> None:
        figures = [end.mean, end.deviation, *end.percentiles((50, 90, 95, 99)), first.percentile(50)]
        shown = [seconds(figure) for figure in figures] if end.count else ["-"] * 7
        print(columns.format(name, end.count, failed, *shown), flush=True)

    whole_end, whole_first, batch_end, batch_first = (Histogram() for _ in range(4))
    counts = {"batch": 0, "failed": 0, "seen": 0, "batch failed": 0}

    def seen(answer: Answer, due: float) -> None:
        nonlocal batch_end, batch_first
        if answer.kind == CANCELLED:
            return
        counts["seen"] += 1
        if answer.kind == OK:
            for histogram in (batch_end, whole_end):
                histogram.add(answer.ended - due)
            for histogram in (batch_first, whole_first) if answer.reader.times else ():
                histogram.add(answer.reader.times[0] - due)
        else:
            counts["failed"] += 1
            counts["batch failed"] += 1
        if counts["seen"] % size == 0 or counts["seen"] == given.requests:
            counts["batch"] += 1
            show(str(counts["batch"]), counts["batch failed"], batch_end, batch_first)
            batch_end, batch_first, counts["batch failed"] = Histogram(), Histogram(), 0

    try:
        (key, *_) = words.keys((), os.environ, False)
        target = guard.target(given.url, given.i_may_load, os.environ)
        load = Load(
            CLOSED, ((given.model, 1.0),), (key[0],), given.requests, words.DURATION_MAX, given.concurrency,
            prompt_tokens=lengths.parse(str(given.prompt_tokens)), max_tokens=lengths.parse(str(given.max_tokens)),
        )  # fmt: skip
        options = Options(
            target, Shape(target, "native", "chat", True), load, (key[1],), warmup=1, timeout=given.timeout,
            tls=words.tls(target.tls, None),
        )  # fmt: skip
        print(f"{given.requests} requests by {given.concurrency} callers to {given.model} at {target.url}")
        print(
            columns.format(
                "batch", "whole", "failed", "average", "deviation", "p50", "p90", "p95", "p99", "first token"
            )
        )
        done = run(options, seen=seen)
    except LoadTestError as error:
        print(f"load_test.py: {error}", file=sys.stderr)
        return 1
    if counts["seen"] % size and done.interrupted:
        show("rest", counts["batch failed"], batch_end, batch_first)
    show("all", counts["failed"], whole_end, whole_first)
    group = done.recorder.total.result(done.recorder.window, False)
    print(f"{group.requests_per_s:.2f} requests/s, {group.output_tokens_per_s:.1f} tokens/s; first token: the median")
    for kind, error in group.errors.items():
        print(f"{kind}: {error.count} ({KINDS[kind]}): {', '.join(error.reasons)}", file=sys.stderr)
    return 1 if group.failed or done.interrupted or not group.ok else 0


if __name__ == "__main__":
    own_environment()
    sys.exit(main())
