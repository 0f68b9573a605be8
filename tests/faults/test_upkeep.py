"""What happens on a good day: parts are restarted one after the other, and a big model is loaded. Nobody is cut off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.fleet import MODEL, SIMULATION, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.leader import Leader
from support.limits import unused
from support.load import CHAT, REFUSED, WHOLE, Answer, Client, Load, body_of
from support.process import until

from corral.config.settings import GatewaySettings
from corral.store.lua import PREFIX

Matrix = Callable[[str, str, str], None]

LONG, BIG = "long:latest", "big:latest"
LOAD = 60.0
USUAL = GatewaySettings()
"""Its times are those that gateways have where nothing is configured."""
STREAMS, LEAST = 200, 180
"""Callers that stream without pause, and how many streams run at the least when a restart begins."""
LENGTHS = [20, 24, 28, 32, 36, 40]
"""Tokens of long streams, at five a second: four to eight seconds, never in step."""
ENDURING = 200
"""Tokens of streams that outlast what `corral down` would wait for, also those that began some seconds before: 40."""
MODELS = [
    *SIMULATION["models"],
    {"name": LONG, "load": 0.1, "prefill": 5000.0, "decode": 5.0, "slots": 256},
]
HEAVY = {"name": BIG, "load": LOAD, "prefill": 5000.0, "decode": 40.0, "slots": 64}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet with room for all streams on each of its two nodes."""
    folder = tmp_path_factory.mktemp("kept")
    nodes = [SimulatedNode(f"node-{number}", folder, {"models": MODELS}) for number in (1, 2)]
    with run_fleet(folder, "20s", nodes=nodes, slots=256) as made:
        made.all_ready()
        yield made


