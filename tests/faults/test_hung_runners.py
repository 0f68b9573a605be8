"""Runners that hang while their nodes answer every probe, and such as only seem to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.fleet import MODEL, SIMULATION, SINGLE, Fleet, SimulatedNode
from support.fleet import fleet as run_fleet
from support.gateway import END, HEAD, LAST, LINE, Behaviour, FakeNode, chunk, gateway, says, well
from support.held import leading, placed
from support.load import CHAT, WHOLE, Answer, Client, Load, body_of
from support.process import until

from corral.gateway.health import CANARY

EJECTED, FROZEN = "corral_ejections_total", "corral_ejections_frozen_total"
BUDGET, EJECTED_WITHIN = 5.0, 10.0
EJECTION = BUDGET + CANARY + 1.0
"""Seconds that an ejection takes: its budget, a canary's, and a look."""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose gateways wait as long for a token as they do by default."""
    with run_fleet(tmp_path_factory.mktemp("patient"), patience="20s") as made:
        made.all_ready()
        made.stack.until_continued()
        yield made


def test_a_hung_runner_is_ejected_and_its_streams_go_elsewhere(
    patient: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    node = patient.nodes["node-1"]
    before, gateways = patient.sum_of(EJECTED), patient.present_gateways()
    with patient.load(clients=8, paths=[CHAT], tokens=[40], name="runner") as load:
        load.more(8, "node-1")
        node.fault(kind="hang", model=MODEL)
        hung = time.monotonic()
        until(lambda: patient.sum_of(EJECTED) > before, "it is ejected", BUDGET + EJECTED_WITHIN, every=0.2)
        ejected = time.monotonic()
        until(lambda: patient.states()["node-1"] == "suspect", "control has heard")
        listed = patient.states()["node-1"], patient.reasons()["node-1"]
        # One that had no stream there sends it some once those of the other have left, and sees it by these.
        load.until(lambda _: patient.sum_of(EJECTED) >= before + gateways, "both gateways have seen it")
        seen = time.monotonic()
        load.more(8)
        well = time.monotonic()
        node.well()
        with patient.load(clients=8, paths=[CHAT], tokens=[4], name="back", fresh=True) as other:
            other.more(8, "node-1")
        back = time.monotonic()
    assert listed[0] == "suspect" and f"{MODEL} gives no tokens there, says gateway-" in listed[1]
    assert load.unlike(WHOLE) == []
    assert len({answer.text for answer in load.answers}) == 1, "an answer that was gone on with is another one"
    assert other.unlike(WHOLE) == []
    late = [a for a in load.answers if seen < a.began < well and a.ended < well]
    assert late and {answer.node for answer in late} == {"node-2"}
    until(lambda: set(patient.states().values()) == {"ready"}, "it is suspect no more")
    took = ejected - hung
    assert took < BUDGET + EJECTED_WITHIN
    measured = f"{took:.1f} s, {len(load.answers)} answers, 0 lost, back after a token in {back - well:.1f} s"
    matrix("runner hung, API healthy", "ejected <= 10 s after its budget (5 s)", measured)


def test_a_hung_runner_is_ejected_though_its_callers_wait_for_less_than_its_budget(
    patient: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    node, waits = patient.nodes["node-1"], 3.0
    before, gateways = patient.sum_of(EJECTED), patient.present_gateways()
    answers: list[Answer] = []
    over = threading.Event()

    def calls(number: int) -> None:
        turn = 0
        while not over.is_set():
            client = Client(patient.stack.url, patient.stack.key, timeout=waits)
            # Each its own prompt: no node is preferred for having read it.
            turn += 1
            answers.append(client.ask(CHAT, body_of(CHAT, MODEL, 4, f"{number} {turn} horses"), f"leaves-{number}"))
            client.close()

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(calls, number) for number in range(12)]
        try:
            node.fault(kind="hang", model=MODEL)
            hung = time.monotonic()
            until(lambda: patient.sum_of(EJECTED) > before, "it is ejected", BUDGET + EJECTED_WITHIN, every=0.2)
            ejected = time.monotonic()
            until(lambda: patient.sum_of(EJECTED) >= before + gateways, "each gateway has seen it", every=0.2)
            seen = time.monotonic()
            until(lambda: sum(a.began > seen for a in list(answers)) > 50, "they are answered elsewhere")
            over.set()
            # Who was on his way when it is well again may be sent there.
            for one in asked:
                one.result()
        finally:
            over.set()
            node.well()
    left = [answer for answer in answers if answer.fate != WHOLE]
    assert left, "nobody left"
    assert max(answer.ended - answer.began for answer in left) < BUDGET, "somebody waited"
    assert {(answer.fate, answer.node) for answer in answers if answer.began > seen} == {(WHOLE, "node-2")}
    until(lambda: set(patient.states().values()) == {"ready"}, "it is suspect no more")
    measured = f"{ejected - hung:.1f} s, {len(left)} left after {waits:g} s each"
    matrix("runner hung, callers wait for 3 s", "ejected <= 10 s after its budget (5 s)", measured)


@pytest.mark.parametrize("route", ["/api/embed", "/v1/embeddings"])
def test_a_hung_runner_that_only_embeds_is_ejected_and_its_work_goes_elsewhere(
    patient: Fleet, matrix: Callable[[str, str, str], None], route: str
) -> None:
    node = patient.nodes["node-1"]
    before = patient.sum_of(EJECTED)
    over = threading.Event()
    answers: list[httpx.Response] = []

    def calls(number: int) -> None:
        with httpx.Client(base_url=patient.stack.url, headers=patient.stack.headers(), timeout=60) as client:
            while not over.is_set():
                body = {"model": MODEL, "input": [f"{number} horses"] * 3}
                answers.append(client.post(route, json=body))

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(calls, number) for number in range(8)]
        try:
            until(lambda: len({one.headers["X-Corral-Node"] for one in list(answers)}) == 2, "both are used")
            node.fault(kind="hang", model=MODEL)
            hung = time.monotonic()
            until(lambda: patient.sum_of(EJECTED) > before, "it is ejected", BUDGET + EJECTED_WITHIN, every=0.2)
            ejected = time.monotonic() - hung
            until(lambda: patient.states()["node-1"] == "suspect", "control has heard")
            node.well()
            until(lambda: set(patient.states().values()) == {"ready"}, "it is suspect no more")
        finally:
            over.set()
            node.well()
        for one in asked:
            one.result()
    assert {answer.status_code for answer in answers} == {200}
    assert ejected < BUDGET + EJECTED_WITHIN
    measured = f"{ejected:.1f} s, {len(answers)} answers, 0 lost"
    matrix(f"runner hung, {route} alone", "ejected <= 10 s after its budget (5 s)", measured)


