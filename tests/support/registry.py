"""A private registry for models, as an operator runs one: Distribution, and HAProxy before it for Ollama's sake."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from corral.stack import binaries
from support.process import Process, free_port
from support.servers import answers

_CONFIG = """
version: 0.1
storage:
  filesystem: {{rootdirectory: {folder}}}
http: {{addr: "127.0.0.1:{port}"}}
"""

_PROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s

backend distribution
    server distribution 127.0.0.1:{port}
"""

# Ollama wants the GET of a blob to be redirected to another host name: docs/models.md has the same rule.
_FRONT = """
frontend {name}
    bind 127.0.0.1:{front}
    acl blob path_reg ^/v2/.*/blobs/
    acl named hdr_beg(host) -i localhost
    http-request redirect code 307 location http://127.0.0.1:{front}%[path] if METH_GET blob named
    default_backend distribution
"""

_SLOWLY = """
    filter bwlim-out limit default-limit {rate} default-period 1s
    http-response set-bandwidth-limit limit
"""

SLOW = 20_000_000
"""Bytes a second for each connection: SmolLM2 takes five seconds."""


@dataclass
class Registry:
    """A registry that runs. ``name`` is what model names begin with; ``slow`` the same at ``SLOW`` bytes a second."""

    name: str
    slow: str
    _proxy: Process

    @contextmanager
    def halted(self) -> Iterator[None]:
        """While the block runs, not one byte more comes: a pull that is half-way stays so."""
        self._proxy.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._proxy.send(signal.SIGCONT)

    def push(self, node: str, model: str, as_model: str = "") -> None:
        """Put a model of a node (its URL) into the registry, under ``as_model``'s name if given."""
        base, _, tag = (as_model or model).partition(":")
        target = f"{self.name}/library/{base}:{tag or 'latest'}"
        httpx.post(node + "/api/copy", json={"source": model, "destination": target}).raise_for_status()
        body = {"model": target, "insecure": True, "stream": False}
        answer = httpx.post(node + "/api/push", json=body, timeout=60)
        assert answer.json().get("status") == "success", answer.text
        httpx.request("DELETE", node + "/api/delete", json={"model": target}).raise_for_status()


@contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """Distribution with an empty store, and two front ends to it."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.fail("there is no docker-registry: apt-get install docker-registry (scripts/test does)", pytrace=False)
    port, front, slow = free_port(), free_port(), free_port()
    (folder / "registry.yml").write_text(_CONFIG.format(folder=folder / "registry", port=port))
    fronts = _FRONT.format(name="quick", front=front) + _FRONT.format(name="slow", front=slow)
    (folder / "registry.cfg").write_text(_PROXY.format(port=port) + fronts + _SLOWLY.format(rate=SLOW))
    processes = []
    try:
        distribution = Process([program, "serve", folder / "registry.yml"], folder / "registry.log")
        processes.append(distribution)
        distribution.wait_until(lambda: answers(f"http://127.0.0.1:{port}/v2/"))
        proxy = Process([binaries.haproxy(), "-db", "-f", folder / "registry.cfg"], folder / "registry-haproxy.log")
        processes.append(proxy)
        proxy.wait_until(lambda: answers(f"http://127.0.0.1:{front}/v2/") and answers(f"http://127.0.0.1:{slow}/v2/"))
        yield Registry(f"localhost:{front}", f"localhost:{slow}", proxy)
    finally:
        for process in reversed(processes):
            process.end()
