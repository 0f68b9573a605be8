"""CPU per request: the gateway with all its features on, beside HAProxy, on one core in one run.

A POST of 1 KB with ``stream: false``, 32 connections, a canned answer. The proxy that is measured has core 0 alone;
the load (wrk), the node that gives the canned answer (HAProxy's ``http-request return``), Valkey and a control that
takes the spool share core 1. Subjects alternate within each round; each figure is the median of the rounds.

CPU is user + system time of the measured process as the kernel accounts it (/proc/PID/task/*/schedstat, ns), so what
a subject makes Valkey do is not in its figure: it is shown beside. Two loads:

- ``same rate``: all subjects get the same requests a second, paced by a schedule, so that the load's core stays
  under 80%. The ratio that counts: it ends with status 1 where the gateway's is under the bar.
- ``closed loop``: each connection asks again at once; HAProxy, and the gateway by what Valkey does for it, are then
  limited by the load's core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPILED = ROOT / ".venv" / "compiled" / "api-gateway"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "api-gateway")]

import yaml  # noqa: E402
from standin import Control, ControlServer  # noqa: E402
from support.leader import Leader  # noqa: E402
from support.process import Process, free_port, until  # noqa: E402
from unrecorded import unrecorded  # noqa: E402

from corral.config.haproxy import DEFAULT, render  # noqa: E402
from corral.stack import binaries  # noqa: E402
from corral.store import keys  # noqa: E402
from corral.store.keeper import GRANTS, POLL  # noqa: E402

MEASURED, LOAD = 0, 1
CONNECTIONS = 32
BAR = 0.45
"""What the gateway's ratio has to be at the same rate, with all its features on."""
FULL = 0.8
"""From here on the load's core is the limit, and requests wait for it: no figure is the gateway's alone."""
GATEWAY = "gateway"
SKETCH = "a bare sketch in Python"
SYNCED = "gateway, synced"
NO_HASHES = "gateway, no hashes"
NO_RECORD = "gateway, no record"
LINES = (
    b'{"model":"m:latest","created_at":"2026-11-23T15:00:00.000000Z","message":{"role":"assistant","content":"Hello"},'
    b'"done":false}\n'
    b'{"model":"m:latest","created_at":"2026-11-23T15:00:00.100000Z","message":{"role":"assistant","content":""},'
    b'"done":true,"done_reason":"stop","total_duration":100000000,"load_duration":1000000,"prompt_eval_count":250,'
    b'"prompt_eval_duration":50000000,"eval_count":2,"eval_duration":20000000}\n'
)
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
PLAIN = """
global
    nbthread 1
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option http-no-delay
    option abortonclose
frontend proxy
    bind 127.0.0.1:{port}
    default_backend node
backend node
    http-reuse safe
    server node 127.0.0.1:{node}
"""
WRK = """
local ffi = require("ffi")
ffi.cdef[[ typedef struct { long s; long n; } corral_ts; int clock_gettime(int, corral_ts*); ]]
local ts = ffi.new("corral_ts")
local rate, due = tonumber(os.getenv("RATE") or "0"), nil
if rate > 0 then
  -- One schedule for all connections: who is late sends at once, so the rate holds and not the pause.
  function delay()
    ffi.C.clock_gettime(1, ts)
    local now = tonumber(ts.s) + tonumber(ts.n) / 1e9
    if not due or due < now - 0.1 then due = now end
    due = due + 1 / rate
    return math.max(0, math.floor((due - now) * 1000 + 0.5))
  end
end
wrk.method = "POST"
wrk.headers["Authorization"] = os.getenv("AUTHORIZATION")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-Forwarded-For"] = "192.0.2.7"
wrk.body = os.getenv("BODY")
"""


@dataclass
class Subject:
    """Something that is measured: its process, its port, and its figures, one a round."""

    name: str
    port: int
    process: Process
    cost: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    valkey: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where the request goes."""
        return f"http://127.0.0.1:{self.port}/api/chat"


def cpu(pid: int) -> float:
    """Microseconds of CPU that a process has used."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e3


