"""Prompts that runners crash under, before two gateways with one runner: who is blamed, and who is not."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hiredis
import httpx
import pytest
from support.gateway import END, HEAD, LAST, LINE, FakeNode, Gateway, chunk, gateway, says
from support.process import until
from support.second import Second

from corral.store.lua import PREFIX
from corral.store.valkey import encode

GONE = b"an error was encountered while running the model: unexpected EOF"
KILLS, KILLS_LATE, READS, HOLDS = "kills", "kills late", "reads", "holds"
"""What a prompt has the runner do: crash at once or behind a token, read until told, give a token and hold."""

LOAD = 0.4
"""Seconds that a runner takes to be there again, as a small real one does."""


class Runner:
    """What a node does that has one runner: all ends that this runs. ``running`` are the prompts that it has."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._gone, self._go_on, self._kill = threading.Event(), threading.Event(), threading.Event()
        self._loaded = 0.0
        self.running: list[str] = []
        self.crashes = 0

    def __call__(self, connection: socket.socket) -> None:
        prompt = self._node.asked.body["messages"][-1]["content"]
        with self._lock:
            gone, go_on, kill, running = self._gone, self._go_on, self._kill, self.running
            running.append(prompt)
        time.sleep(max(0.0, self._loaded - time.monotonic()))
        try:
            last = self._answer(connection, prompt, gone, kill if prompt.startswith("kills") else go_on)
        finally:
            # Before its gateway can know: whoever comes next is not beside it.
            with self._lock:
                running.remove(prompt)
        connection.sendall(last)

    def _answer(self, connection: socket.socket, prompt: str, gone: threading.Event, go_on: threading.Event) -> bytes:
        what = prompt.partition(":")[0]
        if what in (HOLDS, KILLS_LATE):
            connection.sendall(HEAD + chunk(LINE % b"w0"))
        if what in (KILLS, KILLS_LATE):
            go_on.wait(60)
            with self._lock:
                self.running = []  # all that this one had
                self._gone, self._loaded = threading.Event(), time.monotonic() + LOAD
                gone.set()
                self.crashes += 1
        elif what in (READS, HOLDS):
            while not go_on.wait(0.01) and not gone.is_set():
                pass
        if not gone.is_set():
            begun = b"" if what == HOLDS else HEAD
            return begun + chunk(LAST % 1) + END
        if what in (HOLDS, KILLS_LATE):
            return chunk(b'{"error":"%b"}\n' % GONE) + END
        body = b'{"error":"%b"}' % GONE
        return b"HTTP/1.1 500 X\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def goes_on(self) -> None:
        """Whoever reads or holds comes to its end; who comes from now on waits anew."""
        with self._lock:
            before, self._go_on = self._go_on, threading.Event()
        before.set()

    def kill(self) -> None:
        """The same for who crashes it."""
        with self._lock:
            before, self._kill = self._kill, threading.Event()
        before.set()


