"""A second gateway beside the one under test, over the same store, control and nodes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from support.gateway import Gateway
from support.metrics import page
from support.process import Process, free_port, until
from support.servers import python_env

SHARING = "corral_gateways_sharing"
CONNECTIONS = "corral_limit_store_connections_total"


class Second:
    """Another gateway beside the one under test, with all that this one has."""

    def __init__(self, gw: Gateway, folder: Path) -> None:
        port = free_port()
        settings = yaml.safe_load((folder / "corral.yaml").read_text())
        self._metrics = f"127.0.0.1:{free_port()}"
        listen = {"name": "gateway-2", "listen": f"127.0.0.1:{port}", "metrics": self._metrics}
        settings["gateway"] |= listen
        file = folder / "second.yaml"
        file.write_text(yaml.safe_dump(settings))
        self._gw, self.url = gw, f"http://127.0.0.1:{port}"
        self._argv = [sys.executable, "-m", "corral", "serve", "gateway", "--config", str(file)]
        self._log = folder / "second.log"
        self.process = Process(self._argv, self._log, python_env())

    def restart(self) -> None:
        """Start it again, once it has ended."""
        self.process = Process(self._argv, self._log, python_env())
        self.process.wait_until(self.up)

    def up(self) -> bool:
        try:
            return httpx.get(self.url + "/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def knows(self) -> None:
        """Wait until it has the last snapshot."""
        control = self._gw.control
        until(lambda: control.known_to.get("gateway-2") == control.snapshot["version"], "the second one has it too")

    def seen(self) -> float:
        """How many gateways it knows of."""
        return self.metric(SHARING)

    def connections(self) -> float:
        """How often the two have connected to the store. One that has no answer for 50 ms does so anew, and gives its
        own slots until then: on a machine that halts, some do."""
        return self.metric(CONNECTIONS) + self._gw.metric(CONNECTIONS)

    def metric(self, name: str) -> float:
        """A metric without labels."""
        return page(f"http://{self._metrics}/metrics").value(name)

    def post(self, body: Any = None, **headers: str) -> httpx.Response:
        """POST to it."""
        gw = self._gw
        headers = gw.auth | headers
        return httpx.post(self.url + "/api/chat", json=body or gw.chat(stream=False), headers=headers, timeout=60)
