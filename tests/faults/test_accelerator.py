"""A node's GPU is gone, and Ollama goes on with the CPU: it is said, and traffic goes to others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from support.fleet import MODEL, SIMULATION, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.load import CHAT, WHOLE, Load
from support.process import until

from corral.fleet.dispatch import SAMPLE_MIN
from corral.fleet.fallback import SAMPLES

LIAR = "liar:latest"
FALLBACK = "corral_node_cpu_fallback"
SCRAPE = 15.0
"""Seconds between two looks of Prometheus."""
CALLERS = 3
"""Of the slow model: when the last slow stream that it takes has ended, others run, and may end before it is said."""


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose nodes say that models are in a GPU's memory; nothing of it was declared."""
    folder = tmp_path_factory.mktemp("gpus")
    models = [*SIMULATION["models"], {"name": LIAR, "load": 0.1, "prefill": 5000.0, "decode": 100.0, "slots": 64}]
    simulation = {"models": models, "gpu": True, "max_loaded": 9}
    nodes = [SimulatedNode(f"node-{number}", folder, simulation) for number in (1, 2)]
    with run_fleet(folder, "20s", nodes=nodes, canary="1s") as made:
        made.all_ready()
        made.stack.until_continued(MODEL)
        yield made


def heard_of(fleet: Fleet, load: Load, said: float) -> None:
    """Wait until gateways have heard what was said: within half a second control puts it into what it tells them."""
    load.until(lambda _: time.monotonic() > said + 1.5 and fleet.heard(), "gateways have heard")


def test_a_node_that_falls_back_to_its_cpu_is_said_and_avoided(
    on_gpus: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    node = on_gpus.nodes["node-1"]
    assert on_gpus.node_says("node-1", FALLBACK) == 0
    with on_gpus.load(clients=8, paths=[CHAT], tokens=[10], name="cpu", fresh=True) as load:
        load.more(8, "node-1")
        node.fault(kind="cpu", delay=0.3)
        fell = time.monotonic()
        until(lambda: on_gpus.node_says("node-1", FALLBACK) == 1, "it is said", SCRAPE, every=0.1)
        said = time.monotonic() - fell
        # Streams that run there end there.
        heard_of(on_gpus, load, fell + said)
        settled = time.monotonic()
        load.more(40)
        avoided = time.monotonic()
        states, reasons = on_gpus.states(), on_gpus.reasons()
        # Where all have fallen back, all are used.
        on_gpus.nodes["node-2"].fault(kind="cpu", delay=0.3)
        load.more(8, "node-1")
        for each in on_gpus.nodes.values():
            each.well()
        load.more(8, "node-1")
    assert load.unlike(WHOLE) == []
    assert {a.node for a in load.answers if settled < a.began < avoided} == {"node-2"}
    assert (states["node-1"], "runs on its CPU" in reasons["node-1"]) == ("ready", True)
    until(lambda: on_gpus.node_says("node-1", FALLBACK) == 0, "it is over")
    measured = f"in {said:.1f} s, then 0 of {sum(settled < a.began < avoided for a in load.answers)} requests on it"
    matrix("GPU lost, node goes on with its CPU", "<= 1 scrape (15 s), traffic to others", measured)


def test_a_node_that_says_nothing_of_its_cpu_is_known_by_its_speed(
    on_gpus: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    node = on_gpus.nodes["node-1"]
    for each in on_gpus.nodes.values():
        httpx.post(each.url + "/api/generate", json={"model": LIAR, "keep_alive": -1}).raise_for_status()
    until(lambda: on_gpus.residents(LIAR) == {"node-1", "node-2"}, "both have it")
    with on_gpus.load(LIAR, clients=CALLERS, paths=[CHAT], tokens=[SAMPLE_MIN + 1], name="liar", fresh=True) as load:
        load.more(5 * SAMPLES, "node-1")
        node.fault(kind="slow", delay=0.3, model=LIAR)
        fell = time.monotonic()
        until(lambda: on_gpus.node_says("node-1", FALLBACK) == 1, "it is said", 120, every=0.2)
        said = time.monotonic() - fell
        heard_of(on_gpus, load, fell + said)
        settled = time.monotonic()
        load.more(40)
        avoided = time.monotonic()
        sizes = [on_gpus.node_says("node-1", f"corral_node_model_{one}_bytes", model=LIAR) for one in ("size", "vram")]
        reason = on_gpus.reasons()["node-1"]
        # Nobody uses it, and control sees by itself that it is as fast as it was.
        node.well()
        well = time.monotonic()
        until(lambda: on_gpus.node_says("node-1", FALLBACK) == 0, "it is over", 60, every=0.2)
        back = time.monotonic() - well
        load.more(4, "node-1")
    assert load.unlike(WHOLE) == []
    assert {a.node for a in load.answers if settled < a.began < avoided} == {"node-2"}
    slow = [a for a in load.answers if a.node == "node-1" and fell < a.began and a.ended < fell + said]
    # Those that ran when it fell were slow too, or were not.
    assert SAMPLES - CALLERS <= len(slow) < SAMPLES + CALLERS
    assert sizes[0] == sizes[1] > 0, "its word says more than its speed"
    assert "as if it ran on its CPU" in reason
    measured = f"by {len(slow)}, in {said:.0f} s, then 0 of {sum(settled < a.began < avoided for a in load.answers)} "
    measured += f"requests on it; back in {back:.0f} s"
    bar = f"by {SAMPLES} slow streams, and up to {CALLERS - 1} that are in flight then"
    matrix("GPU lost, /api/ps says nothing of it", bar, measured)