class Site:
    """Two gateways, and a runner that both use."""

    def __init__(self, gw: Gateway, second: Second, pool: ThreadPoolExecutor) -> None:
        self.gw, self.second, self._pool = gw, second, pool
        self.runner = Runner(gw.nodes[0])
        gw.nodes[0].script = [self.runner] * 200
        gw.states = {gw.nodes[0].name: "ready", gw.nodes[1].name: "down"}
        gw.publish()
        second.knows()

    def post(self, prompt: str, url: str = "", begun: threading.Event | None = None) -> tuple[int, str]:
        """The status and last line of a stream that no other node could go on with; `begun` is set at its first one."""
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "format": "json"}
        url = (url or self.gw.url) + "/api/chat"
        lines = []
        with httpx.stream("POST", url, json=body, headers=self.gw.auth, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if begun is not None:
                    begun.set()
        return answer.status_code, lines[-1]

    def ask(self, prompt: str, url: str = "") -> Future[tuple[int, str]]:
        """The same, in the background, once it is at the runner, and has begun where it does."""
        begun = threading.Event()
        asked = self._pool.submit(self.post, prompt, url, begun)
        begins = prompt.startswith((HOLDS, KILLS_LATE))
        until(lambda: begun.is_set() if begins else prompt in self.runner.running, f"{prompt} runs")
        return asked

    def crash(self, *prompts: tuple[str, str]) -> list[tuple[int, str]]:
        """Have prompts run at once, at the gateways given, until one crashes it; what they heard."""
        crashes = self.runner.crashes
        asked = [self.ask(prompt, url) for prompt, url in prompts]
        self.runner.kill()
        until(lambda: self.runner.crashes > crashes, "it crashes")
        return [one.result() for one in asked]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as exits:
        gw = exits.enter_context(gateway(tmp_path, limits={"default": {"rpm": None, "tpm": None, "concurrency": None}}))
        gw.valkey.process.comes_first()  # a crash that it is not told of within 50 ms is no crash
        second = Second(gw, tmp_path)
        exits.callback(second.process.end)
        second.process.wait_until(second.up)
        yield Site(gw, second, exits.enter_context(ThreadPoolExecutor(16)))


def stored(gw: Gateway, *command: bytes) -> Any:
    """What the store answers to a command."""
    reader = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", urlsplit(gw.valkey.url).port or 0)) as store:
        store.sendall(encode(*command))
        while (reply := reader.gets()) is False:
            reader.feed(store.recv(4096))
    return reply


def prompts(gw: Gateway, what: str) -> int:
    """How many are "suspects", or "refused", as the store knows it; each gateway hears of it from there."""
    return int(stored(gw, b"ZCARD", PREFIX + what.encode()))


def trials(gw: Gateway) -> list[str]:
    """The runners that a suspect's attempt has, as the store knows it."""
    return [key.decode().rpartition(" ")[2] for key in stored(gw, b"KEYS", PREFIX + b"trial:*")]


def is_refused(answer: tuple[int, str]) -> bool:
    return answer[0] == 400 and "present at 2 crashes" in answer[1]


def well(answer: tuple[int, str]) -> bool:
    return answer[0] == 200 and json.loads(answer[1]).get("done") is True


def test_a_killer_is_refused_though_it_is_never_alone_and_those_beside_it_are_not(site: Site) -> None:
    killer = f"{KILLS_LATE}: a"
    for beside in ("b", "c"):
        told = site.crash((f"{HOLDS}: {beside}", site.gw.url), (killer, site.gw.url))
        assert all(status == 200 and "unexpected EOF" in line for status, line in told)
    assert site.runner.crashes == 2
    for url in (site.gw.url, site.second.url):
        until(lambda url=url: is_refused(site.post(killer, url)), "each gateway refuses it")  # type: ignore[misc]
    assert site.runner.crashes == 2, "it was tried a third time"
    for beside in ("b", "c"):
        asked = site.ask(f"{HOLDS}: {beside}", site.second.url)
        site.runner.goes_on()
        assert well(asked.result())


def test_an_innocent_prompt_that_is_alone_at_its_gateway_is_not_blamed(site: Site) -> None:
    killer, innocent = f"{KILLS_LATE}: a", f"{HOLDS}: b"
    for _ in range(2):
        site.crash((innocent, site.second.url), (killer, site.gw.url))
    asked = site.ask(innocent, site.second.url)
    site.runner.goes_on()
    assert well(asked.result())
    # It has come to its end: so it was the other one. Its gateway does not wait for that to be told before it answers.
    until(lambda: prompts(site.gw, "refused") == 1, "the store has it")
    for url in (site.gw.url, site.second.url):
        until(lambda url=url: is_refused(site.post(killer, url)), "each gateway refuses it")  # type: ignore[misc]
    assert site.runner.crashes == 2


def test_who_reads_beside_a_killer_is_tried_again_apart_from_it_and_answered(site: Site) -> None:
    """Both are retried, at two gateways, with one runner: the killer crashes it alone, and is known by that."""
    killer, innocent = f"{KILLS}: a", f"{READS}: b"
    asked = [site.ask(innocent, site.second.url), site.ask(killer, site.gw.url)]
    over = threading.Event()
    together: list[list[str]] = []

    def watch() -> None:
        while not over.wait(0.02):
            if site.runner.crashes == 1 and len(running := list(site.runner.running)) > 1:
                together.append(running)
            site.runner.goes_on()
            site.runner.kill()

    site.runner.kill()
    until(lambda: site.runner.crashes == 1, "it crashes")
    watching = threading.Thread(target=watch)
    watching.start()
    answers = [one.result() for one in asked]
    over.set()
    watching.join()
    assert together == []
    assert well(answers[0]), answers[0]
    assert (answers[1][0], site.runner.crashes) == (502, 2)
    assert is_refused(site.post(killer))


def test_a_killer_that_comes_again_is_known_before_it_is_tried_again(site: Site) -> None:
    """Its second crash is the first one of its second request, which is retried no more than that."""
    killer = f"{KILLS_LATE}: a"
    site.crash((killer, site.gw.url))
    # A gateway does not wait for that to be told before it answers.
    until(lambda: prompts(site.gw, "suspects") == 1, "the store has it")
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": killer}], "stream": False}
    ask: Callable[[], httpx.Response] = lambda: site.second.post(body)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        until(lambda: killer in site.runner.running, "it runs again")
        site.runner.kill()
        answer = asked.result()
    assert (answer.status_code, site.runner.crashes) == (502, 2)
    assert "the model's runner crashed (1 attempt)" in answer.json()["error"]
    assert is_refused(site.post(killer, site.second.url))


def test_a_batch_that_crashes_it_is_known_by_the_whole_of_its_request(site: Site) -> None:
    node = site.gw.nodes[0]

    def embeds(connection: socket.socket) -> None:
        vectors = [[float(text)] for text in node.asked.body["input"]]
        says(200, {"model": "m", "embeddings": vectors, "prompt_eval_count": 3})(connection)

    def crashes(connection: socket.socket) -> None:
        time.sleep(LOAD)
        says(500, {"error": GONE.decode()})(connection)

    def ask() -> httpx.Response:
        body = {"model": "m", "input": [str(number) for number in range(100)]}
        return httpx.post(site.gw.url + "/api/embed", json=body, headers=site.gw.auth, timeout=60)

    node.script = [embeds, crashes, crashes, embeds, embeds]
    assert ask().status_code == 502
    asked = len(node.requests)
    answer = ask()
    assert is_refused((answer.status_code, answer.text))
    assert len(node.requests) == asked


def test_who_waits_for_its_runner_hears_that_its_model_is_disabled(site: Site) -> None:
    prompts = f"{KILLS}: a", f"{READS}: b"
    asked = {prompt: site.ask(prompt, site.gw.url) for prompt in prompts}
    site.runner.kill()
    until(lambda: site.runner.crashes == 1 and len(site.runner.running) == 1, "one of them has it again")
    (runs,) = site.runner.running
    (waits,) = set(prompts) - {runs}
    site.gw.control.publish(disabled=["m:latest"])
    status, line = asked[waits].result()
    assert status == 403 and "disabled by its operator" in line
    assert site.runner.running == [runs]
    site.runner.goes_on()
    site.runner.kill()
    assert asked[runs].result()[0] == (200 if runs.startswith(READS) else 502)


def test_an_attempt_that_is_over_has_its_runner_no_longer(tmp_path: Path) -> None:
    """A suspect whose second node is gone goes on to a third: others may have the second one's runner."""
    nodes = [FakeNode(f"node-{number}") for number in (1, 2, 3)]
    asked: list[str] = []
    go_on = threading.Event()

    def act(node: FakeNode) -> Callable[[socket.socket], None]:
        def behaviour(connection: socket.socket) -> None:
            asked.append(node.name)
            if len(asked) == 1:
                says(500, {"error": GONE.decode()})(connection)
            elif len(asked) == 2:
                connection.close()
            elif len(asked) == 3:
                assert go_on.wait(60)
                connection.sendall(HEAD + chunk(LINE % b"w0") + chunk(LAST % 1) + END)

        return behaviour

    for node in nodes:
        node.script = [act(node)] * 3
    with gateway(tmp_path, nodes) as gw, ThreadPoolExecutor(1) as pool:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
        answer = pool.submit(httpx.post, gw.url + "/api/chat", json=body, headers=gw.auth, timeout=60)
        until(lambda: len(asked) == 3, "a third node is asked")
        held = trials(gw)
        go_on.set()
        assert answer.result().status_code == 200
    assert len(set(asked)) == 3
    assert held == asked[2:]
