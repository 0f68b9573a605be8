"""The runner process: one model in llama.cpp, served over a Unix socket to the node that started it.

It prints "ready" once it can answer and lives until the node ends it, closes its standard input, or dies.
Started as ``python -m corral.node.runner CONFIG`` with CONFIG a JSON object as ``llama.LlamaRunner`` makes it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, even by SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _server(config: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = config["model"]
    params.hostnames = [config["socket"]]
    params.n_parallel = config["parallel"]
    params.n_ctx = config["context"] * config["parallel"]
    params.kv_unified = False
    # Small batches: llama.cpp notices a client that left, and other requests' tokens, only between two.
    params.n_batch = params.n_ubatch = config["batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config["threads"]
    params.n_threads_http = config["parallel"] + 8
    params.ctx_shift = True
    params.embedding = True
    if not config["pools"]:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    # What a fresh node need not pay for: a warm-up, fitting to a GPU, and a second cache in memory.
    params.warmup = params.fit_params = params.ui = params.cache_idle_slots = False
    params.cache_ram_mib = 0
    params.verbosity = 1
    return xllamacpp.Server(params)


def main() -> None:
    config = json.loads(sys.argv[1])
    _die_with(config["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server = _server(config)
    print("ready", flush=True)
    sys.stdin.buffer.read()
    del server
    os._exit(0)


if __name__ == "__main__":
    main()
