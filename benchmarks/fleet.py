"""What the fleet's scheduler makes of a real trace, beside other ways to balance, in discrete events.

A trace's arrivals are stretched to a share of their rate, their lengths kept, and each request gets a model by a seeded
Zipf draw; a conversation keeps its model where the trace shows one (Mooncake's). Corral's rows are the functions of
`corral.fleet` that the gateways and the leader run; nothing waits in real time. Prints the time to the first token
(seconds), the loads, and the ratio of the p95 to that of the same fleet with room for every model. Writes a plot
(`--plot`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "api-gateway")]

from balancers import Balanced, least_connections, residency, round_robin  # noqa: E402
from support.servers import valkey  # noqa: E402

from corral.fleet.ledger import Ledger  # noqa: E402
from corral.fleet.simulation import Asked, Outcome, Shape, Simulation  # noqa: E402
from corral.fleet.slots import PlaceState, step_of  # noqa: E402
from corral.fleet.tickets import Request  # noqa: E402
from corral.loadtest.charts import Axis, Line, lines  # noqa: E402
from corral.loadtest.schedule import zipf  # noqa: E402
from corral.loadtest.traces import load  # noqa: E402
from corral.store import keeper  # noqa: E402
from corral.store.slots import Slots, Wanted  # noqa: E402
from corral.store.valkey import Valkey  # noqa: E402

MODELS = 6
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")
DISPATCH = 20_000


@dataclass(frozen=True)
class Case:
    """A trace at a share of its rate, a fleet, and the bar: of the ratio to room for all, or of seconds."""

    trace: str
    rate: float
    shape: Shape
    ratio: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.trace} {self.rate:.0%}, room for {self.shape.room} of {MODELS}"


CASES = (
    Case("azure", 0.35, Shape(room=2), ratio=1.5),
    Case("azure", 0.50, Shape(room=2), ratio=2.5),
    Case("azure", 0.20, Shape(room=1), seconds=18.0),
    Case("mooncake", 0.20, Shape(room=2, cache=True)),
)


def asked(case: Case, seed: int) -> tuple[list[str], list[Asked]]:
    """The models, the most wanted first, and the requests."""
    weights = zipf([f"model-{number + 1}" for number in range(MODELS)], 1.0)
    names = [name for name, _ in weights]
    draw = random.Random(seed)
    begun: dict[int, str] = {}
    requests = []
    for one in load(case.trace):
        (model,) = draw.choices(names, [weight for _, weight in weights])
        # The next turn of a conversation goes where the last one did; the first block is what all of them begin with.
        model = next((begun[block] for block in reversed(one.blocks[1:]) if block in begun), model)
        begun.update(dict.fromkeys(one.blocks[1:], model))
        requests.append(Asked(one.at / case.rate, model, one.prompt_tokens, one.output_tokens, one.blocks))
    return names, requests


def at(outcome: Outcome, share: float) -> float:
    """A percentile of the time to the first token."""
    ordered = sorted(outcome.first)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(name: str, outcome: Outcome, best: float) -> str:
    """A line of the table."""
    times = [at(outcome, share) for share in (0.5, 0.95, 0.99)]
    shown = "".join(f"{value:10.2f}" for value in times)
    return f"  {name:32}{shown}{max(outcome.first):10.2f}{outcome.loads:8}{times[1] / best:11.2f}"


def compare(case: Case, seed: int, others: bool) -> tuple[list[tuple[str, Outcome]], bool]:
    """Run a case and print its table; what came of each row, and whether the bar holds."""
    names, requests = asked(case, seed)
    print(f"{case.name}: {len(requests):,} requests in {requests[-1].at / 60:.0f} min, seed {seed}")
    print(f"  {'time to first token, s':32}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}{'loads':>8}{'p95 ratio':>11}")
    runs = [("room for every model", Simulation(replace(case.shape, room=MODELS), names, resident=True).run(requests))]
    best = at(runs[0][1], 0.95)
    print(row(*runs[0], best))
    runs.append(("Corral", Simulation(case.shape, names).run(requests)))
    print(row(*runs[1], best), flush=True)
    if case.shape.cache:
        runs.append(("Corral, blind to prefixes", Simulation(case.shape, names, affinity=False).run(requests)))
        print(row(*runs[-1], best), flush=True)
    elif others:
        for name, choose in (
            ("residency alone", residency),
            ("least connections", least_connections),
            ("round robin", round_robin),
        ):
            runs.append((name, Balanced(case.shape, choose).run(requests)))
            print(row(*runs[-1], best), flush=True)
    found = at(runs[1][1], 0.95)
    held = True
    if case.ratio:
        held = found <= case.ratio * best
        print(f"  bar: p95 {found / best:.2f} x that with room for every model, at most {case.ratio}: {verdict(held)}")
    if case.seconds:
        held = found <= case.seconds
        print(f"  bar: p95 {found:.1f} s, at most {case.seconds:g} s: {verdict(held)}")
    print()
    return runs, held


def verdict(held: bool) -> str:
    """In words."""
    return "holds" if held else "DOES NOT HOLD"


def plot(title: str, runs: Sequence[tuple[str, Outcome]]) -> str:
    """An SVG: the share of requests (%) that had their first token after so many seconds at most."""
    series = []
    for number, (name, outcome) in enumerate(runs):
        ordered = sorted(max(0.01, value) for value in outcome.first)
        last = len(ordered) - 1
        points = [(ordered[last * step // 200], step / 2) for step in range(201)]
        series.append(Line(name, points, number))
    seconds = Axis("seconds to the first token", lambda value: f"{value:g}", log=True)
    drawn = lines(title, series, seconds, Axis("%", lambda value: f"{value:g}%", 0.0, 100.0))
    found = re.search(r"<svg viewBox=\"0 0 (\d+) (\d+)\"(.*?)>(.*)</svg>", drawn, re.S)
    assert found is not None
    width, height, rest, content = int(found[1]), int(found[2]), found[3], found[4]
    # Alone in a file, without the page that gives the report's charts their colours.
    styles = "".join(f".line.c{number}{{stroke:{colour}}}" for number, colour in enumerate(COLOURS))
    styles += ".line{fill:none;stroke-width:2}.grid{stroke:#ddd}.axis,.tick{stroke:#888}.hit circle{fill:none}"
    legend = "".join(
        f'<path class="line c{number}" d="M{at_x} {height + 12}h18"/>'
        f'<text x="{at_x + 23}" y="{height + 16}">{name}</text>'
        for number, (name, _) in enumerate(runs)
        for at_x in [20 + number * 118]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -20 {width} {height + 45}"{rest}>'
        f"<style>{styles}text{{font:11px sans-serif;fill:#333}}</style>"
        f'<rect y="-20" width="100%" height="100%" fill="#fff"/><text x="20" y="-5">{title}</text>'
        f"{content}{legend}</svg>\n"
    )


def dispatch() -> bool:
    """What a decision costs (CPU us): a slot asked for and given back, and one that has to wait; fleets of any size."""
    print(f"  {'a decision, us of CPU':32}{'a slot':>10}{'a ticket':>10}")
    worst = 0.0
    for nodes in (10, 100, 1000):
        ledger = Ledger(queue_length=1 << 20)
        models = [f"model-{number}" for number in range(100)]
        for node in range(nodes):
            for model in models[node % 10 :: 10]:
                ledger.place(f"node-{node}", model, PlaceState.RESIDENT, 1, 0.0, 4, step_of(4, 0, 0))
        draw = random.Random(0)
        # Half of what there is runs already, and a few wait.
        for number in range(nodes * 20):
            ledger.ask(Request(f"busy{number}", "g", models[number % 100]), (), 0.0)
        requests = [Request(f"r{n}", "g", draw.choice(models), f"key{n % 50}", 1000, 4.0) for n in range(DISPATCH)]
        began = time.process_time()
        for request in requests:
            ledger.ask(request, (), 1.0)
            ledger.release(request.id, 1.0)
        slot = (time.process_time() - began) / DISPATCH * 1e6
        full = [Request(f"full{n}", "g", models[n % 100]) for n in range(nodes * 40)]
        for request in full:
            ledger.ask(request, (), 1.0)
        began = time.process_time()
        for request in requests:
            ledger.ask(request, (), 2.0)
        ticket = (time.process_time() - began) / DISPATCH * 1e6
        print(f"  {nodes:5} nodes, 100 models{'':10}{slot:10.1f}{ticket:10.1f}", flush=True)
        worst = max(worst, slot, ticket)
    print(f"  bar: {worst:.1f} us, at most 50: {verdict(worst <= 50)}")
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder)) as server:
        for nodes in (10, 1000):
            us = asyncio.run(in_store(server.url, nodes))
            print(f"  in Valkey, {nodes:4} nodes, 100 models {us[0]:12.1f}{us[1]:10.1f}", flush=True)
    return worst <= 50


async def in_store(url: str, nodes: int) -> tuple[float, float]:
    """What Valkey spends (us, as it accounts it) on a slot asked for and given back, and on a ticket."""
    store = Valkey(url, scripts=keeper.SCRIPTS, timeout=30.0)
    mine = Slots(store, "g")
    running = asyncio.create_task(store.run())
    while not store.connected:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await store.request(b"FLUSHALL")
    await store.request(b"SET", keeper.GRANTS, b"1")
    for node in range(nodes):
        for number in range(node % 10, 100, 10):
            await keeper.place(store, f"node-{node}", f"model-{number}", "resident", 1, 4, step_of(4, 0, 0))
    draw = random.Random(0)
    found = []
    for full in (False, True):
        for number in range(nodes * 40 if full else 0):
            mine.ask(Wanted(f"full{number}", f"model-{number % 100}"), lambda answer: None)
        await store.request(b"PING")
        await store.request(b"CONFIG", b"RESETSTAT")
        for number in range(2000):
            name = f"r{number}-{full}"
            model, node = f"model-{draw.randrange(100)}", f"node-{draw.randrange(nodes)}"
            mine.ask(Wanted(name, model, key=f"key{number % 50}", preferred=(node,)), lambda answer: None)
            if not full:
                mine.end(name)
            if number % 100 == 0:
                await store.request(b"PING")
        await store.request(b"PING")
        text = (await store.request(b"INFO", b"commandstats")).decode()
        spent = re.search(r"cmdstat_evalsha:calls=\d+,usec=(\d+)", text)
        assert spent is not None
        found.append(int(spent[1]) / 2000)
    running.cancel()
    return found[0], found[1]


def main() -> int:
    """Print the tables, write the plot; 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the models' draw (0)")
    parser.add_argument("--plot", type=Path, help="where to write the plot of the first case (SVG)")
    parser.add_argument("--alone", action="store_true", help="without the other ways to balance")
    given = parser.parse_args()
    held = True
    for number, case in enumerate(CASES):
        runs, holds = compare(case, given.seed, not given.alone)
        held = held and holds
        if not number and given.plot:
            given.plot.write_text(plot(case.name, runs), encoding="utf-8")
    return 0 if dispatch() and held else 1


if __name__ == "__main__":
    sys.exit(main())
