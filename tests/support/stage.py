"""A stack whose parts a test may hurt, with Prometheus, Alertmanager and somebody who hears of the alerts."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import yaml

from corral.config.alertmanager import AlertmanagerPlan
from corral.config.alertmanager import render as render_alertmanager
from corral.config.prometheus import PrometheusPlan
from corral.config.prometheus import render as render_prometheus
from corral.config.values import database_url as address
from corral.stack.state import StateFolder
from support import monitoring
from support.fleet import SimulatedNode
from support.load import CHAT, Client, body_of
from support.postgres import Postgres, name_of, postgres
from support.process import Process, free_port, until
from support.receivers import Receivers, receivers
from support.servers import Server, python_env, valkey
from support.stack import Stack, stack

MODEL = "sim:latest"
LATE, SMALL = "late:latest", [f"small-{number}:latest" for number in range(12)]
SIMULATION = {
    "models": [
        {"name": MODEL, "load": 2.5, "prefill": 5000.0, "decode": 200.0, "slots": 8},
        # It reads a prompt so slowly that its first token comes beyond the objective's ten seconds.
        {"name": LATE, "load": 0.1, "prefill": 2.5, "decode": 200.0, "slots": 64},
        *({"name": name, "load": 0.02, "prefill": 5000.0, "decode": 5000.0} for name in SMALL),
    ],
    "max_loaded": 5,
}
CROWD, EVERY = 80, 0.25
"""Callers that come one after the other, seconds apart: more than the nodes have slots, and so many more that the queue
grows for longer than its alert takes. Once all are there it wavers: who was answered just now does not wait."""
SPOOL = 200_000
"""Bytes: some hundreds of records."""
RUNBOOKS = "https://runbooks.example/corral"
HASTE, LONGEST, WINDOW, AGE = 20.0, 5.0, 8.0, 15.0
"""A stage's rules take a twentieth of their time: what has to last for a minute has to last for three seconds.

What a window counts comes again before it is over: a gateway asks a runner that hangs anew each five seconds and more.
"""


def quick_prometheus(control: str, manager: Server, rules: Path) -> dict[str, Any]:
    """The stack's own prometheus.yml, with a scrape each second."""
    plan = PrometheusPlan(control, manager.url.removeprefix("http://"), str(rules / "*.yml"), RUNBOOKS)
    config: dict[str, Any] = yaml.safe_load(render_prometheus(plan))
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        for found in job.get("http_sd_configs", []):
            found["refresh_interval"] = "1s"
    return config


def quick_rules(folder: Path, factor: float, longest: float, window: float, age: float = math.inf) -> Path:
    """A folder with the rules, in a hurry."""
    made = folder / "rules"
    made.mkdir()
    for path in monitoring.RULES:
        text = path.read_text(encoding="utf-8")
        (made / path.name).write_text(monitoring.hasten(text, factor, longest, window, age))
    return made


@contextmanager
def quick_alertmanager(folder: Path, heard: Receivers) -> Iterator[Server]:
    """The committed Alertmanager, that waits for a second instead of half a minute, with ``heard`` as its receivers."""
    (folder / "webhook").write_text(heard.slack_url)
    plan = replace(AlertmanagerPlan(), control_url=heard.control_url, slack_webhook_file=str(folder / "webhook"))
    text = render_alertmanager(replace(plan, group_wait="1s", group_interval="1s"))
    with monitoring.alertmanager(folder, text.replace("group_interval: 15s", "group_interval: 1s")) as server:
        yield server


@dataclass(frozen=True)
class Fired:
    """An alert that fired and was over: seconds from what was done, and from its end, until control heard of it."""

    alert: str
    done: str
    firing: float
    resolved: float


