"""A control with real Ollama nodes that begin with no model, and a private registry that has SmolLM2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from corral.stack import models
from support.control import Running
from support.process import Process, free_port, until
from support.registry import Registry, registry
from support.servers import MODEL, REPOSITORY, answers, ollama, ollama_program, python_env

SECONDS = 240.0
"""For what pulls a model, checks and loads it, on one processor that others use as well: some seconds, alone."""


def digests(url: str) -> dict[str, str]:
    """What a node holds: digests by name."""
    return {one["name"]: f"sha256:{one['digest']}" for one in httpx.get(url + "/api/tags").json()["models"]}


def resident(url: str) -> list[dict[str, Any]]:
    """What a node has in memory."""
    return list(httpx.get(url + "/api/ps").json()["models"])


class OllamaNode:
    """A real Ollama with a model folder of its own, that may be killed and started again."""

    def __init__(self, folder: Path, seed: Path | None = None) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir()
        if seed is not None:
            shutil.copytree(seed, folder / "models", copy_function=os.link)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        env = {
            **{"OLLAMA_HOST": f"127.0.0.1:{self.port}", "OLLAMA_MODELS": str(self._folder / "models")},
            **{"OLLAMA_NO_CLOUD": "1", "OLLAMA_NUM_PARALLEL": "1", "OLLAMA_KEEP_ALIVE": "60m"},
        }
        self.process = Process([ollama_program(), "serve"], self._folder / "ollama.log", env, 0)
        self.process.wait_until(lambda: answers(self.url + "/api/version"))

    def runners(self) -> list[int]:
        """Process ids of its runners."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        """kill -9, as a machine dies: its runners would outlive it by themselves."""
        runners = self.runners()
        self.process.end(signal.SIGKILL)
        for pid in runners:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Source:
    """A registry with two versions of a model; ``first`` and ``second`` are their digests once pulled."""

    def __init__(self, folder: Path, maker: str, registry: Registry) -> None:
        self.registry, self._maker = registry, maker
        for name, temperature in (("smollm2:first", 0.5), ("smollm2:second", 0.6)):
            body = {"model": name, "from": MODEL, "parameters": {"temperature": temperature}, "stream": False}
            httpx.post(maker + "/api/create", json=body, timeout=60).raise_for_status()
            registry.push(maker, name)
        self.publish("first")
        self.seed = folder / "seed/models"
        (folder / "seed").mkdir()
        with ollama(folder / "seed", store=self.seed) as node:
            for tag in ("first", "second"):
                name = f"{registry.name}/library/smollm2:{tag}"
                httpx.post(
                    node.url + "/api/pull", json={"model": name, "insecure": True, "stream": False}, timeout=60
                ).raise_for_status()
            found = digests(node.url)
            self.first, self.second = (found[f"{registry.name}/library/smollm2:{tag}"] for tag in ("first", "second"))
            copy = {"source": f"{registry.name}/library/smollm2:first", "destination": MODEL}
            httpx.post(node.url + "/api/copy", json=copy).raise_for_status()
            for name in found:
                httpx.request("DELETE", node.url + "/api/delete", json={"model": name}).raise_for_status()

    def publish(self, version: str) -> None:
        """Have the registry's smollm2:135m be this version."""
        self.registry.push(self._maker, f"smollm2:{version}", MODEL)


@contextlib.contextmanager
def source(folder: Path) -> Iterator[Source]:
    """A registry, and what is in it. Its versions are made on an Ollama of its own: others list what they have."""
    (folder / "maker").mkdir()
    with registry(folder) as served, ollama(folder / "maker", store=folder / "maker/models") as maker:
        models.install(maker.url, threads=1)
        yield Source(folder, maker.url, served)


class Site:
    """Control, its nodes, and the command line that asks it."""

    def __init__(self, folder: Path, source: Source, exits: ExitStack) -> None:
        self._folder, self.source, self._exits = folder, source, exits
        self.nodes: list[OllamaNode] = []

    def node(self, seeded: bool = False) -> OllamaNode:
        """Start a node; control does not know it yet. ``seeded``: it has the first version as smollm2:135m."""
        made = OllamaNode(self._folder / f"ollama-{len(self.nodes) + 1}", self.source.seed if seeded else None)
        self.nodes.append(made)
        self._exits.callback(lambda: made.process.end())
        return made

    def control(self, *models: dict[str, Any], slow: bool = False, **sections: Any) -> Running:
        """Start control with the nodes there are and a catalogue."""
        registry = self.source.registry.slow if slow else self.source.registry.name
        given = {"mirror": {"registry": registry, "insecure": True}, **sections}
        nodes = given.pop("nodes", [{"url": node.url} for node in self.nodes])
        self.running = Running(self._folder / "state", nodes=nodes, models=list(models), **given)
        self._exits.callback(self.running.close)
        return self.running

    def corral(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `corral` command that asks this control."""
        return self.start(*arguments).finish()

    def start(self, *arguments: str) -> Command:
        """The same, not waited for."""
        key = (self._folder / "state/admin.key").read_text().strip()
        command = Command(arguments, {"CORRAL_URL": self.running.url, "CORRAL_ADMIN_KEY": key})
        self._exits.callback(command.kill)
        return command

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Ask the admin API to do something."""
        return self.running.admin.post(f"/admin/{path}", json=body)

    def operation(self, operation: str) -> dict[str, Any]:
        """An operation as it is now."""
        return dict(self.running.admin.get(f"/admin/operations/{operation}").json())

    def begun(self, kind: str, node: str = "node-1") -> str:
        """The id of an operation of this kind on a node, once there is one."""

        def found() -> list[str]:
            listed = self.running.admin.get("/admin/operations").json()["operations"]
            return [
                one["id"]
                for one in listed
                if one["kind"] == kind and any(step["node"] == node for step in one["steps"])
            ]

        until(found, f"{kind} on {node} begins")
        return found()[-1]

    def ended(self, operation: str) -> dict[str, Any]:
        """An operation once it has ended."""
        until(lambda: self.operation(operation)["state"] != "running", f"{operation} ends", SECONDS)
        return self.operation(operation)

    def pulling(self, operation: str) -> None:
        """Wait until bytes of an operation's pull come in."""

        def comes() -> bool:
            shown = [step["progress"] or {} for step in self.operation(operation)["steps"]]
            return any(0 < one.get("completed", 0) < one.get("total", 0) for one in shown)

        until(comes, "the pull is half-way", SECONDS)


class Command:
    """A `corral` command that runs."""

    def __init__(self, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "corral", *arguments],
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            cwd=REPOSITORY,
            text=True,
            env={**clean, **python_env(), **env},
        )

    def kill(self) -> None:
        """kill -9."""
        self._popen.kill()
        self._popen.communicate()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for it; its status and what it said."""
        try:
            out, err = self._popen.communicate(timeout=SECONDS)
        finally:
            self._popen.kill()
        return subprocess.CompletedProcess(self._popen.args, self._popen.returncode, out, err)


@contextmanager
def site(folder: Path, source: Source) -> Iterator[Site]:
    """A site without nodes and without a control yet; all of it ends with the block."""
    with ExitStack() as exits:
        yield Site(folder, source, exits)
