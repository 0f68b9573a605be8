"""Requests whose nodes go before the first token: none is lost while a node is left, and none takes a fleet with it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.gateway import Behaviour, FakeNode, Gateway, gateway, well
from support.held import MODEL, leading
from support.process import until


@contextmanager
def fleet(folder: Path, count: int) -> Iterator[Gateway]:
    """So many nodes, with the model in the memory of each."""
    fakes = [FakeNode(f"node-{number}") for number in range(1, count + 1)]
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    with gateway(folder, fakes=fakes, limits=limits, gateway={"first_token": "1m"}) as gw:
        leader = leading(gw)
        for node in gw.nodes:
            leader.place(node.name, MODEL, 4)
        yield gw


def asked(gw: Gateway) -> list[str]:
    """The nodes that had a request."""
    return [node.name for node in gw.nodes if node.requests]


def dying(node: FakeNode, died: list[str], most: int) -> Behaviour:
    """A node that dies with its first request, unless so many have."""

    def behave(connection: socket.socket) -> None:
        if len(died) < most:
            died.append(node.name)
            node.stop()
        else:
            well(connection)

    return behave


def test_nodes_that_control_alone_calls_down_cost_a_request_nothing(tmp_path: Path) -> None:
    with fleet(tmp_path, 4) as gw, ThreadPoolExecutor(1) as pool:
        over = threading.Event()
        for node in gw.nodes:
            node.script = [lambda connection: over.wait(60)]  # it reads a long prompt, and is well
        answer = pool.submit(gw.post)
        called: list[str] = []
        for _ in range(3):
            until(lambda: set(asked(gw)) - set(called), "the next one has it")
            (name,) = set(asked(gw)) - set(called)
            called.append(name)
            if len(called) == 3:
                for node in gw.nodes:
                    if node.name not in called:
                        node.script = []
            gw.states[name] = "down"
            gw.publish()
        answered = answer.result()
        over.set()
        assert (answered.status_code, answered.headers["X-Corral-Attempts"]) == (200, "4"), answered.text
        assert answered.headers["X-Corral-Node"] not in called
        assert gw.retries("down") == 3
        assert gw.retries("reset") == 0


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_request_outlives_all_nodes_but_one(tmp_path: Path, deaths: int) -> None:
    with fleet(tmp_path, 4) as gw:
        died: list[str] = []
        for node in gw.nodes:
            node.script = [dying(node, died, deaths)]
        answered = gw.post()
        assert (answered.status_code, len(died)) == (200, deaths), answered.text
        assert answered.headers["X-Corral-Node"] not in died


def test_of_nodes_that_die_together_a_request_loses_but_two(tmp_path: Path) -> None:
    """They still take connections when the first have ended theirs: who went on at once would be on all of them."""
    with fleet(tmp_path, 6) as gw, ThreadPoolExecutor(1) as pool:
        ended = threading.Semaphore(0)

        def ends(connection: socket.socket) -> None:
            ended.release()
            connection.shutdown(socket.SHUT_RDWR)

        for node in gw.nodes:
            node.script = [ends] * 9
        answer = pool.submit(gw.post)
        for _ in range(2):
            assert ended.acquire(timeout=60)
        assert not ended.acquire(timeout=0.5), "it goes on at once"
        for node in gw.nodes[:5]:
            node.stop()
        gw.nodes[5].script = []
        answered = answer.result()
        assert (answered.status_code, answered.headers["X-Corral-Node"]) == (200, "node-6"), answered.text
        assert gw.retries("reset") == 2


def test_a_prompt_that_kills_its_nodes_is_on_four_of_them_at_most(tmp_path: Path) -> None:
    with fleet(tmp_path, 6) as gw:
        died: list[str] = []
        for node in gw.nodes:
            node.script = [dying(node, died, 6)]
        answered = gw.post()
        assert (answered.status_code, len(died)) == (502, 4)
        assert answered.json()["error"] == "the node's connection ended before its answer did (4 attempts)"
        for node in gw.nodes:
            node.script = []
        assert gw.post().status_code == 200, "others are served by the rest"