def test_a_model_that_can_do_nothing_else_is_asked_to_embed(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    with gateway(tmp_path, gateway={"between_tokens": "20s", "first_token": "20s"}) as gw:
        placed(gw, leading(gw), 4, "node-1", "node-2")
        gw.control.publish(nodes=[node | {"ps": node["tags"]} for node in gw.control.snapshot["nodes"]])
        gw.control.until_known()
        hung = gw.nodes[0]

        def only_embeds(node: FakeNode) -> Behaviour:
            def answers(connection: socket.socket) -> None:
                if "input" not in node.asked.body:
                    says(400, {"error": '"m" does not support generate'})(connection)
                elif node is hung:
                    node.wait_for_close(connection)
                else:
                    says(200, {"model": "m", "embeddings": [[1.0]], "prompt_eval_count": 3})(connection)

            return answers

        for node in gw.nodes:
            node.script = [only_embeds(node)] * 40
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda text: gw.post("/api/embed", {"model": "m", "input": text}), ("a", "b")))
        took = time.monotonic() - began
        assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
        assert sorted(answer.headers["X-Corral-Attempts"] for answer in answers) == ["1", "2"]
        assert gw.metric(EJECTED) == 1
    assert took < BUDGET + EJECTED_WITHIN
    matrix(
        "runner of an embedding model hung", "ejected <= 10 s after its budget (5 s)", f"answered after {took:.1f} s"
    )


