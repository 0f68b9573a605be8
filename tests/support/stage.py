"""A stack whose parts a test may hurt, with Prometheus, Alertmanager and somebody who hears of the alerts."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import yaml

from corral.config.alertmanager import AlertmanagerPlan
from corral.config.alertmanager import render as render_alertmanager
from corral.config.prometheus import PrometheusPlan
from corral.config.prometheus import render as render_prometheus
from corral.stack.state import StateFolder
from support import monitoring
from support.fleet import SimulatedNode
from support.load import CHAT, Client, body_of
from support.process import until
from support.receivers import Receivers, receivers
from support.servers import Server, valkey
from support.stack import Stack, stack

MODEL = "sim:latest"
SIMULATION = {"models": [{"name": MODEL, "load": 2.5, "prefill": 5000.0, "decode": 200.0, "slots": 8}]}
RUNBOOKS = "https://runbooks.example/corral"
HASTE, LONGEST = 20.0, 5.0
"""A stage's rules take a twentieth of their time: what has to last for a minute has to last for three seconds."""


def quick_prometheus(control: str, manager: Server, rules: Path) -> dict[str, Any]:
    """The stack's own prometheus.yml, with a scrape each second."""
    plan = PrometheusPlan(control, manager.url.removeprefix("http://"), str(rules / "*.yml"), RUNBOOKS)
    config: dict[str, Any] = yaml.safe_load(render_prometheus(plan))
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        for found in job.get("http_sd_configs", []):
            found["refresh_interval"] = "1s"
    return config


def quick_rules(folder: Path, factor: float, longest: float) -> Path:
    """A folder with the rules, in a hurry."""
    made = folder / "rules"
    made.mkdir()
    for path in monitoring.RULES:
        (made / path.name).write_text(monitoring.hasten(path.read_text(encoding="utf-8"), factor, longest))
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


@dataclass
class Stage:
    """What runs. A test leaves it whole."""

    stack: Stack
    nodes: dict[str, SimulatedNode]
    valkey: Server
    prometheus: Server
    manager: Server
    heard: Receivers
    folder: Path
    exits: ExitStack

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
        try:
            body = body_of(CHAT, MODEL, tokens)
            return [client.ask(CHAT, body, f"stage-{time.monotonic_ns()}").status for _ in range(count)]
        finally:
            client.close()

    def revive_valkey(self) -> None:
        """Start the Valkey that was killed again."""
        port = urlsplit(self.valkey.url).port
        self.valkey = self.exits.enter_context(valkey(self.folder, port))

    def backup(self, age: float | None, record: str = "backup") -> None:
        """Have the last backup (or ``drill``) be ``age`` seconds old; None: there is none."""
        path = self.folder / f"state/{record}.json"
        if age is None:
            path.unlink()
        else:
            path.write_text(json.dumps({"last_success": time.time() - age}))

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
        settings = {
            "nodes": [{"name": node.name, "url": node.url, "slots": 8, "memory": "24GiB"} for node in nodes.values()],
            "gateway": {"processes": 2, "first_token": "8s", "between_tokens": "3s"},
            "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
            "store": {"valkey": store.url},
            "control": {"canary": {"interval": "1s", "timeout": "2s"}},
        }
        config = folder / "corral.yaml"
        config.write_text(yaml.safe_dump(settings))
        made = exits.enter_context(stack(folder / "state", "--config", str(config)))
        heard = exits.enter_context(receivers())
        manager = exits.enter_context(quick_alertmanager(folder, heard))
        metrics = urlsplit((StateFolder(folder / "state").stack() or {})["control"]["metrics"]).netloc
        rules = quick_rules(folder, HASTE, LONGEST)
        prometheus = exits.enter_context(monitoring.prometheus(folder, quick_prometheus(metrics, manager, rules)))
        whole = Stage(made, nodes, store, prometheus, manager, heard, folder, exits)
        whole.backup(age=60)
        whole.backup(age=60, record="drill")
        whole.ask(8)
        until(lambda: len(whole.query("up == 1")) == 8, "Prometheus has every target", 30, every=0.3)
        yield whole
