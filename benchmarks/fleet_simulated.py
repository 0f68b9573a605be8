"""The whole product in real time beside the discrete-event run of the same requests on the same fleet.

HAProxy, two gateways, Valkey, control that leads and places, and simulated nodes (`corral.node.simulated`), each a
process of its own: what differs from the discrete events is that all of it is wired and takes its time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from fleet_played import Played, asked, percentile, piece, play
from fleet_plot import write
from support.fleet import SimulatedNode
from support.metrics import page
from support.process import until
from support.stack import Stack, stack

from corral.fleet.node import canonical_name
from corral.fleet.simulation import Outcome, Shape, Simulation
from corral.loadtest.schedule import Load
from corral.stack.state import StateFolder

CAP = 4000
"""Prompts are cut at so many tokens, which a node's default context holds."""
AGREES = 0.20


@dataclass(frozen=True)
class Piece:
    """A piece of the Azure trace at a share of its rate, from a time of the trace on (s), for a fleet."""

    rate: float
    shape: Shape
    since: float = 1200.0


PIECES = (Piece(0.5, Shape(room=2)), Piece(0.3, Shape(room=1)))


def described(shape: Shape, models: list[str]) -> dict[str, object]:
    """A node of this shape, as `corral serve node --simulated` reads it."""
    like = {"load": shape.load, "prefill": shape.prefill, "decode": shape.decode, "slots": shape.slots}
    return {"models": [{"name": name, **like} for name in models], "max_loaded": shape.room}


@contextmanager
def fleet(folder: Path, shape: Shape, models: list[str]) -> Iterator[tuple[Stack, list[SimulatedNode]]]:
    """The product before nodes of this shape, with nothing loaded, and a leader that has seen them."""
    with ExitStack() as exits:
        nodes = []
        for number in range(1, shape.nodes + 1):
            nodes.append(SimulatedNode(f"node-{number}", folder, described(shape, models)))
            exits.callback(nodes[-1].process.end)
        settings = {
            "gateway": {"processes": 2, "queue": {"length": 100_000, "wait": "1h"}, "access_log": ""},
            "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
            "nodes": [
                {"name": node.name, "url": node.url, "slots": shape.slots, "max_models": shape.room} for node in nodes
            ],
        }
        (folder / "corral.yaml").write_text(yaml.safe_dump(settings))
        made = exits.enter_context(stack(folder / "state", "--config", str(folder / "corral.yaml")))
        until(lambda: made.corral("status")["control"]["leader"], "control leads")
        assert not any(httpx.get(node.url + "/api/ps").json()["models"] for node in nodes)
        yield made, nodes


def loads_of(made: Stack, nodes: list[SimulatedNode], models: list[str]) -> int:
    """How often a model came into a node's memory, as control saw it."""
    url = (StateFolder(made.state).stack() or {})["control"]["metrics"]
    pages = [page(f"{url}/nodes/{node.name}") for node in nodes]
    return sum(
        int(one.value("corral_node_loads_total", model=canonical_name(name))) for one in pages for name in models
    )


def in_real_time(shape: Shape, load: Load) -> Played:
    """Play a load against the product."""
    models = [name for name, _ in load.models]
    with tempfile.TemporaryDirectory() as name, fleet(Path(name), shape, models) as (made, nodes):
        played = play(made.url, made.key, load)
        played.loads = loads_of(made, nodes, models)
    return played


def check(one: Piece, seconds: float, models: int, seed: int) -> tuple[bool, Outcome, Played]:
    """Run a piece both ways and print them side by side; whether they agree, and what came of each."""
    names = [f"model-{number + 1}" for number in range(models)]
    load = piece("azure", names, one.rate, one.since, seconds, CAP, seed)
    requests = asked(load)
    print(
        f"azure {one.rate:.0%} from {one.since:g} s on, room for {one.shape.room} of {models}: {len(requests)} requests"
        f" in {seconds:g} s, prompts cut at {CAP} tokens, seed {seed}"
    )
    model = Simulation(one.shape, names).run(requests)
    played = in_real_time(one.shape, load)
    return report(model, played, [request.prompt / one.shape.prefill for request in requests]), model, played


def report(model: Outcome, played: Played, read: Sequence[float]) -> bool:
    """Print both; whether the times to the first token agree. ``read``: how long each prompt takes (s)."""
    print(f"  {'seconds':34}{'first p50':>10}{'p95':>9}{'max':>9}{'waits p50':>12}{'p95':>9}{'loads':>8}")
    waits = [max(0.0, first - one) for first, one in zip(model.first, read, strict=True)]
    for name, first, queue, loads in (
        ("in discrete events", model.first, waits, model.loads),
        ("in real time, through the product", played.first, played.queue, played.loads),
    ):
        times = f"{percentile(first, 0.5):10.2f}{percentile(first, 0.95):9.2f}{max(first, default=0.0):9.2f}"
        print(f"  {name:34}{times}{percentile(queue, 0.5):12.2f}{percentile(queue, 0.95):9.2f}{loads:8}")
    off = [percentile(played.first, share) / percentile(model.first, share) - 1 for share in (0.5, 0.95)]
    held = not played.failed and all(abs(value) <= AGREES for value in off)
    for failure in sorted(set(played.failed)):
        print(f"  failed: {played.failed.count(failure)} x {failure}")
    print(
        f"  in real time p50 {off[0]:+.0%}, p95 {off[1]:+.0%}, at most {AGREES:.0%}: "
        f"{'agrees' if held else 'DOES NOT AGREE'} (the machine's cores were {played.busy:.0%} busy)\n"
    )
    return held


def main(seconds: float, models: int, seed: int, plot: Path | None) -> int:
    """Check every piece; 1 where one does not agree."""
    held, drawn = True, []
    for one in PIECES:
        agrees, model, played = check(one, seconds, models, seed)
        held = held and agrees
        room = f"room for {one.shape.room}"
        drawn += [(f"{room}, events", model.first), (f"{room}, real", played.first)]
    if plot:
        write(plot, f"azure, {models} models: discrete events and real time", drawn)
    return 0 if held else 1
