"""A real gateway behind a real HAProxy and a real Valkey, with nodes and a control that do as a test says."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from corral.config.haproxy import HaproxyPlan, render
from corral.stack import binaries
from corral.store import keys
from support.fakecontrol import FakeControl
from support.metrics import page
from support.process import Process, free_port, until
from support.servers import Server, python_env, valkey

LINE = (
    b'{"model":"m:latest","created_at":"2026-11-23T15:00:00.1Z","message":{"role":"assistant","content":"%b"},'
    b'"done":false}\n'
)
LAST = (
    b'{"model":"m:latest","created_at":"2026-11-23T15:00:01.1Z","message":{"role":"assistant","content":""},'
    b'"done":true,"done_reason":"stop","total_duration":9,"load_duration":1,"prompt_eval_count":7,'
    b'"prompt_eval_duration":2,"eval_count":%d,"eval_duration":5}\n'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

Behaviour = Callable[[socket.socket], None]


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(words: int = 3) -> bytes:
    """A whole streamed answer of a node."""
    return HEAD + b"".join(chunk(LINE % b"w%d " % n) for n in range(words)) + chunk(LAST % words) + END


def well(connection: socket.socket) -> None:
    """What a node does that is not told otherwise."""
    connection.sendall(answer())


def says(status: int, body: dict[str, Any]) -> Behaviour:
    """A node that answers with an error."""
    text = json.dumps(body).encode()
    return lambda connection: connection.sendall(
        b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(text), text)
    )


class Asked(threading.local):
    """The request that a node's thread answers."""

    headers: dict[bytes, bytes]
    body: dict[str, Any]


class FakeNode:
    """A node: answers health checks, and each request as the next behaviour says (`well` when there is none).

    ``models`` are what it says to hold, all in memory; ``asked`` is for a behaviour: the request that it answers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.script: list[Behaviour] = []
        self.requests: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []
        self.asked = Asked()
        self.ended = threading.Event()
        """Set when a request's connection was closed by the other side while a behaviour waited for that."""
        self.port = free_port()
        self._connections: set[socket.socket] = set()
        self._start()

    def _start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        """Take connections again."""
        self._start()

    def wait_for_close(self, connection: socket.socket) -> None:
        """Block until the other side closes."""
        with suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
        self.ended.set()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        buffer = b""
        self._connections.add(connection)
        with connection:
            while True:
                try:
                    while b"\r\n\r\n" not in buffer:
                        buffer += _more(connection)
                    head, _, buffer = buffer.partition(b"\r\n\r\n")
                    first, *lines = head.split(b"\r\n")
                    headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
                    length = int(headers.get(b"content-length", b"0"))
                    while len(buffer) < length:
                        buffer += _more(connection)
                    body, buffer = buffer[:length], buffer[length:]
                    if first.startswith(b"GET "):
                        told = json.dumps({"version": "0.17.4", "models": self.models}).encode()
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
                        continue
                    self.asked.headers, self.asked.body = headers, json.loads(body)
                    self.requests.append({"line": first.decode(), "headers": headers, "body": self.asked.body})
                    self._next()(connection)
                except OSError:
                    return

    def _next(self) -> Behaviour:
        with suppress(IndexError):  # a test may clear it at any moment
            return self.script.pop(0)
        return well


def _more(connection: socket.socket) -> bytes:
    """What comes next; ConnectionError where nothing does any more."""
    data = connection.recv(65536)
    if not data:
        raise ConnectionError
    return data