@pytest.fixture
def usual(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet with the usual times, and a model that takes as long to load as its gateways wait for a first token."""
    nodes = [SimulatedNode(f"node-{number}", tmp_path, {"models": [*MODELS, HEAVY]}) for number in (1, 2)]
    between = f"{USUAL.between_tokens:g}s"
    with run_fleet(tmp_path, f"{USUAL.first_token:g}s", nodes=nodes, slots=256, between_tokens=between) as made:
        made.all_ready()
        yield made


def warm(fleet: Fleet) -> None:
    """Have the model of the long streams in memory everywhere."""
    fleet.warm()
    for node in fleet.nodes.values():
        httpx.post(node.url + "/api/generate", json={"model": LONG, "prompt": "a", "options": {"num_predict": 1}})


def all_stream(load: Load) -> None:
    """Wait until nearly every caller is being answered."""
    load.until(lambda _: len(load.streaming) > (LEAST + STREAMS) / 2, "nearly all streams run")


def test_rolling_restarts_cut_none_of_the_streams_of_200_callers(kept: Fleet, matrix: Matrix) -> None:
    warm(kept)
    kept.all_ready()
    began: dict[str, list[float]] = {"HAProxy reloaded": [], "nodes restarted": [], "gateways restarted": []}

    def about(what: str, load: Load) -> None:
        all_stream(load)
        began[what].append(time.monotonic())

    ended: dict[str, float] = {}
    with kept.load(LONG, clients=STREAMS, paths=[CHAT], tokens=LENGTHS, name="rolling", fresh=True) as load:
        for _ in range(2):
            about("HAProxy reloaded", load)
            kept.stack.corral("config", "reload")
        ended["HAProxy reloaded"] = time.monotonic()
        for name, node in kept.nodes.items():
            about("nodes restarted", load)
            told = kept.stack.corral("nodes", "drain", name, "--wait")
            assert (told["drained"], told["streams"]) == (True, 0)
            node.process.end(signal.SIGTERM)
            node.start()
            warm(kept)
            kept.stack.corral("nodes", "resume", name)
            until(lambda name=name: kept.states()[name] == "ready", f"{name} serves")  # type: ignore[misc]
        ended["nodes restarted"] = time.monotonic()
        lasted = {}
        for gateway in kept.stack.corral("status")["gateways"]:
            about("gateways restarted", load)
            lasted[gateway["name"]] = outlasted(kept, gateway)
        ended["gateways restarted"] = time.monotonic()
        all_stream(load)
    assert load.unlike(WHOLE) == []
    assert len(lasted) == 2 and min(lasted.values()) > 30, lasted
    before = 0.0
    for what, at in ended.items():
        count = sum(before < answer.ended and answer.began < at for answer in load.answers)
        ran = [sum(answer.first < each < answer.ended for answer in load.answers) for each in began[what]]
        fault, bar = f"{what} one after the other, {STREAMS} callers", f"0 streams cut, >= {LEAST} run at each"
        matrix(fault, bar, f"0 of {count}, {' and '.join(map(str, ran))} ran")
        assert len(ran) == 2 and min(ran) >= LEAST, ran
        before = at
    longest = max(lasted.values())
    matrix("gateways restarted under streams of 40 s", "0 streams cut", f"0 of 32, the last after {longest:.0f} s")


def outlasted(fleet: Fleet, gateway: dict[str, object]) -> float:
    """Restart a gateway under streams that take their time, all of them whole; for how long (seconds) the last of its
    own went on once it was told to end."""
    name, turn, count = str(gateway["name"]), unused(), 16
    # One that has just come up gets all new requests until it has as many as the other; then each gets some of them.
    until(lambda: abs(int.__sub__(*fleet.sessions().values())) < count / 2, "the gateways have as many each", 60)
    clients, begun = [fleet.client() for _ in range(count)], list[Answer]()
    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(each.ask, CHAT, body_of(CHAT, LONG, ENDURING), f"enduring-{turn}-{at}", begun.append)
            for at, each in enumerate(clients)
        ]
        until(lambda: len(begun) == count, "they have begun")
        told = time.monotonic()
        restart(gateway)
        answers = [each.result() for each in asked]
    for client in clients:
        client.close()
    assert [str(answer) for answer in answers if answer.fate != WHOLE] == []
    log = (fleet.folder / f"state/logs/{name}.access.log").read_text()
    own = [answer.ended for answer in answers if answer.request_id in log]
    assert 0 < len(own) < count, "the edge gives each gateway some"
    return max(own) - told


def restart(gateway: dict[str, object]) -> None:
    """Have a gateway end in order, and wait until the supervisor's next one serves."""
    pid, url = int(str(gateway["pid"])), str(gateway["url"])
    os.kill(pid, signal.SIGTERM)
    until(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended", 60)
    until(lambda: httpx.get(url + "/health/ready", timeout=1).status_code == 200, "the next one serves", 60)


def ask_at_once(fleet: Fleet, name: str, count: int = 12) -> list[Answer]:
    """Callers of the big model, each once, at the same time, who wait for longer than a gateway has them wait."""
    clients = [Client(fleet.stack.url, fleet.stack.key, timeout=3 * LOAD) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(each.ask, CHAT, body_of(CHAT, BIG, 4), f"{name}-{at}") for at, each in enumerate(clients)]
        answers = [each.result() for each in asked]
    for client in clients:
        client.close()
    return answers


def loads(fleet: Fleet) -> float:
    """How often the big model has been loaded."""
    return sum(fleet.node_says(name, "corral_node_loads_total", model=BIG) for name in fleet.nodes)


def placed(fleet: Fleet, name: str) -> bool:
    """Whether the store gives slots of a model: who asks is sent to a node at once."""
    words = Leader(fleet.valkey.url).ask(b"HVALS", PREFIX + b"places:" + name.encode())
    return any(word.startswith(b"resident ") for word in words)


@pytest.mark.slow
def test_a_big_model_loads_for_long(usual: Fleet, matrix: Matrix) -> None:
    ejections = usual.sum_of("corral_ejections_total")
    states: list[set[str]] = []
    with usual.load(MODEL, clients=4, paths=[CHAT], tokens=[10], name="beside") as load, ThreadPoolExecutor(1) as pool:
        # Nobody knows how long it takes: who is refused is told when to come back.
        first = pool.submit(ask_at_once, usual, "big")
        while not first.done():
            states.append(set(usual.states().values()))
            time.sleep(0.1)
        load.until(lambda _: loads(usual) > 0, "it is in memory", LOAD + 10)
        for node in usual.nodes.values():
            httpx.post(node.url + "/api/generate", json={"model": BIG, "keep_alive": 0})
        load.until(lambda _: not placed(usual, BIG), "it is gone again, and gateways are given no slot of it")
        # By now it is known how long.
        second = ask_at_once(usual, "again")
    answers = first.result()
    assert {answer.fate for answer in answers} <= {WHOLE, REFUSED}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status == 503)
    assert {answer.status for answer in answers} <= {200, 503}
    bound = max(USUAL.queue.wait, 1.5 * LOAD)
    assert max(answer.ended - answer.began for answer in answers) < bound + 2
    assert [str(answer) for answer in second if answer.fate != WHOLE] == []
    assert {answer.attempts for answer in second} == {1}
    waited = min(int(answer.headers["x-corral-queue-ms"]) / 1e3 for answer in second)
    assert waited > LOAD / 2, "they are sent where it loads, as if it were there"
    assert max(answer.first - answer.began for answer in second) < bound + 2
    # Those of other models, and the nodes themselves, have noticed nothing.
    assert load.unlike(WHOLE) == []
    assert {answer.attempts for answer in load.answers} == {1}
    assert all(each == {"ready"} for each in states)
    assert usual.sum_of("corral_ejections_total") == ejections
    assert loads(usual) <= 4, "at most one on each node, each time"
    refused = sum(answer.status == 503 for answer in answers)
    slowest = max(answer.first - answer.began for answer in second)
    measured = f"0 ejected; {refused} of 12 told to come back, then 12 of 12 answered in {slowest:.0f} s"
    matrix("a big model loads for 60 s", "0 ejections, no retry storm", measured)