def wrk(subject: Subject, seconds: int, rate: int, env: dict[str, str], script: Path) -> tuple[int, float, float]:
    """Requests answered, seconds it took, and CPU microseconds of wrk itself."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        ["taskset", "-c", str(LOAD), "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", script, subject.url],
        env=os.environ | env | {"RATE": str(rate)},
        capture_output=True,
        text=True,
        check=True,
    )
    after, elapsed = os.times(), time.monotonic() - began
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise SystemExit(f"{subject.name} failed requests:\n{done.stdout}")
    found = re.search(r"(\d+) requests in", done.stdout)
    if not found:
        raise SystemExit(f"wrk said nothing of use:\n{done.stdout}{done.stderr}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return int(found[1]), elapsed, used * 1e6


def gateways(
    folder: Path, node: int, store: str, control: int, python: str, packages: dict[str, Path]
) -> tuple[dict[str, tuple[int, Process]], str]:
    """Gateways as `corral up` starts them, one a package: port and process of each, and a key that has limits."""
    (folder / "pepper").write_text(secrets.token_hex(32))
    (folder / "internal.token").write_text(secrets.token_hex(32))
    key_id, text = keys.generate()
    verifier = keys.verifier(keys.read_pepper(folder / "pepper"), text)
    limits = {"rpm": 100_000_000, "concurrency": 1000, "tpm": 10**12, "daily_tokens": 10**15, "monthly_tokens": 10**15}
    tags = [{"name": "m:latest", "model": "m:latest", "modified_at": "2026-11-23T15:00:00Z"}]
    nodes = [
        {"name": f"node-{number}", "url": f"http://127.0.0.1:{node}", "slots": 32, "state": "ready"}
        | {"version": "0.17.4", "tags": tags, "ps": tags}
        for number in (1, 2)
    ]
    key = {"id": key_id, "name": "load", "role": "inference", "verifiers": [verifier], "models": ["*"], **limits}
    Control.snapshot = json.dumps({"version": "1", "keys": [key], "nodes": nodes, "models": []}).encode()
    started = {}
    for number, (name, package) in enumerate(packages.items(), 1):
        port = free_port()
        settings: dict[str, Any] = {
            "gateway": {
                "listen": f"127.0.0.1:{port}",
                "name": f"gateway-{number}",
                "metrics": "",
                "nodes_url": f"http://127.0.0.1:{node}",
                "control_url": f"http://127.0.0.1:{control}",
                "spool": str(folder / "spool"),
                "cache": str(folder / "cache"),
                "access_log": str(folder / f"access-{number}.log"),
            },
            "store": {"valkey": store},
            "audit": {
                "durability": "synced" if name == SYNCED else "written",
                "content": "none" if name in (NO_HASHES, NO_RECORD) else "hash",
            },
            "auth": {"pepper_file": str(folder / "pepper"), "internal_token_file": str(folder / "internal.token")},
        }
        file = folder / f"corral-{number}.yaml"
        file.write_text(yaml.safe_dump(settings))
        path = os.pathsep.join([str(package), *(entry for entry in sys.path if "site-packages" in entry)])
        argv = [python, "-m", "corral", "serve", "gateway", "--config", str(file)]
        started[name] = port, Process(argv, folder / f"gateway-{number}.log", {"PYTHONPATH": path}, cpu=MEASURED)
    return started, text


@contextlib.contextmanager
def subjects(
    folder: Path, framework: bool, sketch: bool, python: str, more: dict[str, Path]
) -> Iterator[tuple[list[Subject], list[Process], str]]:
    """All processes: the subjects (the gateway last), the others with Valkey first, the gateway's key."""
    with contextlib.ExitStack() as stack:

        def start(argv: list[str], name: str, core: int) -> Process:
            process = Process(argv, folder / f"{name}.log", cpu=core)
            stack.callback(process.end)
            return process

        def proxy(config: str, name: str, core: int) -> Process:
            (folder / f"{name}.cfg").write_text(config)
            return start([binaries.haproxy(), "-db", "-f", str(folder / f"{name}.cfg")], name, core)

        (folder / "canned").write_bytes(LINES)
        node, plain, edge, store = (free_port() for _ in range(4))
        server = ControlServer(("127.0.0.1", 0), Control)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        os.sched_setaffinity(0, {LOAD})
        valkey = start([binaries.valkey(), "--port", str(store), "--save", "", "--appendonly", "no"], "valkey", LOAD)
        back_end = proxy(NODE.format(port=node, canned=folder / "canned"), "node", LOAD)
        found = [Subject("HAProxy", plain, proxy(PLAIN.format(port=plain, node=node), "plain", MEASURED))]
        plan = replace(DEFAULT, edge_port=edge, nodes_port=free_port(), stats_port=free_port())
        plan = replace(plan, stats_socket=str(folder / "s.sock"), gateways=[("gateway-1", "127.0.0.1", node)])
        config = render(replace(plan, control=("127.0.0.1", node))).replace("global\n", "global\n    nbthread 1\n", 1)
        found.append(Subject("HAProxy, Corral's edge", edge, proxy(config, "edge", MEASURED)))
        if framework:
            port = free_port()
            argv = [sys.executable, str(ROOT / "benchmarks" / "framework.py"), str(port), str(node)]
            found.append(Subject("FastAPI and httpx", port, start(argv, "framework", MEASURED)))
        if sketch:
            port = free_port()
            argv = [python, str(ROOT / "benchmarks" / "sketch.py"), *map(str, (port, node, store, folder / "sketch"))]
            path = os.pathsep.join(entry for entry in sys.path if "site-packages" in entry)
            process = Process(argv, folder / "sketch.log", {"PYTHONPATH": path}, cpu=MEASURED)
            stack.callback(process.end)
            found.append(Subject(SKETCH, port, process))
        packages = {
            "gateway, not compiled": ROOT / "api-gateway",
            GATEWAY: COMPILED,
            **more,
        }
        started, key = gateways(folder, node, f"redis://127.0.0.1:{store}/0", server.server_port, python, packages)
        for name, (port, process) in started.items():
            stack.callback(process.end)
            found.append(Subject(name, port, process))
        for subject in found:
            until(lambda port=subject.port: listens(port), f"{subject.name} listens", 30)  # type: ignore[misc]
        # A slot for each request, in the same call as the limits.
        leader = Leader(f"redis://127.0.0.1:{store}/0")
        until(lambda: leader.ask(b"EXISTS", GRANTS), "the store grants slots", 30)
        leader.leads()
        for number in (1, 2):
            leader.place(f"node-{number}", "m:latest", 32)
        time.sleep(2 * POLL)  # gateways look so often whether there is a leader
        yield found, [valkey, back_end], key


