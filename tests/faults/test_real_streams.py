"""Streams of real Ollama whose node is killed: another goes on, and the whole answer is the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.pair import OTHER, Pair
from support.process import until
from support.servers import MODEL

Matrix = Callable[[str, str, str], None]
pytestmark = [pytest.mark.ollama, pytest.mark.slow]
TOKENS = 64
CUTS = {"/api/chat": range(1, 41, 2), "/api/generate": range(2, 38, 7)}
PROMPTS = {
    MODEL: "Describe a farm by the river, its animals and its people.",
    OTHER: "Write the beginning of a story about a lighthouse keeper.",
}


@dataclass
class Told:
    """A whole answer: its node, text, counts, the way it ended, and the nodes that its last line names."""

    node: str
    text: str
    usage: tuple[int, int]
    reason: str
    nodes: list[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as exits:
        made = Pair(tmp_path_factory.mktemp("pair"), exits)
        made.tested()
        yield made


def ask(
    pair: Pair,
    route: str,
    model: str,
    number: int,
    cut: int = 0,
    server: bool = False,
    number_sent: int = signal.SIGKILL,
) -> Told:
    """A greedy answer; its runner (or the whole ``server``) is killed after ``cut`` pieces.

    Prompts have a number: one that was alone with two runners that crashed is refused.
    """
    options = {"temperature": 0, "num_predict": TOKENS}
    prompt = f"{number}. {PROMPTS[model]}"
    body: dict[str, Any] = {"model": model, "options": options, "stream": True}
    if route == "/api/chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    said, last, pieces = "", {}, 0
    victims = {name: pair.loaded(name, model) for name in pair.servers} if cut else {}
    headers = pair.stack.headers()
    with httpx.stream("POST", pair.stack.url + route, json=body, headers=headers, timeout=90) as answer:
        assert answer.status_code == 200
        node = answer.headers["X-Corral-Node"]
        for line in answer.iter_lines():
            last = json.loads(line)
            assert "error" not in last, last
            said += last["message"]["content"] if "message" in last else last["response"]
            pieces += 1
            if pieces == cut:
                if server:
                    pair.kill(node)
                for pid in () if server else victims[node]:
                    os.kill(pid, number_sent)
    assert last["done"] is True
    usage = last["prompt_eval_count"], last["eval_count"]
    return Told(node, said, usage, last["done_reason"], last.get("corral", {}).get("continued", []))


@pytest.mark.parametrize("model", [MODEL, OTHER])
@pytest.mark.parametrize("route", ["/api/chat", "/api/generate"])
def test_a_killed_runners_answer_is_the_undisturbed_one(pair: Pair, matrix: Matrix, model: str, route: str) -> None:
    differ: list[str] = []
    for cut in CUTS[route]:
        undisturbed = ask(pair, route, model, cut)
        assert undisturbed.usage[1] > cut + 4, "it ends before it is cut"
        told = ask(pair, route, model, cut, cut)
        assert told.nodes[:1] == [told.node] and len(told.nodes) == 2, (cut, told)
        if (told.text, told.usage, told.reason) != (undisturbed.text, undisturbed.usage, undisturbed.reason):
            differ.append(f"cut after {cut}: {told} for {undisturbed}")
    assert differ == []
    places = len(CUTS[route])
    matrix(f"real runner killed, {route}, {model}", "whole answer exact", f"{places} of {places} cuts exact")


def test_a_stopped_runners_answer_is_the_undisturbed_one(pair: Pair, matrix: Matrix) -> None:
    """kill -STOP in mid-stream: the API answers, nothing comes; it is ejected long before `between_tokens` (20 s)."""
    undisturbed = ask(pair, "/api/chat", MODEL, 300)
    began = time.monotonic()
    told = ask(pair, "/api/chat", MODEL, 300, 9, number_sent=signal.SIGSTOP)
    took = time.monotonic() - began
    for pid in pair.runners(told.node, MODEL):
        os.kill(pid, signal.SIGCONT)
    assert (told.text, told.usage, told.reason) == (undisturbed.text, undisturbed.usage, undisturbed.reason)
    assert len(told.nodes) == 2
    assert took < 19
    matrix("real runner stopped in mid-stream", "gone on with, exact", f"exact, the whole answer in {took:.1f} s")


def test_a_killed_servers_answer_is_the_undisturbed_one(pair: Pair, matrix: Matrix) -> None:
    for cut in (3, 20):
        undisturbed = ask(pair, "/api/chat", MODEL, 100 + cut)
        told = ask(pair, "/api/chat", MODEL, 100 + cut, cut, server=True)
        assert told.nodes == [told.node, "node-2" if told.node == "node-1" else "node-1"]
        assert (told.text, told.usage, told.reason) == (undisturbed.text, undisturbed.usage, undisturbed.reason)
        pair.start(told.node)
        until(pair.all_ready, "the node is back", 30, every=0.3)
    matrix("real node killed in mid-stream", "whole answer exact", "2 of 2 exact")


def test_a_prompt_that_runners_crash_under_is_refused(pair: Pair, matrix: Matrix) -> None:
    """The runner is killed each time that the prompt arrives: after two crashes it is not tried again."""
    until(pair.all_ready, "both nodes are in service", 30, every=0.3)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "poison " * 600}], "stream": False}
    body["options"] = {"num_predict": 4}
    other = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "stream": False}
    other["options"] = {"num_predict": 4}
    victims = {name: pair.loaded(name, MODEL) for name in pair.servers}
    killed: list[str] = []
    with httpx.Client(base_url=pair.stack.url, headers=pair.stack.headers(), timeout=60) as client:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.post, "/api/chat", json=body)
            deadline = time.monotonic() + 40
            while not asked.done() and time.monotonic() < deadline:
                for name, pids in victims.items():
                    if name not in killed and busy(pids):
                        killed.append(name)
                        for pid in pids:
                            os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
            answer = asked.result()
        assert sorted(killed) == ["node-1", "node-2"]
        assert answer.status_code == 502, answer.text
        # Each gateway has heard of it; it reaches no node, and others' prompts do.
        for _ in range(4):
            again = client.post("/api/chat", json=body)
            assert (again.status_code, "refused" in again.text) == (400, True)
        for _ in range(4):
            assert client.post("/api/chat", json=other).status_code == 200
    matrix("prompt that a runner crashes under", "refused after two crashes", "502, then 400; others' prompts answered")


def busy(pids: list[int]) -> bool:
    """Whether a process has used a tenth of a second of CPU since it was last looked at."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    before = _used.setdefault(tuple(pids), used)
    return used - before >= 0.1 * os.sysconf("SC_CLK_TCK")


_used: dict[tuple[int, ...], int] = {}