class Crowd:
    """Callers of one model, each of whom asks again once answered; ``more`` adds one now and then."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self._url, self._key, self._body = url, key, body_of(CHAT, model, 4)
        self._callers: list[threading.Thread] = []
        self._over = threading.Event()
        self._latest = 0.0

    def more(self) -> None:
        """Add a caller, unless one has just come or all are there."""
        if len(self._callers) < CROWD and time.monotonic() - self._latest >= EVERY:
            self._latest = time.monotonic()
            self._callers.append(threading.Thread(target=self._ask, args=(len(self._callers),)))
            self._callers[-1].start()

    def end(self) -> None:
        """Have each leave after its answer."""
        self._over.set()
        for caller in self._callers:
            caller.join()

    def _ask(self, number: int) -> None:
        client = Client(self._url, self._key)
        while not self._over.is_set():
            client.ask(CHAT, self._body, f"crowd-{number}-{time.monotonic_ns()}")
        client.close()


@dataclass
class Stage:
    """What runs. A test leaves it whole."""

    stack: Stack
    nodes: dict[str, SimulatedNode]
    valkey: Server
    database: Postgres
    prometheus: Server
    manager: Server
    heard: Receivers
    folder: Path
    exits: ExitStack
    crowd: Crowd | None = None
    newer: Process | None = None
    session: psycopg.Connection[tuple[object, ...]] | None = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus has for an expression now."""
        return monitoring.query(self.prometheus.url, expression)

    def status(self) -> dict[str, Any]:
        """`corral status --json`."""
        told: dict[str, Any] = self.stack.corral("status")
        return told

    def key(self, name: str, *limits: str) -> str:
        """A new key that every gateway knows."""
        made = self.stack.corral("keys", "create", name, *limits)
        headers = {"Authorization": f"Bearer {made['key']}"}
        for gateway in self.status()["gateways"]:
            url = f"{gateway['url']}/api/tags"
            until(lambda url=url: httpx.get(url, headers=headers).status_code == 200, "the key is known")  # type: ignore[misc]
        return str(made["key"])

    def ask(self, count: int, key: str = "", tokens: int = 12) -> list[int]:
        """Ask ``count`` times, one after the other: the statuses."""
        client = Client(self.stack.url, key or self.stack.key)
        # Each something else: a prompt that is at two crashes is refused from then on.
        names = [f"stage-{time.monotonic_ns()}-{number}" for number in range(count)]
        try:
            return [client.ask(CHAT, body_of(CHAT, MODEL, tokens, f"Who is {name}?"), name).status for name in names]
        finally:
            client.close()

    def revive_valkey(self) -> None:
        """Start the Valkey that was killed again."""
        port = urlsplit(self.valkey.url).port
        self.valkey = self.exits.enter_context(valkey(self.folder, port))

    def come(self, model: str) -> None:
        """Have callers of a model come, more and more."""
        self.crowd = Crowd(self.stack.url, self.stack.key, model)

    def grow(self) -> None:
        """One more of them."""
        assert self.crowd is not None
        self.crowd.more()

    def leave(self) -> None:
        """They leave."""
        assert self.crowd is not None
        self.crowd.end()

    def hang_under_callers(self) -> None:
        """Have both nodes generate nothing any more, and callers come for whom they would."""
        for node in self.nodes.values():
            node.fault(kind="hang", model=MODEL)
        self.come(MODEL)

    def callers_go_on(self) -> None:
        """Have the nodes go on with what hangs; the callers leave when they have their answers."""
        for node in self.nodes.values():
            node.well()
        self.leave()

    def fill_valkey(self) -> None:
        """Leave Valkey hardly more memory than it uses now; it evicts nothing."""
        used = re.search(r"used_memory:(\d+)", self._valkey("INFO memory"))
        assert used is not None
        assert self._valkey(f"CONFIG SET maxmemory {int(used[1]) * 100 // 96}").startswith("+OK")

    def empty_valkey(self) -> None:
        """Give it as much as it wants."""
        assert self._valkey("CONFIG SET maxmemory 0").startswith("+OK")

    def _valkey(self, command: str) -> str:
        at = urlsplit(self.valkey.url)
        with socket.create_connection((at.hostname, at.port), timeout=60) as store:
            store.sendall(f"{command}\r\nQUIT\r\n".encode())
            return b"".join(iter(lambda: store.recv(65536), b"")).decode()

    def thrash(self, node: str) -> None:
        """Ask a node itself for more models than it holds."""
        for name in SMALL:
            body = {"model": name, "prompt": "a", "stream": False, "options": {"num_predict": 1}}
            httpx.post(f"{self.nodes[node].url}/api/generate", json=body, timeout=60).raise_for_status()

    def gpu_node(self) -> None:
        """Add a node that is said to have a GPU, and computes in main memory."""
        self.nodes["gpu"] = node = SimulatedNode("gpu", self.folder, SIMULATION)
        self.exits.callback(lambda: node.process.end(signal.SIGKILL))
        body = {"model": MODEL, "prompt": "a", "stream": False, "keep_alive": -1, "options": {"num_predict": 1}}
        httpx.post(f"{node.url}/api/generate", json=body, timeout=60).raise_for_status()
        self._admin("POST", "/admin/nodes", {"url": node.url, "name": "gpu", "accelerator": "gpu"})

    def no_gpu_node(self) -> None:
        """Take it out again."""
        self._admin("DELETE", "/admin/nodes/gpu")
        self.nodes.pop("gpu").kill()

    def record(self, count: int) -> None:
        """Have gateways write records: of requests for a model that there is not."""
        headers = {"Authorization": f"Bearer {self.stack.key}"}
        with httpx.Client(headers=headers, timeout=30) as client:
            for _ in range(count):
                client.post(self.stack.url + CHAT, json={"model": "none", "messages": []})

    def hold_records(self) -> None:
        """Lock the table that says which records there are, as a long statement does, and have some come."""
        self.session = self.database.connect(self._database_name)
        self.session.execute("BEGIN")
        self.session.execute("LOCK TABLE spool_watermarks IN EXCLUSIVE MODE")
        self.record(4)
        until(lambda: self.query("corral_spool_bytes > 0"), "a gateway has records that wait", every=0.3)

    def release_records(self) -> None:
        """End it."""
        assert self.session is not None
        self.session.close()

    def lead_elsewhere(self) -> None:
        """Be a control that holds the leader's lease and that nobody scrapes; as long as it is renewed."""
        lease = f"holder = 'elsewhere', until = {time.time() + 8.0}, term = term + 1"
        self.database.execute(f"UPDATE leases SET {lease} WHERE name = 'leader'", self._database_name)

    @property
    def _database_name(self) -> str:
        settings = yaml.safe_load((self.folder / "corral.yaml").read_text(encoding="utf-8"))
        return name_of(settings["store"]["database"])

    def no_nodes(self) -> None:
        """Take every node out."""
        for name in self.nodes:
            self._admin("DELETE", f"/admin/nodes/{name}")

    def nodes_again(self) -> None:
        """Bring them back."""
        for node in self.nodes.values():
            self._admin("POST", "/admin/nodes", {"url": node.url, "name": node.name, "slots": 24, "memory": 24 << 30})

    def no_file_of_checkpoints(self) -> None:
        """Put a folder in the place of the file that control appends checkpoints to."""
        file = self._checkpoints
        file.rename(file.with_suffix(".kept"))
        file.mkdir()

    def file_of_checkpoints(self) -> None:
        """Put it back."""
        file = self._checkpoints
        file.rmdir()
        file.with_suffix(".kept").rename(file)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "state/audit/checkpoints.jsonl"

    def newer_gateway(self) -> None:
        """Start a gateway of another version beside the others."""
        state = StateFolder(self.folder / "state")
        code = "import corral; corral.__version__ = '99.0'; from corral.cli.main import cli; cli()"
        argv = [sys.executable, "-P", "-c", code, "serve", "gateway", "--config", str(state.settings)]
        env = python_env() | {"CORRAL_GATEWAY__NAME": "gateway-99"}
        for name in ("LISTEN", "METRICS"):
            env[f"CORRAL_GATEWAY__{name}"] = f"127.0.0.1:{free_port()}"
        self.newer = Process(argv, self.folder / "gateway-99.log", env)

    def no_newer_gateway(self) -> None:
        """End it in order: nobody misses it."""
        assert self.newer is not None
        self.newer.end()

    def _admin(self, method: str, path: str, body: object = None) -> None:
        headers = {"Authorization": f"Bearer {self.stack.admin_key}"}
        httpx.request(method, self.stack.url + path, json=body, headers=headers, timeout=60).raise_for_status()

    def backup(self, age: float | None, record: str = "backup") -> None:
        """Have the last backup (or ``drill``) be ``age`` seconds old; None: there is none."""
        path = self.folder / f"state/{record}.json"
        if age is None:
            path.unlink()
        else:
            path.write_text(json.dumps({"last_success": time.time() - age}))

    def alerts(self) -> dict[str, list[tuple[str, str]]]:
        """Each alert that there is, and how it stands: by Prometheus, and by Alertmanager, who may hold it back."""
        here = [(one["metric"]["alertname"], one["metric"]["alertstate"]) for one in self.query("ALERTS")]
        told = httpx.get(f"{self.manager.url}/api/v2/alerts", timeout=60).json()
        return {
            "Prometheus": sorted(here),
            "Alertmanager": sorted((one["labels"]["alertname"], one["status"]["state"]) for one in told),
        }

    def quiet(self) -> bool:
        """Whether nothing fires or is about to."""
        return not self.query("ALERTS")


