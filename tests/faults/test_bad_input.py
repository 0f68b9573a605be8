"""What no node could answer is refused at the gateway: at once, by its name, and in the form of the API called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from support.fleet import MODEL, SIMULATION, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.limits import unused
from support.load import APIS, CHAT, MESSAGES, WHOLE, body_of

HUGE = "huge:latest"
MEMORY, NEEDED = "24GiB", "64GiB"
ASKED = 20
"""Times, in each API."""
AT_ONCE = 0.1
"""Seconds, for nine in ten, as for whoever finds a queue full."""
DEADLINE = "X-Corral-Deadline-Ms"
FAULTS: dict[str, tuple[int, bytes, dict[str, str], str]] = {
    "a model that nobody has": (404, b"nothing:latest", {}, "model 'nothing:latest' not found"),
    "a model larger than any node": (507, HUGE.encode(), {}, "needs 64.0 GiB of memory, and node-1, the largest"),
    "a deadline that is past": (503, MODEL.encode(), {DEADLINE: "0"}, "deadline is past"),
    "a deadline before its request": (503, MODEL.encode(), {DEADLINE: "-5000"}, "deadline is past"),
    "a body that is no JSON": (400, b'"', {}, "JSON"),
}
"""What is wrong: the status, the model as it stands in the body, more headers, and what the caller is told."""


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose nodes say how much memory they have, and hold a model that needs more."""
    folder = tmp_path_factory.mktemp("declared")
    models = [*SIMULATION["models"], {"name": HUGE, "load": 0.1, "size": NEEDED}]
    nodes = [SimulatedNode(name, folder, {"models": models}) for name in ("node-1", "node-2")]
    with run_fleet(folder, nodes=nodes, memory=MEMORY) as made:
        made.all_ready()
        yield made


def words(path: str, answer: httpx.Response) -> str:
    """What an error says, by its API's form."""
    error = answer.json()["error"]
    if path == CHAT:
        return str(error)
    if path == MESSAGES:
        assert answer.json()["type"] == "error"
    assert error["type"]
    return str(error["message"])


@pytest.mark.parametrize("what", FAULTS)
def test_what_no_node_could_answer_is_refused_at_once(
    declared: Fleet, what: str, matrix: Callable[[str, str, str], None]
) -> None:
    status, model, headers, told = FAULTS[what]
    ejections, name, took = declared.sum_of("corral_ejections_total"), unused(), []
    for node in declared.nodes.values():
        node.count_anew()
    asked: list[str] = []
    with httpx.Client(base_url=declared.stack.url, headers=declared.stack.headers() | headers, timeout=10) as caller:
        for path in APIS:
            body = body_of(path, "MODEL", 4).replace(b"MODEL", model)
            for count in range(ASKED):
                asked.append(f"bad-{name}-{path[1:].replace('/', '-')}-{count}")
                began = time.monotonic()
                answer = caller.post(path, content=body, headers={"X-Request-ID": asked[-1]})
                took.append(time.monotonic() - began)
                assert (answer.status_code, "x-corral-node" in answer.headers) == (status, False), answer.text
                assert told in words(path, answer)
                assert "x-corral-proxy" not in answer.headers, "the edge says it, which knows no reason"
                assert status != 503 or int(answer.headers["retry-after"]) >= 1
    assert [node.work(HUGE)["loads"] for node in declared.nodes.values()] == [0, 0], "a node was made to load it"
    assert {(record["status"], record["node"]) for record in declared.records(*asked)} == {(status, "")}
    # Nobody is to blame, and who asks for what there is has it.
    assert (declared.sum_of("corral_ejections_total"), set(declared.states().values())) == (ejections, {"ready"})
    client = declared.client()
    good = client.ask(CHAT, body_of(CHAT, MODEL, 4), f"good-{name}")
    client.close()
    assert good.fate == WHOLE, str(good)
    p90 = sorted(took)[len(took) * 9 // 10]
    measured = f"{status}, p90 {p90 * 1e3:.0f} ms of {len(took)}, none reached a node"
    matrix(what, f"{status} with its reason, p90 <= {AT_ONCE * 1e3:.0f} ms, no node is asked", measured)
    assert p90 <= AT_ONCE
