"""Streams of real Ollama whose node is killed: another goes on, and the whole answer is the undisturbed one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.load import WHOLE, Load, json_of
from support.pair import OTHER, Pair
from support.process import until
from support.servers import MODEL

Matrix = Callable[[str, str, str], None]
Fault = Callable[[str, list[int]], None]
"""What is done to a node, or to those of its processes that run the model."""

pytestmark = [pytest.mark.ollama, pytest.mark.slow]
TOKENS = 48
AHEAD = 40
"""Tokens that are still to come where an answer is cut: half a second, which its caller may be late to see it."""
CHAT, GENERATE, V1_CHAT, V1_COMPLETIONS = "/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"
MESSAGES = "/v1/messages"
CUTS = {
    # Twenty places of each model's answers.
    (CHAT, MODEL): range(1, 40, 4),
    (CHAT, OTHER): range(1, 40, 4),
    (GENERATE, MODEL): range(3, 40, 4),
    (GENERATE, OTHER): range(3, 40, 4),
    # Twenty more of the same answers in other words: what is gone on with is native, so one model each is enough.
    (V1_CHAT, OTHER): range(3, 36, 5),
    (V1_COMPLETIONS, MODEL): range(4, 36, 4),
    (MESSAGES, MODEL): range(3, 36, 8),
}
PROMPTS = {
    MODEL: "Describe a farm by the river, its animals and its people.",
    OTHER: "Write the beginning of a story about a lighthouse keeper.",
}
SEVERAL = {
    "bytes of a character": "Write ten emoji of animals, only emoji.",
    "what may begin the model's own stop strings": "Write a HTML page with a list of animals.",
}
"""Prompts whose answers have lines of several tokens, by what Ollama holds back."""
ANTHROPIC = ("input_tokens", "output_tokens")
BUDGET, EJECTED_WITHIN = 5.0, 10.0


@dataclass
class Told:
    """A whole answer: its node, text, lines, counts, the way it ended, and the nodes that its end names."""

    node: str
    text: str = ""
    pieces: int = 0
    usage: tuple[int, int] = (0, 0)
    reason: str = ""
    nodes: list[str] = field(default_factory=list)
    whole: bool = False

    def hear(self, line: str) -> bool:
        """A line of the stream; whether it was a piece of the answer."""
        if line == "data: [DONE]":
            self.whole = True
        if not (event := json_of(line)):
            return False
        assert "error" not in event, event
        (choice,) = event.get("choices") or [{}]
        delta = event.get("delta") or {}
        said = event.get("message") or choice.get("delta") or {}
        piece = said.get("content") or event.get("response") or choice.get("text") or delta.get("text") or ""
        self.text += piece if isinstance(piece, str) else ""  # a message begins with a list of no blocks
        self.pieces += bool(piece)
        self.whole = self.whole or event.get("done") is True or event.get("type") == "message_stop"
        ended = event.get("done_reason") or choice.get("finish_reason") or delta.get("stop_reason")
        self.reason = ended or self.reason
        self.nodes = event.get("corral", {}).get("continued", self.nodes)
        if told := event.get("usage"):
            names = ("prompt_tokens", "completion_tokens") if choice or "choices" in event else ANTHROPIC
            self.usage = told[names[0]], told[names[1]]
        elif "eval_count" in event:
            self.usage = event["prompt_eval_count"], event["eval_count"]
        return bool(piece)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as exits:
        made = Pair(tmp_path_factory.mktemp("pair"), exits)
        made.tested()
        yield made


def kill(node: str, pids: list[int]) -> None:
    """The runner crashes."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def ask(
    pair: Pair,
    route: str,
    model: str,
    number: int,
    cut: int = 0,
    fault: Fault = kill,
    tokens: int = TOKENS,
    about: str = "",
) -> Told:
    """A greedy answer of ``tokens`` tokens at most; after ``cut`` pieces there is a fault of its node.

    Prompts have a number: one that was alone with two runners that crashed is refused.
    """
    prompt = f"{number}. {about or PROMPTS[model]}"
    body: dict[str, Any] = {"model": model, "stream": True}
    if route in (CHAT, V1_CHAT, MESSAGES):
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if route in (CHAT, GENERATE):
        body["options"] = {"temperature": 0, "num_predict": tokens}
    else:
        body |= {"temperature": 0, "max_tokens": tokens}
        body |= {} if route == MESSAGES else {"stream_options": {"include_usage": True}}
    victims = {name: pair.loaded(name, model) for name in pair.servers} if cut else {}
    headers = pair.stack.headers()
    with httpx.stream("POST", pair.stack.url + route, json=body, headers=headers, timeout=90) as answer:
        assert answer.status_code == 200
        told = Told(answer.headers["X-Corral-Node"])
        for line in answer.iter_lines():
            if told.hear(line) and told.pieces == cut:
                fault(told.node, victims[told.node])
    assert told.whole
    return told


