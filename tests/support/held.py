"""Answers of a node that begin, and end when a test lets them; and where their model stands."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway
from support.leader import Leader
from support.process import until

MODEL = "m:latest"


class Held:
    """Node behaviour: an answer that begins, and ends when it is let go."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.began = 0
        self._lock = threading.Lock()
        self._free = threading.Semaphore(0)

    def __call__(self, connection: socket.socket) -> None:
        with self._lock:
            self.running += 1
            self.began += 1
            self.most = max(self.most, self.running)
        connection.sendall(HEAD + chunk(LINE % b"w0"))
        self._free.acquire()
        with self._lock:
            self.running -= 1
        connection.sendall(chunk(LAST % 1) + END)

    def release(self, count: int = 1) -> None:
        """Let so many end."""
        self._free.release(count)


def queueing(folder: Path, wait: str, length: int, **queue: str) -> AbstractContextManager[Gateway]:
    """A gateway whose queue is as long, and whose keys have no limits; `queue`: further settings of its queue."""
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    return gateway(folder, gateway={"queue": {"length": length, "wait": wait, **queue}}, limits=limits)


def leading(gw: Gateway, gateways: int = 1) -> Leader:
    """Who says what stands where, once the store grants slots and knows so many gateways."""
    # Who has no answer of it for 50 ms counts by itself until it is back, and heeds no leader meanwhile.
    gw.valkey.process.comes_first()
    made = Leader(gw.valkey.url)
    until(lambda: made.ask(b"EXISTS", b"corral:1:slots-grant"), "the store grants slots")
    until(lambda: made.ask(b"ZCARD", b"corral:1:gateways") == gateways, "the gateways are known")
    made.leads()
    return made


def placed(gw: Gateway, leader: Leader, slots: int, *nodes: str) -> None:
    """Have the model on these nodes alone, and the gateway know it: where the store stalls, its share is no other."""
    gw.slots = slots
    gw.states = {node.name: "ready" if node.name in nodes else "down" for node in gw.nodes}
    gw.publish()
    for node in nodes:
        leader.place(node, MODEL, slots)
    led(gw, leader)


def led(gw: Gateway, leader: Leader) -> None:
    """Wait until the gateway has seen that there is a leader: what it asks for is asked of the store."""

    def counted() -> bool:
        before = int(leader.ask(b"HGET", b"corral:1:asked", MODEL.encode()) or 0)
        assert gw.post().status_code == 200
        return int(leader.ask(b"HGET", b"corral:1:asked", MODEL.encode()) or 0) == before + 1

    until(counted, "the gateway asks the store")
    until(lambda: not leader.used(), "nothing runs")


def waited(error: str) -> int:
    """Whole seconds that a request without a slot says to have waited: more than it might, where a gateway halts."""
    said = re.search(r"no slot for 'm' within (\d+) s", error)
    assert said, error
    return int(said[1])


def hold(gw: Gateway, behaviour: Callable[[socket.socket], None], count: int = 40) -> None:
    """Have both nodes do so at the next requests."""
    for node in gw.nodes:
        node.script = [behaviour] * count
