"""What a request costs the load test's client, beside httpx: CPU of the client, which is measured as latency.

A closed loop of callers; the answers are canned streams of HAProxy (`http-request return`) of two lengths, so that
the costs of a request and of a token come apart. Both clients run on uvloop and hand the bytes to the same reader.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "api-gateway")]

import httpx  # noqa: E402
import uvloop  # noqa: E402
from support import servers  # noqa: E402
from support.process import Process, free_port  # noqa: E402

from corral.loadtest import answers, guard  # noqa: E402
from corral.loadtest.client import Client  # noqa: E402
from corral.loadtest.requests import Shape  # noqa: E402
from corral.stack import binaries  # noqa: E402

TOKENS = (8, 256)
LINE = (
    b'{"model":"m","created_at":"2026-11-23T15:00:00Z","message":{"role":"assistant","content":" word"},"done":false}\n'
)
LAST = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"eval_count":%d}\n'
NODE = """
global
    nbthread 1
    tune.bufsize 65536
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option http-buffer-request
frontend node
    bind 127.0.0.1:{port}
    http-request return status 200 content-type application/x-ndjson file {canned}
"""
Ask = Callable[[], Awaitable[None]]


def take(kind: str, reader: answers.Reader, tokens: int) -> None:
    """Stop where an answer was not what it should be."""
    if kind != answers.OK or len(reader.times) != tokens:
        raise SystemExit(f"a wrong answer: {kind}, {len(reader.times)} tokens")


async def loop(ask: Ask, callers: int, seconds: float) -> tuple[float, float]:
    """(CPU microseconds of this process a request, median milliseconds of a request)."""
    end, times = time.perf_counter() + seconds, []

    async def caller() -> None:
        while (start := time.perf_counter()) < end:
            await ask()
            times.append(time.perf_counter() - start)

    cpu = time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return (time.process_time() - cpu) / len(times) * 1e6, statistics.median(times) * 1e3


async def own(port: int, tokens: int, callers: int, seconds: float) -> tuple[float, float]:
    """The load test's client."""
    target = guard.target(f"http://127.0.0.1:{port}", None, {})
    shape, client = Shape(target, "native", "chat", True), Client(target)
    request = shape.post(shape.body("m", "word " * 64, tokens), "key", "r")

    async def ask() -> None:
        reader = answers.reader("native", True)
        answer = await client.ask(request, reader, 60.0)
        take(answer.kind, reader, tokens)

    found = await loop(ask, callers, seconds)
    await client.close()
    return found


async def general(port: int, tokens: int, callers: int, seconds: float) -> tuple[float, float]:
    """httpx, told to keep a connection for each caller."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "word " * 64}]}
    async with httpx.AsyncClient(limits=limits, timeout=60.0, trust_env=False) as client:

        async def ask() -> None:
            reader = answers.reader("native", True)
            url, headers = f"http://127.0.0.1:{port}/api/chat", {"Authorization": "Bearer key", "X-Request-ID": "r"}
            async with client.stream("POST", url, json=body, headers=headers) as response:
                async for data in response.aiter_raw():
                    reader.feed(data, time.perf_counter())
            take(reader.finish(True, time.perf_counter())[0], reader, tokens)

        return await loop(ask, callers, seconds)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="benchmarks/client", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.callers} callers, median of {options.rounds} rounds of {options.seconds:g} s")
    print(f"  {'':12}{'tokens':>8}{'us/request':>13}{'p50 ms':>9}")
    costs: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as name:
        for tokens in TOKENS:
            folder, port = Path(name) / str(tokens), free_port()
            folder.mkdir()
            (folder / "canned").write_bytes(LINE * tokens + LAST % tokens)
            (folder / "node.cfg").write_text(NODE.format(port=port, canned=folder / "canned"))
            process = Process([binaries.haproxy(), "-db", "-f", folder / "node.cfg"], folder / "node.log")
            try:
                process.wait_until(lambda port=port: servers.answers(f"http://127.0.0.1:{port}/"))
                for title, client in (("load test", own), ("httpx", general)):
                    found = []
                    for _ in range(options.rounds):
                        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                            found.append(runner.run(client(port, tokens, options.callers, options.seconds)))
                    cost, half = (statistics.median(column) for column in zip(*found, strict=True))
                    costs[title, tokens] = cost
                    print(f"  {title:12}{tokens:8}{cost:13.0f}{half:9.2f}", flush=True)
            finally:
                process.end()
    few, many = TOKENS
    for title in ("load test", "httpx"):
        each = (costs[title, many] - costs[title, few]) / (many - few)
        print(f"  {title}: {costs[title, few] - few * each:.0f} us a request and {each:.2f} us a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