@pytest.mark.parametrize(("route", "model"), CUTS)
def test_a_killed_runners_answer_is_the_undisturbed_one(pair: Pair, matrix: Matrix, route: str, model: str) -> None:
    differ: list[str] = []
    cuts = CUTS[route, model]
    for cut in cuts:
        number = cut + (500 if route.startswith("/v1") else 0)
        tokens = max(TOKENS, cut + AHEAD)
        undisturbed = ask(pair, route, model, number, tokens=tokens)
        assert undisturbed.usage[1] > cut + 4, "it ends before it is cut"
        told = ask(pair, route, model, number, cut, tokens=tokens)
        assert told.nodes[:1] == [told.node] and len(told.nodes) == 2, (cut, told)
        if (told.text, told.usage, told.reason) != (undisturbed.text, undisturbed.usage, undisturbed.reason):
            differ.append(f"cut after {cut}: {told} for {undisturbed}")
    assert differ == []
    matrix(f"real runner killed, {route}, {model}", "whole answer exact", f"{len(cuts)} of {len(cuts)} cuts exact")


@pytest.mark.parametrize("held", SEVERAL)
def test_a_line_of_several_tokens_counts_as_what_it_is(pair: Pair, matrix: Matrix, held: str) -> None:
    differ: list[str] = []
    places = [(CHAT, 1), (GENERATE, 6), (V1_CHAT, 11), (CHAT, 15)]
    for number, (route, cut) in enumerate(places, 700):
        undisturbed = ask(pair, route, MODEL, number, about=SEVERAL[held])
        assert undisturbed.reason == "length" and undisturbed.usage[1] == TOKENS
        assert cut < undisturbed.pieces < TOKENS, "it has no line of several tokens"
        told = ask(pair, route, MODEL, number, cut, about=SEVERAL[held])
        assert told.nodes[:1] == [told.node] and len(told.nodes) == 2, (cut, told)
        if (told.text, told.usage, told.reason) != (undisturbed.text, undisturbed.usage, undisturbed.reason):
            differ.append(f"{route} cut after {cut}: {told} for {undisturbed}")
    assert differ == []
    matrix(f"real runner killed, held back: {held}", "whole answer exact, counts too", f"{len(places)} of 4 cuts exact")


def test_a_stopped_runner_is_ejected_and_used_again_when_it_goes_on(pair: Pair, matrix: Matrix) -> None:
    """kill -STOP in mid-stream: the API answers, nothing comes; that is seen long before `between_tokens` (20 s)."""
    undisturbed = ask(pair, CHAT, MODEL, 300)
    before = pair.ejections()
    stopped: list[tuple[float, str, list[int]]] = []

    def stop(node: str, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        stopped.append((time.monotonic(), node, pids))

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, pair, CHAT, MODEL, 300, 9, stop)
            until(lambda: stopped or asked.done(), "it is stopped", 60)
            ((at, node, pids),) = stopped
            until(lambda: pair.ejections() > before, "it is ejected", BUDGET + EJECTED_WITHIN, every=0.1)
            ejected = time.monotonic() - at
            told = asked.result()
        until(lambda: pair.states()[node] == "suspect", "control has heard")
        state = pair.states()[node]
    finally:
        for _, _, victims in stopped:
            for pid in victims:
                os.kill(pid, signal.SIGCONT)
    assert (told.text, told.usage, told.reason) == (undisturbed.text, undisturbed.usage, undisturbed.reason)
    assert told.nodes == [node, "node-2" if node == "node-1" else "node-1"]
    assert state == "suspect"
    assert ejected < BUDGET + EJECTED_WITHIN
    # It has no stream that could go on: one token that is asked of it clears it.
    until(pair.all_ready, "it is suspect no more", every=0.3)
    with Load(pair.stack.url, pair.stack.key, MODEL, 8, [CHAT], [4], fresh=True, timeout=90) as load:
        load.more(4, node)
    assert load.unlike(WHOLE) == []
    assert pair.runners(node, MODEL) == pids, "it is another runner that is used again"
    measured = f"{ejected:.1f} s, the answer exact, the same runner used again"
    matrix("real runner stopped in mid-stream", "ejected <= 10 s after its budget (5 s)", measured)


