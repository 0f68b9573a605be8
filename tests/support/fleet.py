"""A whole stack over simulated nodes and a Valkey that a test may kill, stop and start again."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from corral.stack.state import StateFolder
from corral.store.budget import GRANTS
from support.load import Client, Load
from support.metrics import page
from support.process import Process, free_port, until
from support.servers import Server, answers, python_env, valkey
from support.stack import Stack, stack

MODEL, SINGLE, QUICK = "sim:latest", "single:latest", "quick:latest"
SIMULATION = {
    "models": [
        # A third of a request's time is before its first token.
        {"name": MODEL, "load": 0.1, "prefill": 120.0, "decode": 40.0, "slots": 64},
        # One at a time, and for long: who comes second sees whether the first has left.
        {"name": SINGLE, "load": 0.1, "prefill": 5000.0, "decode": 20.0, "slots": 1, "tokens": 2000},
        {"name": QUICK, "load": 0.1, "prefill": 50000.0, "decode": 2000.0, "slots": 64},
    ]
}


class SimulatedNode:
    """A node in a process of its own, always at the same port."""

    def __init__(self, name: str, folder: Path, simulation: dict[str, Any] = SIMULATION) -> None:
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        (folder / "simulation.json").write_text(json.dumps(simulation))
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = Process(self.command("127.0.0.1"), self._folder / f"{self.name}.log", python_env())
        self.process.wait_until(lambda: answers(self.url + "/api/version"))

    def command(self, host: str) -> list[str]:
        """What runs it."""
        argv = [sys.executable, "-m", "corral", "serve", "node", "--listen", f"{host}:{self.port}"]
        return [*argv, "--backend", "simulated", "--simulated", str(self._folder / "simulation.json")]

    def kill(self) -> None:
        """kill -9."""
        self.process.end(signal.SIGKILL)

    def fault(self, **fault: Any) -> None:
        """Have it do something wrong from now on (corral/node/faults.py)."""
        httpx.post(self.url + "/simulated/faults", json=fault).raise_for_status()

    def work(self, model: str = MODEL) -> dict[str, int]:
        """What it does of a model, by its own word (corral/node/work.py); all 0 before it was asked for anything."""
        told = httpx.get(self.url + "/simulated/work").json()["models"]
        return dict(told.get(model) or {"running": 0, "most": 0, "tokens": 0, "loads": 0})

    def count_anew(self) -> None:
        """Have the most at once, tokens and loads begin again."""
        httpx.delete(self.url + "/simulated/work").raise_for_status()

    def well(self) -> None:
        """Have it do nothing wrong any more."""
        httpx.delete(self.url + "/simulated/faults").raise_for_status()


class Fleet:
    """Edge, two gateways, control, two nodes. A test leaves it as it found it."""

    def __init__(
        self,
        folder: Path,
        exits: ExitStack,
        patience: str = "3s",
        first: SimulatedNode | None = None,
        nodes: Sequence[SimulatedNode] = (),
        slots: int = 64,
        memory: str = "",
        canary: str = "15s",
        database: str = "",
        **gateway: Any,
    ) -> None:
        """``patience``: longest wait for a token; ``first``: the node that is node-1; ``nodes``: all of them; ``slots``
        and ``memory`` of each; ``canary``: between two of control's; ``database``: its URL; ``gateway``: more of its
        settings.
        """
        self.folder = folder
        self._exits = exits
        self.nodes: dict[str, SimulatedNode] = {}
        if first is not None:
            self.take(first)
        elif not nodes:
            self.node("node-1")
        for node in nodes:
            self.take(node)
        if not nodes:
            self.node("node-2")
        self.valkey: Server = exits.enter_context(valkey(folder))
        config = folder / "corral.yaml"
        settings: dict[str, Any] = {
            "gateway": {"processes": 2, "first_token": patience, "between_tokens": patience, **gateway},
            "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
            "store": {"valkey": self.valkey.url} | ({"database": database} if database else {}),
            "control": {"canary": {"interval": canary}},
        }
        # As many at once as the simulated models take: who waits, waits at the node.
        each = {"slots": slots} | ({"memory": memory} if memory else {})
        settings["nodes"] = [{"name": node.name, "url": node.url, **each} for node in self.nodes.values()]
        config.write_text(yaml.safe_dump(settings))
        self.stack: Stack = exits.enter_context(stack(folder / "state", "--config", str(config)))
        self.warm()

    def node(self, name: str) -> SimulatedNode:
        """Start one more node; the fleet does not know it yet."""
        return self.take(SimulatedNode(name, self.folder))

    def take(self, node: SimulatedNode) -> SimulatedNode:
        """Have a node end with the fleet."""
        self.nodes[node.name] = node
        self._exits.callback(lambda: node.process.end(signal.SIGKILL))
        return node

    def warm(self) -> None:
        """Load each model on each node."""
        for node in self.nodes.values():
            for model in (MODEL, SINGLE, QUICK):
                options = {"num_predict": 1}
                httpx.post(node.url + "/api/generate", json={"model": model, "prompt": "a", "options": options})

    def load(self, model: str = MODEL, **more: Any) -> Load:
        """Callers at the edge."""
        return Load(self.stack.url, self.stack.key, model, **more)

    @contextmanager
    def unsupervised(self) -> Iterator[None]:
        """Nothing of the stack that ends meanwhile is started again."""
        pid = int((self.folder / "state/run/supervisord.pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        try:
            stat = Path(f"/proc/{pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the supervisor stands still")
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def client(self, key: str = "") -> Client:
        """One caller at the edge."""
        return Client(self.stack.url, key or self.stack.key)

    def key(self, name: str, *limits: str) -> str:
        """A key with limits of its own."""
        made = self.stack.corral("keys", "create", name, *limits)
        headers = {"Authorization": f"Bearer {made['key']}"}
        gateways = [gateway["url"] for gateway in self.stack.corral("status")["gateways"]]
        for url in gateways:
            until(
                lambda url=url: httpx.get(url + "/api/tags", headers=headers).status_code == 200, f"{url} has the key"
            )  # type: ignore[misc]
        return str(made["key"])

    def sum_of(self, name: str) -> float:
        """A metric, of all gateways together."""
        return self.stack.sum_of(name)

    def states(self) -> dict[str, str]:
        """The nodes' states, as control has them."""
        return {node["name"]: node["state"] for node in self.stack.listed("nodes")}

    def control_says(self, name: str) -> float:
        """A metric of control's."""
        return page(self._parts()["control"]["metrics"]).value(name)

    def gateway_says(self, gateway: str, name: str) -> float:
        """A metric of one gateway's."""
        (url,) = [entry["metrics"] for entry in self._parts()["gateways"] if entry["name"] == gateway]
        return page(url).value(name)

    def node_says(self, node: str, name: str, **labels: str) -> float:
        """A metric of a node's; 0 where it is not there."""
        seen = page(f"{self._parts()['control']['metrics']}/nodes/{node}")
        return seen.value(name, **labels) if seen.has(name) else 0.0

    def holders(self, model: str) -> set[str]:
        """The nodes that hold a model, as control has them."""
        return {node["name"] for node in self.stack.listed("nodes") if model in node["models"]}

    def residents(self, model: str) -> set[str]:
        """The nodes that have a model in memory, as control has them."""
        return {node["name"] for node in self.stack.listed("nodes") if model in node["resident"]}

    def reasons(self) -> dict[str, str]:
        """Why the nodes are in their states."""
        return {node["name"]: node["reason"] or "" for node in self.stack.listed("nodes")}

    def all_ready(self) -> None:
        """Wait until each node and gateway is in use: by control, by both gateways, and by HAProxy's own checks."""
        until(self._in_use, "every node and gateway is in use", 120, every=0.1)

    def heard(self) -> bool:
        """Whether every gateway has what control tells now."""
        return all(gateway["current"] for gateway in self._status().json()["gateways"])

    def _status(self) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.stack.admin_key}"}
        return httpx.get(self.stack.url + "/admin/status", headers=headers, timeout=30)

    def _in_use(self) -> bool:
        answer = self._status()
        if answer.status_code != 200:
            return False
        told = answer.json()
        return (
            {node["state"] for node in told["nodes"]} == {"ready"}
            and [(gateway["state"], gateway["current"]) for gateway in told["gateways"]] == [("ready", True)] * 2
            and self._checked() >= {f"node_{node['name']}" for node in told["nodes"]} | {"gateways"}
            and self.store_used()
        )

    def _checked(self) -> set[str]:
        """HAProxy's back ends whose servers have passed their checks, all of them."""
        rows = self._servers()
        return {row["pxname"] for row in rows} - {row["pxname"] for row in rows if row["status"] != "UP"}

    def edge_says(self, gateway: str) -> str:
        """HAProxy's word on a gateway: UP, DOWN, or NOLB where it is sent nobody, with a count while it may change."""
        (status,) = [row["status"] for row in self._servers() if row["svname"] == gateway]
        return status

    def edge_does(self, command: str) -> None:
        """A command of HAProxy's own, by its socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(StateFolder(self.folder / "state").socket("haproxy.sock")))
            connection.sendall(command.encode() + b"\n")
            assert connection.recv(1024).strip() == b""

    def sessions(self) -> dict[str, int]:
        """How many requests HAProxy has with each gateway: the next one goes where there are fewest."""
        return {row["svname"]: int(row["scur"]) for row in self._servers() if row["pxname"] == "gateways"}

    def _servers(self) -> list[dict[str, str]]:
        """What HAProxy counts of each server."""
        answer = httpx.get(self._parts()["stats_url"] + "/;csv", timeout=30)
        return [row for row in csv.DictReader(answer.text.lstrip("# ").splitlines()) if row["type"] == "2"]

    def _parts(self) -> dict[str, Any]:
        return StateFolder(self.folder / "state").stack() or {}

    def canary_asked(self, node: str) -> None:
        """Wait until control's canary has just asked a node: for some ten seconds its requests are callers' alone."""
        url, name = self._parts()["control"]["metrics"], "corral_node_canary_last_success_timestamp_seconds"

        def asked() -> bool:
            seen = page(f"{url}/nodes/{node}")
            return seen.has(name) and time.time() - seen.value(name) < 3

        until(asked, f"the canary asks {node}", 120, every=0.2)

    def records(self, *request_ids: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The audit records of requests once all of them have ended, in this order."""
        return self._listed(request_ids, seconds, ended=True)

    def admitted(self, *request_ids: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The same, of requests that may never have ended."""
        return self._listed(request_ids, seconds, ended=False)

    def _listed(self, request_ids: Sequence[str], seconds: float, ended: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}

        def there() -> bool:
            listed = self.stack.listed("audit", limit=1000)
            found.update({row["request_id"]: row for row in listed if row["outcome"] is not None or not ended})
            return found.keys() >= set(request_ids)

        until(there, f"the records of {len(request_ids)} requests", seconds, every=0.2)
        return [found[request_id] for request_id in request_ids]

    def present_gateways(self) -> int:
        """How many gateways are in the store; 0 where it does not answer."""
        return self._counted(b"ZCARD corral:1:gateways\r\n")

    def store_used(self) -> bool:
        """Whether both gateways are in the store, and it admits requests."""
        return self.present_gateways() == 2 and self._counted(b"EXISTS %b\r\n" % GRANTS) == 1

    def _counted(self, command: bytes) -> int:
        with self.valkey_client() as store:
            store.sendall(command)
            reply = store.recv(64)
        return int(reply[1:]) if reply.startswith(b":") else 0

    def valkey_client(self) -> socket.socket:
        """A connection to the store."""
        address = urlsplit(self.valkey.url)
        return socket.create_connection((address.hostname, address.port), timeout=10)

    def enter(self, manager: AbstractContextManager[Server]) -> Server:
        """Start something that ends with the fleet."""
        return self._exits.enter_context(manager)


@contextmanager
def fleet(
    folder: Path,
    patience: str = "3s",
    first: SimulatedNode | None = None,
    nodes: Sequence[SimulatedNode] = (),
    slots: int = 64,
    memory: str = "",
    canary: str = "15s",
    database: str = "",
    **gateway: Any,
) -> Iterator[Fleet]:
    """The fleet, started; ended with the block."""
    with ExitStack() as exits:
        yield Fleet(folder, exits, patience, first, nodes, slots, memory, canary, database, **gateway)