class Gateway:
    """The gateway under test and all around it."""

    def __init__(
        self, folder: Path, stack: ExitStack, settings: dict[str, Any], nodes: list[FakeNode] | None = None
    ) -> None:
        self.folder = folder
        self._stack = stack
        (folder / "pepper").write_text(os.urandom(32).hex())
        (folder / "internal.token").write_text("t0ken")
        self.pepper = keys.read_pepper(folder / "pepper")
        self.control = FakeControl("t0ken")
        stack.callback(self.control.stop)
        self.nodes = nodes or [FakeNode("node-1"), FakeNode("node-2")]
        self.valkey: Server = stack.enter_context(valkey(folder))
        self.key_id, self.key = keys.generate()
        self._keys = [self.entry(self.key_id, self.key, rpm=100_000, concurrency=1000)]
        self._ports = [free_port() for _ in range(5)]
        self.port, edge, nodes, stats, self._metrics = self._ports
        self.url = f"http://127.0.0.1:{self.port}"
        self.edge = f"http://127.0.0.1:{edge}"
        self.states = {node.name: "ready" for node in self.nodes}
        self.slots = 4
        self.publish()
        self.plan = HaproxyPlan(
            edge_host="127.0.0.1",
            edge_port=edge,
            nodes_host="127.0.0.1",
            nodes_port=nodes,
            stats_host="127.0.0.1",
            stats_port=stats,
            stats_socket=str(folder / "s.sock"),
            gateways=[("gateway-1", "127.0.0.1", self.port)],
            control=("127.0.0.1", self.control.port),
            nodes=[(node.name, node.url) for node in self.nodes],
            max_duration=60.0,
        )
        (folder / "haproxy.cfg").write_text(render(self.plan))
        self._file = folder / "corral.yaml"
        base = {
            "gateway": {
                "listen": f"127.0.0.1:{self.port}",
                "metrics": f"127.0.0.1:{self._metrics}",
                "nodes_url": f"http://127.0.0.1:{nodes}",
                "control_url": f"http://127.0.0.1:{self.control.port}",
                "spool": str(folder / "spool"),
                "cache": str(folder / "cache"),
                "access_log": str(folder / "access.log"),
                **settings.pop("gateway", {}),
            },
            "store": {"valkey": self.valkey.url},
            "auth": {
                "pepper_file": str(folder / "pepper"),
                "internal_token_file": str(folder / "internal.token"),
                **settings.pop("auth", {}),
            },
            **settings,
        }
        self._file.write_text(yaml.safe_dump(base))
        self.haproxy = Process([binaries.haproxy(), "-db", "-f", folder / "haproxy.cfg"], folder / "haproxy.log")
        stack.callback(self.haproxy.end)
        self.start()
        until(lambda: httpx.get(self.edge + "/health").status_code == 200, "the edge sees the gateway")

    def start(self, small_disk: str = "", patch: str = "", seen: Sequence[str] = ()) -> None:
        """Start the gateway's process.

        `small_disk`: its spool is on a disk of this size of its own (`mount`); `patch`: what it runs before anything;
        `seen`: what its command begins with, to see a disk that there is already.
        """
        begins = ["-c", f"{patch}\nfrom corral.cli.main import cli; cli()"] if patch else ["-m", "corral"]
        argv = [sys.executable, *begins, "serve", "gateway", "--config", str(self._file)]
        argv = [*seen, *argv]
        if small_disk:
            (self.folder / "spool").mkdir(exist_ok=True)
            mount = f"mount -t tmpfs -o size={small_disk} spool '{self.folder}/spool' && exec \"$@\""
            argv = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *argv]
        self.process = Process(argv, self.folder / "gateway.log", python_env())
        process = self.process
        self._stack.callback(lambda: process.end(signal.SIGKILL))
        self.process.wait_until(self._up)

    def _up(self) -> bool:
        try:
            return httpx.get(self.url + "/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def has(self, node: FakeNode) -> bool:
        """Whether HAProxy has a node in service."""
        url = f"http://127.0.0.1:{self.plan.nodes_port}/api/version"
        return httpx.get(url, headers={"X-Corral-Node": node.name}).status_code == 200

    def admitted_locally(self) -> float:
        """Requests that were admitted without the store: on a machine that halts for 50 ms, some are."""
        return self.metric("corral_local_admissions_total")

    def metric(self, name: str) -> float:
        """A metric without labels."""
        return page(f"http://127.0.0.1:{self._metrics}/metrics").value(name)

    def retries(self, reason: str) -> float:
        """Attempts that were made because one before failed so."""
        return page(f"http://127.0.0.1:{self._metrics}/metrics").value("corral_retries_total", reason=reason)

    def spooled(self) -> int:
        """Bytes of its spool's segments."""
        return sum(path.stat().st_size for path in (self.folder / "spool").rglob("*.seg"))

    def entry(self, key_id: str, text: str, **more: Any) -> dict[str, Any]:
        """A key as the snapshot has it."""
        verifiers = [keys.verifier(self.pepper, text)]
        return {"id": key_id, "name": key_id, "role": "inference", "verifiers": verifiers, "models": ["*"]} | more

    def new_key(self, **more: Any) -> str:
        """Make a key known; returns it."""
        key_id, text = keys.generate()
        self._keys.append(self.entry(key_id, text, **more))
        self.publish()
        return text

    def revoke_last_key(self) -> None:
        """What `new_key` made last is no key any more."""
        self._keys.pop()
        self.publish()

    def publish(
        self, versions: dict[str, str] | None = None, tags: list[dict[str, Any]] | None = None, known: bool = True
    ) -> None:
        """Tell the gateway of keys and nodes, and wait until it has them, where it can (`known`)."""
        tags = tags or [{"name": "m:latest", "model": "m:latest", "modified_at": "2026-11-23T15:00:00Z", "size": 1}]
        nodes = [
            {
                "name": node.name,
                "url": node.url,
                "slots": self.slots,
                "state": self.states[node.name],
                "version": (versions or {}).get(node.name, "0.17.4"),
                "tags": tags,
                "ps": [],
            }
            for node in self.nodes
        ]
        self.control.publish(keys=list(self._keys), nodes=nodes)
        if known and hasattr(self, "process"):
            self.control.until_known()

    def forget(self) -> None:
        """Have the nodes be well, and know of no request: who shares a gateway begins with that."""
        for node in self.nodes:
            node.script.clear()
            node.requests.clear()
            node.ended.clear()

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def chat(self, **more: Any) -> dict[str, Any]:
        """A chat body; its prompt can stand in no identifier, so a test can look for it in logs."""
        return {"model": "m", "messages": [{"role": "user", "content": "Guten Tag!"}]} | more

    def post(self, path: str = "/api/chat", body: Any = None, **more: Any) -> httpx.Response:
        """POST to the gateway itself."""
        headers, timeout = self.auth | more.pop("headers", {}), more.pop("timeout", 60)
        return httpx.post(
            self.url + path, json=body or self.chat(stream=False), headers=headers, timeout=timeout, **more
        )


@contextmanager
def gateway(folder: Path, fakes: list[FakeNode] | None = None, **settings: Any) -> Iterator[Gateway]:
    """Everything, started; ended with the block. `fakes`: its nodes, where a control has to know them before."""
    with ExitStack() as stack:
        yield Gateway(folder, stack, settings, fakes)