def pause(pid: int, number: int = signal.SIGSTOP) -> None:
    """Stop (or SIGCONT: continue) a process and its children: it is there, and does not answer."""
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        each.send_signal(number)


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """The stage, quiet; ended with the block."""
    with ExitStack() as exits:
        nodes = {name: SimulatedNode(name, folder, SIMULATION) for name in ("node-1", "node-2")}
        for node in nodes.values():
            exits.callback(lambda node=node: node.process.end(signal.SIGKILL))  # type: ignore[misc]
        store = exits.enter_context(valkey(folder))
        database = exits.enter_context(postgres())
        heard = exits.enter_context(receivers())
        manager = exits.enter_context(quick_alertmanager(folder, heard))
        settings = {
            "monitoring": {"alertmanager": manager.url},
            "nodes": [{"name": node.name, "url": node.url, "slots": 24, "memory": "24GiB"} for node in nodes.values()],
            "gateway": {"processes": 2, "first_token": "25s", "between_tokens": "3s", "spool_max": SPOOL},
            "audit": {"checkpoint": "1s", "webhook": heard.checkpoints_url},
            "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
            "store": {"valkey": store.url, "database": address(database.database())},
            "control": {"canary": {"interval": "1s", "timeout": "2s"}},
        }
        config = folder / "corral.yaml"
        config.write_text(yaml.safe_dump(settings))
        made = exits.enter_context(stack(folder / "state", "--config", str(config)))
        metrics = urlsplit((StateFolder(folder / "state").stack() or {})["control"]["metrics"]).netloc
        rules = quick_rules(folder, HASTE, LONGEST, WINDOW, AGE)
        prometheus = exits.enter_context(monitoring.prometheus(folder, quick_prometheus(metrics, manager, rules)))
        whole = Stage(made, nodes, store, database, prometheus, manager, heard, folder, exits)
        whole.backup(age=60)
        whole.backup(age=60, record="drill")
        whole.ask(8)
        until(lambda: len(whole.query("up == 1")) == 8, "Prometheus has every target", 120, every=0.3)
        yield whole