def test_long_embeddings_eject_nothing(patient: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    before = patient.sum_of(EJECTED)
    # 900 tokens at 120 tokens/s: 7.5 s without a word. Then as many as go in one batch, and one more.
    text = "river " * 900

    def ask(given: str | list[str]) -> httpx.Response:
        url, headers = patient.stack.url + "/api/embed", patient.stack.headers()
        return httpx.post(url, json={"model": MODEL, "input": given}, headers=headers, timeout=120)

    with ThreadPoolExecutor(20) as pool:
        answers = [*pool.map(ask, [text] * 20), ask([text] * 65)]
    assert {(answer.status_code, answer.headers["X-Corral-Attempts"]) for answer in answers} == {(200, "1")}
    assert min(answer.elapsed.total_seconds() for answer in answers) > BUDGET
    assert patient.sum_of(EJECTED) == before
    matrix("long embeddings alone", "0 ejections", f"0 in {len(answers)}")


@pytest.fixture
def batching(tmp_path: Path) -> Iterator[Fleet]:
    """Such a fleet, whose runners give nobody a token while they read a prompt: they do both in one batch."""
    nodes = [SimulatedNode(f"node-{at}", tmp_path, SIMULATION | {"prefill_stalls": True}) for at in (1, 2)]
    with run_fleet(tmp_path, patience="20s", nodes=nodes) as made:
        made.all_ready()
        made.stack.until_continued(MODEL)
        yield made


def test_long_prefills_beside_short_streams_eject_nothing(
    batching: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    before, frozen = batching.sum_of(EJECTED), batching.sum_of(FROZEN)
    # 1500 tokens at 120 tokens/s: 12.5 s in which nobody gets a token, those of short streams neither.
    # No two begin alike, so that both nodes have some. Why they stand still the other gateway knows by this one alone.
    bodies = [body_of(CHAT, MODEL, 2, prompt=f"{at} " + "river " * 1500) for at in range(100)]
    long, short = (gateway["url"] for gateway in batching.stack.corral("status")["gateways"])
    beside = Load(short, batching.stack.key, MODEL, clients=4, paths=[CHAT], tokens=[4], name="short", fresh=True)
    with beside as load, ThreadPoolExecutor(100) as pool:
        for name in batching.nodes:
            load.more(2, name)
        clients = [Client(long, batching.stack.key) for _ in range(100)]
        asked = [pool.submit(clients[at].ask, CHAT, body, f"long-{at}") for at, body in enumerate(bodies)]
        answers = [each.result() for each in asked]
        for client in clients:
            client.close()
    assert [str(answer) for answer in [*load.answers, *answers] if answer.fate != WHOLE or answer.attempts != 1] == []
    assert min(answer.first - answer.began for answer in answers) > EJECTION
    stalled = [answer for answer in load.answers if answer.ended - answer.began > EJECTION]
    assert {answer.node for answer in stalled} == set(batching.nodes), "no short stream stood still beside them"
    assert (batching.sum_of(EJECTED), batching.sum_of(FROZEN)) == (before, frozen)
    longest = max(answer.ended - answer.began for answer in stalled)
    seen = f"0 in {len(answers)}, {len(stalled)} short streams stood still, for up to {longest:.0f} s"
    matrix("long prefill beside short streams", "0 ejections in 100", seen)


def test_a_full_queue_of_a_node_that_runs_one_at_a_time_ejects_nothing(
    patient: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    before = patient.sum_of(EJECTED)
    # 30 tokens at 20 a second, one after the other: who comes last on its node waits for some six seconds.
    content = body_of(CHAT, SINGLE, 30)
    with ThreadPoolExecutor(10) as pool:
        clients = [patient.client() for _ in range(10)]
        answers = list(pool.map(lambda client: client.ask(CHAT, content, "queued"), clients))
        for client in clients:
            client.close()
    assert [str(answer) for answer in answers if answer.fate != WHOLE or answer.attempts != 1] == []
    assert max(answer.first - answer.began for answer in answers) > BUDGET
    assert patient.sum_of(EJECTED) == before
    matrix("one request at a time, full queue", "0 ejections", "0")


def test_a_node_with_more_slots_than_it_runs_at_once_is_told_of(
    patient: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    # One at a time, by two gateways and two nodes: of those who come late, each gateway sees some wait at each node.
    content = body_of(CHAT, SINGLE, 20)
    # Control's canary, where it had to wait behind such a queue before, has the first word until it is asked anew.
    until(lambda: not any("canary" in why for why in patient.reasons().values()), "each canary is answered", 90)
    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        clients = [patient.client() for _ in range(32)]
        asked = [pool.submit(client.ask, CHAT, content, "crowd") for client in clients]
        until(lambda: all("though they have a slot" in why for why in patient.reasons().values()), "it is told")
        took = time.monotonic() - began
        doctor = patient.stack.corral("doctor")
        answers = [one.result() for one in asked]
        for client in clients:
            client.close()
    assert [str(answer) for answer in answers if answer.fate != WHOLE] == []
    assert "OLLAMA_NUM_PARALLEL" in json.dumps(doctor)
    matrix("more slots than a node runs at once", "told by corral doctor", f"after {took:.1f} s, {SINGLE}")


def test_when_every_runner_hangs_none_is_ejected(patient: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    before, frozen = patient.sum_of(EJECTED), patient.sum_of(FROZEN)
    for node in patient.nodes.values():
        node.fault(kind="hang", model=MODEL)
    # At each gateway, so that each has streams on both nodes: two that take turns may have one node each.
    urls = [gateway["url"] for gateway in patient.stack.corral("status")["gateways"]]
    clients = [Client(url, patient.stack.key) for url in urls for _ in range(6)]
    with ThreadPoolExecutor(12) as pool:
        # Each its own prompt: where all begin alike, one node may have all of them.
        bodies = [body_of(CHAT, MODEL, 20, f"{number} horses") for number in range(len(clients))]
        asked = [pool.submit(each.ask, CHAT, body, "frozen") for each, body in zip(clients, bodies, strict=True)]
        try:
            until(lambda: patient.sum_of(FROZEN) > frozen, "an ejection is frozen", 16, every=0.3)
        finally:
            for node in patient.nodes.values():
                node.well()
        answers = [each.result() for each in asked]
    for client in clients:
        client.close()
    # Hung streams of a simulated node go on when it is well again.
    assert {answer.fate for answer in answers} == {WHOLE}, [str(a) for a in answers]
    ejected = patient.sum_of(EJECTED) - before
    assert ejected <= patient.present_gateways(), "one node of two is half of them; each gateway counts its own"
    matrix("all runners hang at once", "never more than half of the nodes", f"{ejected:.0f} by 2 gateways, then frozen")


def test_what_hangs_beside_nodes_that_are_down_is_not_ejected_where_half_of_them_are(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    nodes = [SimulatedNode(f"node-{number}", tmp_path) for number in range(1, 5)]
    hangs, dead = nodes[0], nodes[2:]
    try:
        with run_fleet(tmp_path, "20s", nodes=nodes) as made:
            made.stack.until_continued(MODEL)
            made.all_ready()
            for node in dead:
                node.kill()
            until(lambda: [made.states()[node.name] for node in dead] == ["down"] * 2, "half of them are down")
            until(made.heard, "gateways have heard")
            before, frozen = made.sum_of(EJECTED), made.sum_of(FROZEN)
            hangs.fault(kind="hang", model=MODEL)
            clients = [made.client() for _ in range(8)]
            with ThreadPoolExecutor(8) as pool:
                bodies = [body_of(CHAT, MODEL, 20, f"{number} horses") for number in range(len(clients))]
                asked = [pool.submit(each.ask, CHAT, body, "half") for each, body in zip(clients, bodies, strict=True)]
                try:
                    until(lambda: made.sum_of(FROZEN) > frozen, "its ejection is frozen", 16, every=0.3)
                    said = made.states()[hangs.name]
                finally:
                    hangs.well()
                answers = [each.result() for each in asked]
            for client in clients:
                client.close()
            ejected = made.sum_of(EJECTED) - before
    finally:
        for node in nodes:
            node.kill()
    assert {answer.fate for answer in answers} == {WHOLE}, [str(a) for a in answers]
    assert (ejected, said) == (0, "suspect")
    measured = f"{ejected:.0f} ejected beside 2 of 4 that are down, frozen and {said}"
    matrix("a runner hangs, half of the nodes are down", "never more than half of the nodes", measured)


def test_the_last_runner_of_a_model_is_not_ejected(patient: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    first, other = patient.nodes["node-1"], patient.nodes["node-2"]
    httpx.request("DELETE", other.url + "/api/delete", json={"model": SINGLE}).raise_for_status()
    try:
        until(lambda: patient.holders(SINGLE) == {"node-1"}, "it is known to be on one node alone")
        before, frozen = patient.sum_of(EJECTED), patient.sum_of(FROZEN)
        client = patient.client()
        with ThreadPoolExecutor(1) as pool:
            first.fault(kind="hang", model=SINGLE, after_tokens=3)
            asked = pool.submit(client.ask, CHAT, body_of(CHAT, SINGLE, 10), "last")
            until(lambda: patient.sum_of(FROZEN) > frozen, "its ejection is frozen", BUDGET + EJECTED_WITHIN, every=0.3)
            first.well()
            answer = asked.result()
        client.close()
        # On a slow machine gateway.between_tokens is reached first, and the same node goes on with it.
        assert (answer.fate, answer.node) == (WHOLE, "node-1"), str(answer)
        assert patient.sum_of(EJECTED) == before
    finally:
        first.well()
        other.kill()
        other.start()
        patient.warm()
        patient.all_ready()
    matrix("the last runner of a model hangs", "never the last copy of a model", "0 ejected, its stream goes on")


def test_a_node_that_holds_back_a_call_of_a_tool_hangs_not(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    silent = BUDGET + EJECTED_WITHIN - 3
    over = threading.Event()

    def holds_back(connection: socket.socket) -> None:
        time.sleep(silent)
        call = b'"content":"","tool_calls":[{"function":{"name":"now","arguments":{}}}]'
        connection.sendall(HEAD + chunk((LINE % b"").replace(b'"content":""', call)) + chunk(LAST % 9) + END)
        over.set()

    def behind_it(connection: socket.socket) -> None:
        over.wait()  # one request at a time
        well(connection)

    with gateway(tmp_path, gateway={"between_tokens": "20s", "first_token": "20s"}) as gw:
        placed(gw, leading(gw), 4, "node-1", "node-2")
        gw.control.publish(nodes=[node | {"ps": node["tags"]} for node in gw.control.snapshot["nodes"]])
        gw.control.until_known()
        for node in gw.nodes:
            node.script = [holds_back, *[behind_it] * 9]
        tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
        answer = gw.post(body=gw.chat(stream=False, tools=[tool]))
        assert answer.status_code == 200, answer.text
        assert answer.json()["message"]["tool_calls"]
        assert answer.headers["X-Corral-Attempts"] == "1"
        assert gw.metric(EJECTED) == 0
    matrix("a call of a tool is held back", "0 ejections", f"0, answered after {silent:g} s without a word")