def test_a_killed_servers_answer_is_the_undisturbed_one(pair: Pair, matrix: Matrix) -> None:
    for cut in (3, 20):
        undisturbed = ask(pair, CHAT, MODEL, 100 + cut)
        told = ask(pair, CHAT, MODEL, 100 + cut, cut, lambda node, pids: pair.kill(node))
        assert told.nodes == [told.node, "node-2" if told.node == "node-1" else "node-1"]
        assert (told.text, told.usage, told.reason) == (undisturbed.text, undisturbed.usage, undisturbed.reason)
        pair.start(told.node)
        until(pair.all_ready, "the node is back", every=0.3)
    matrix("real node killed in mid-stream", "whole answer exact", "2 of 2 exact")


def test_a_prompt_that_runners_crash_under_is_refused(pair: Pair, matrix: Matrix) -> None:
    """The runner is killed each time that the prompt arrives: after two crashes it is not tried again."""
    until(pair.all_ready, "both nodes are in service", every=0.3)
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


def test_a_prompt_that_runners_crash_under_is_refused_though_it_is_never_alone(pair: Pair, matrix: Matrix) -> None:
    """The runner is killed in mid-answer each time, others' answers beside it; none of them can be gone on with."""
    beside = 3  # on two nodes: one of them is where it is
    until(pair.all_ready, "both nodes are in service", every=0.3)
    url, headers = pair.stack.url + GENERATE, pair.stack.headers()
    others = [f"{900 + number}. {PROMPTS[MODEL]}" for number in range(beside * 2)]

    def ask(
        prompt: str, tokens: int = 400, kills: bool = False, until_then: threading.Event | None = None
    ) -> list[str]:
        """An answer's lines; with `kills`, its node's runner is killed at the fourth."""
        # With what each token might have been: nobody could go on with it.
        body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "logprobs": True}
        body["options"] = {"temperature": 0, "num_predict": tokens}
        lines: list[str] = []
        with httpx.stream("POST", url, json=body, headers=headers, timeout=90) as answer:
            node = answer.headers.get("X-Corral-Node", "")
            for line in answer.iter_lines():
                lines.append(line)
                if until_then is not None:
                    until_then.set()
                if kills and len(lines) == 4:
                    kill(node, victims[node])
        return lines

    killed = 0
    for turn in range(2):
        victims = {name: pair.loaded(name, MODEL) for name in pair.servers}
        some = others[turn * beside : (turn + 1) * beside]
        with ThreadPoolExecutor(beside) as pool:
            begun = [threading.Event() for _ in some]
            asked = [pool.submit(ask, prompt, until_then=event) for prompt, event in zip(some, begun, strict=True)]
            for event in begun:
                assert event.wait(60)
            lines = ask("poison beside others", kills=True)
            killed += 1
            assert "unexpected EOF" in lines[-1]
            for one in asked:
                one.result()
    (line,) = ask("poison beside others")
    assert "present at 2 crashes" in line
    whole = [ask(prompt, tokens=4)[-1] for prompt in others]
    assert all(json_of(line).get("done") is True for line in whole), whole
    measured = f"400 after {killed} crashes; {len(whole)} others answered"
    matrix(f"prompt that a runner crashes under beside {beside} others", "refused after two crashes", measured)


def busy(pids: list[int]) -> bool:
    """Whether a process has used a tenth of a second of CPU since it was last looked at."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    before = _used.setdefault(tuple(pids), used)
    return used - before >= 0.1 * os.sysconf("SC_CLK_TCK")


_used: dict[tuple[int, ...], int] = {}
