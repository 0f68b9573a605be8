"""What the fleet's scheduler makes of a real trace, beside other ways to balance, in discrete events.

A trace's arrivals are stretched to a share of their rate, their lengths kept, and each request gets a model by a seeded
Zipf draw; a conversation keeps its model where the trace shows one (Mooncake's). Corral's rows are the functions of
`corral.fleet` that the gateways and the leader run; nothing waits in real time. Prints the time to the first token
(seconds), the loads, and the ratio of the p95 to that of the same fleet with room for every model, and what a decision
costs. `--real-time` plays a piece of the trace through the whole product instead, `--ollama` a load of its own against
real Ollama nodes.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "api-gateway")]

import fleet_ollama  # noqa: E402
import fleet_simulated  # noqa: E402
from balancers import Balanced, least_connections, residency, round_robin  # noqa: E402
from fleet_dispatch import dispatch, together  # noqa: E402
from fleet_plot import write  # noqa: E402

from corral.fleet.simulation import Asked, Outcome, Shape, Simulation  # noqa: E402
from corral.loadtest.schedule import zipf  # noqa: E402
from corral.loadtest.traces import load  # noqa: E402

MODELS = 6


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
    if others:
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


def main() -> int:
    """Print the tables, write the plot; 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the models' draw (0)")
    parser.add_argument("--plot", type=Path, help="where to write the plot of the first case (SVG)")
    parser.add_argument("--alone", action="store_true", help="without the other ways to balance")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--real-time", action="store_true", help="a piece of the trace through the whole product")
    kinds.add_argument("--ollama", action="store_true", help="real Ollama nodes: Corral beside HAProxy's leastconn")
    kinds.add_argument("--dispatch", action="store_true", help="what a decision costs, alone")
    kinds.add_argument("--together", action="store_true", help="what calls of one turn to the store cost, alone")
    parser.add_argument("--seconds", type=float, help="of a run in real time (120, with --ollama 60)")
    parser.add_argument("--rate", type=float, default=fleet_ollama.RATE, help="requests/s of --ollama")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # what was started ends too
    if given.real_time:
        return fleet_simulated.main(given.seconds or 120.0, MODELS, given.seed, given.plot)
    if given.ollama:
        return fleet_ollama.main(given.seconds or 60.0, given.rate, given.seed, given.plot)
    if given.together:
        together()
        return 0
    held = True
    for number, case in enumerate(() if given.dispatch else CASES):
        runs, holds = compare(case, given.seed, not given.alone)
        held = held and holds
        if not number and given.plot:
            write(given.plot, case.name, [(name, outcome.first) for name, outcome in runs])
    return 0 if dispatch() and held else 1


if __name__ == "__main__":
    sys.exit(main())