def listens(port: int) -> bool:
    """Whether the port takes connections."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), 1)):
        return True


def measure(found: list[Subject], others: list[Process], seconds: int, rate: int, env: dict[str, str], script: Path):
    """One round: each subject once."""
    for subject in found:
        before, rest = cpu(subject.process.pid), [cpu(other.pid) for other in others]
        count, elapsed, load = wrk(subject, seconds, rate, env, script)
        used = [cpu(other.pid) - start for other, start in zip(others, rest, strict=True)]
        subject.cost.append((cpu(subject.process.pid) - before) / count)
        subject.rate.append(count / elapsed)
        subject.valkey.append(used[0] / count)
        subject.load.append((load + sum(used)) / elapsed / 1e6)


def report(found: list[Subject], title: str, paced: bool) -> dict[str, float]:
    """Print a table; each subject's ratio to HAProxy by its name, 0.0 for the gateway's where its load had no room."""
    print(f"\n{title}")
    print(f"  {'':24}{'us/request':>11}{'requests/s':>12}{'Valkey us':>11}{'load core':>11}{'ratio':>8}")
    base = statistics.median(found[0].cost)
    ratios = {}
    for subject in found:
        cost = statistics.median(subject.cost)
        ratios[subject.name] = base / cost
        print(
            f"  {subject.name:24}{cost:11.1f}{statistics.median(subject.rate):12,.0f}"
            f"{statistics.median(subject.valkey):11.1f}{statistics.median(subject.load):11.0%}{base / cost:8.2f}"
        )
    if SKETCH in ratios:
        print(f"  the gateway costs {ratios[SKETCH] / ratios[GATEWAY]:.2f} times the sketch")
    for name in (NO_RECORD, NO_HASHES):
        if name in ratios:
            print(f"  beside '{name}': {_share(found, GATEWAY, name)}")
    if SYNCED in ratios:
        print(f"  '{SYNCED}' beside '{GATEWAY}': {_share(found, SYNCED, GATEWAY)}")
    busy = next(statistics.median(subject.load) for subject in found if subject.name == GATEWAY)
    if paced and busy >= FULL:
        ratios[GATEWAY] = 0.0
        print(f"  the load's core was busy for {busy:.0%} of the time ({FULL:.0%} is the most): take a lower --rate")
    for subject in found:
        subject.cost, subject.rate, subject.valkey, subject.load = [], [], [], []
    return ratios


def _share(found: list[Subject], of: str, without: str) -> str:
    """What a gateway's CPU and requests are more and fewer than those of one without something, by the medians."""
    named = {subject.name: subject for subject in found}
    whole, other = named[of], named[without]
    cost = 1 - statistics.median(other.cost) / statistics.median(whole.cost)
    rate = 1 - statistics.median(whole.rate) / statistics.median(other.rate)
    return f"{cost:.1%} of its CPU and {rate:.1%} of its requests a second"


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="benchmarks/request", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="per subject and round")
    parser.add_argument("--rate", type=int, default=2_500, help="requests a second of the paced load")
    parser.add_argument("--framework", action="store_true", help="a FastAPI and httpx proxy too")
    parser.add_argument("--sketch", action="store_true", help="the least that a gateway in Python can be, too")
    parser.add_argument("--python", default=sys.executable, help="the gateway's interpreter")
    parser.add_argument("--synced", action="store_true", help="a gateway with audit.durability: synced too")
    parser.add_argument("--record", action="store_true", help="gateways without the record and its hashes too")
    parser.add_argument("--beside", type=Path, help="a gateway of another checkout too: its folder with the package")
    options = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        parser.error("two cores are needed: one for what is measured, one for the load")
    if subprocess.run(["which", "wrk"], capture_output=True, check=False).returncode:
        parser.error("wrk is not installed: apt-get install wrk")
    pad = "lorem ipsum dolor " * 50
    body = {"model": "m", "messages": [{"role": "user", "content": pad}], "stream": False}
    more = {SYNCED: COMPILED} if options.synced else {}
    more |= {NO_HASHES: COMPILED} if options.record else {}
    more |= {"gateway, the other": options.beside.resolve()} if options.beside else {}
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        if options.record:
            more[NO_RECORD] = unrecorded(Path(name))
        made = stack.enter_context(subjects(Path(name), options.framework, options.sketch, options.python, more))
        found, others, key = made
        script = Path(name) / "load.lua"
        script.write_text(WRK)
        env = {"AUTHORIZATION": f"Bearer {key}", "BODY": json.dumps(body | {"options": {"num_predict": 16}})}
        print(f"{options.rounds} rounds of {options.seconds} s; a body of {len(env['BODY'])} bytes")
        ratios = []
        for title, rate in (("same rate", options.rate), ("closed loop", 0)):
            measure(found, others, 1, rate, env, script)
            for subject in found:
                subject.cost, subject.rate, subject.valkey, subject.load = [], [], [], []
            for _ in range(options.rounds):
                measure(found, others, options.seconds, rate, env, script)
            ratios.append(report(found, f"{title}: {rate:,} a second" if rate else title, rate > 0)[GATEWAY])
    print(f"\nbar: {BAR} of HAProxy at the same rate: {'holds' if ratios[0] >= BAR else 'missed'}")
    return 0 if ratios[0] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
