"""Real servers for tests: Valkey, Ollama, the embedded node."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import corral
from corral.stack import binaries, models
from support.process import Process, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "smollm2:135m"


@dataclass(frozen=True)
class Server:
    """A server that runs: its address and its process."""

    url: str
    process: Process


def python_env() -> dict[str, str]:
    """What a `python -m corral` of the package under test needs beside this process's environment."""
    return {"PYTHONPATH": str(Path(corral.__file__).parents[1])}


def cache_folder() -> Path:
    """Where what is costly to make is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corral"


def answers(url: str) -> bool:
    """Whether an HTTP server answers 200 there."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _accepts(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")


def certificate(folder: Path, name: str = "localhost") -> Path:
    """A self-signed certificate for ``name`` and 127.0.0.1, with its key, in one file as HAProxy wants it."""
    folder.mkdir(parents=True, exist_ok=True)
    key, chain, pem = folder / "key", folder / "chain", folder / "tls.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
            *("-keyout", key, "-out", chain),
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(chain.read_text() + key.read_text())
    return pem


STORES = {"valkey": "valkey_version:8.", "redis-server": "redis_version:7."}
"""The programs that a store may be, and how each says that it is of the version that is tested (INFO); scripts/test
installs the second."""


@contextmanager
def valkey(
    folder: Path, port: int | None = None, program: str = "valkey", primary: int | None = None
) -> Iterator[Server]:
    """A Valkey (or Redis) of its own, without persistence; ``url`` is redis://127.0.0.1:PORT/0.

    With the port of a ``primary`` it is a replica of that.
    """
    port = port or free_port()
    found = binaries.valkey() if program == "valkey" else shutil.which(program)
    if found is None:
        pytest.fail(f"there is no {program}: apt-get install {program} (scripts/test does)", pytrace=False)
    argv = [found, "--port", str(port), "--bind", "127.0.0.1"]
    argv += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    if primary is not None:
        argv += ["--replicaof", f"127.0.0.1 {primary}", "--repl-diskless-sync-delay", "0"]
    process = Process(argv, folder / f"valkey-{port}.log" if primary else folder / "valkey.log")
    try:
        process.wait_until(lambda: _accepts(port))
        yield Server(f"redis://127.0.0.1:{port}/0", process)
    finally:
        process.end()


def ollama_program() -> str:
    """Ollama as scripts/test found it, or the one in the cache; the test fails where there is none."""
    candidates = [
        os.environ.get("CORRAL_TEST_OLLAMA"),
        os.environ.get("CORRAL_OLLAMA"),
        str(cache_folder() / "ollama-0.17.4/bin/ollama"),
        shutil.which("ollama"),
    ]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    pytest.fail("there is no Ollama: run scripts/install-ollama first (scripts/test does)", pytrace=False)


@contextmanager
def ollama(
    folder: Path, port: int | None = None, cpu: int | None = 0, parallel: int = 4, store: Path | None = None
) -> Iterator[Server]:
    """A real Ollama with SmolLM2, on one core: more threads than cores make it crawl.

    Its models lie in the user's cache, where the 94 MB are written once; several may share them. With a ``store`` of
    its own it begins with none.
    """
    own = store is not None
    store = store or cache_folder() / "test-models-2"
    store.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    env = {
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(store),
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NUM_PARALLEL": str(parallel),
        "OLLAMA_KEEP_ALIVE": "60m",
    }
    url = f"http://127.0.0.1:{port}"
    process = Process([ollama_program(), "serve"], folder / "ollama.log", env, cpu)
    try:
        process.wait_until(lambda: answers(url + "/api/version"))
        if not own:
            # Who installs it beside another would write its manifest anew under the other's first requests.
            with store.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if MODEL not in models.listed(url):
                    models.install(url, threads=1)
        yield Server(url, process)
    finally:
        process.end()


@contextmanager
def embedded_node(
    folder: Path, port: int | None = None, cpu: int | None = 1, backend: str = "llama", *extra: str
) -> Iterator[Server]:
    """`corral serve node` on one core."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "corral", "serve", "node", "--listen", f"127.0.0.1:{port}"]
    argv += ["--backend", backend, "--models", str(folder / "models"), "--threads", "1", *extra]
    if cpu is not None and cpu >= (os.cpu_count() or 1):
        cpu = 0
    process = Process(argv, folder / "node.log", python_env(), cpu)
    try:
        process.wait_until(lambda: answers(url + "/api/version"))
        yield Server(url, process)
    finally:
        process.end()
