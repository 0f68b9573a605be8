"""A folder as an operator has it: the Compose files, unchanged; .env and secrets as scripts/compose-init makes them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from deploy.engine import ROOT, Docker
from support.load import COMPLETIONS, Load
from support.process import free_port, until

from corral.stack import models

FILES = (
    "docker-compose.yml",
    "compose.cpu.yml",
    ".env.example",
    "deploy/compose",
    "monitoring",
    "scripts/compose-init",
)
PORTS = {
    name: default for name, default in re.findall(r"\$\{(\w+_PORT):-(\d+)\}", (ROOT / "docker-compose.yml").read_text())
}
VERSION = "dev"
MODEL = "smollm2:135m"
SLOW = 240.0
"""Seconds that some answers may take where models share two cores with other tests."""
MESSAGES = [{"role": "user", "content": "Say hi."}]
PATIENCE = 900.0
"""Seconds that one procedure may take there: it starts and stops many containers, or builds an image."""
PROJECT = "corral"
SERVICES = (
    *("ollama-1", "ollama-2", "haproxy", "api-gateway-1", "api-gateway-2", "control", "redis", "postgres"),
    *("prometheus", "alertmanager", "grafana"),
)


class Site:
    """The folder, and what runs of it."""

    def __init__(self, docker: Docker, folder: Path) -> None:
        self.docker, self.folder = docker, folder
        for name in FILES:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, target)
        # Compose wants to know that there is something to build from, though the image is there.
        (folder / "api-gateway").symlink_to(ROOT / "api-gateway")
        self.ports = {name: free_port() for name in PORTS}
        self.key = self.admin_key = ""
        self.seconds = 0.0

    # -- commands, as an operator gives them

    def shell(self, command: str, timeout: float = SLOW, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command line in the folder, with these variables set; how it ended."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("CORRAL_", "COMPOSE_"))}
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={**env, **self.docker.env, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def do(self, command: str, timeout: float = SLOW, **variables: str) -> str:
        """Standard output of a command line that has to succeed."""
        done = self.shell(command, timeout, **variables)
        assert done.returncode == 0, (
            f"{command}: status {done.returncode}\n{done.stderr[-3000:]}\n{done.stdout[-2000:]}"
        )
        return done.stdout

    def block(self, block: str, **variables: str) -> str:
        """What a block of a document prints, run as it stands there; each line of it has to succeed."""
        return self.do(f"set -euo pipefail\n{block}", PATIENCE, **variables)

    def corral(self, arguments: str) -> Any:
        """A `corral` command with --json, in control's container."""
        return json.loads(self.do(f"docker compose exec -T control corral {arguments} --json"))

    def init(self) -> str:
        """scripts/compose-init, with ports that are free here."""
        free = " ".join(f"{name}={port}" for name, port in self.ports.items())
        first = self.do(f"{free} scripts/compose-init")
        env = self.folder / ".env"
        text = env.read_text()
        if "_PORT=" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE):
            env.write_text(text + "".join(f"{name}={port}\n" for name, port in self.ports.items()))
        return first

    def up(self, more: str = "") -> float:
        """docker compose up -d --wait; seconds that it took."""
        began = time.monotonic()
        done = self.shell(f"docker compose {more} up -d --wait", PATIENCE)
        if done.returncode != 0:
            logs = self.shell("docker compose ps -a; docker compose logs --tail 20").stdout
            raise AssertionError(f"up: status {done.returncode}\n{done.stderr[-3000:]}\n{logs[-8000:]}")
        return time.monotonic() - began

    def start(self) -> None:
        """Everything up, a model on both nodes, and a key whose limits nobody meets. Once."""
        if self.key:
            return
        self.init()
        self.seconds = self.up()
        self.admin_key = self.do("docker compose exec -T control cat /var/lib/corral/admin.key").strip()
        made = self.corral("keys create load --rpm 1000000 --tpm 100000000 --concurrency 1000")
        self.key = made["key"]
        for service in ("ollama-1", "ollama-2"):
            self.give_model(service)
        self.knows("ollama-1", "ollama-2")

    # -- what runs

    def container(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        return self.docker.inspect(f"{PROJECT}-{service}-1")

    def url(self, variable: str = "CORRAL_HTTP_PORT", scheme: str = "http") -> str:
        """The address of a published port."""
        return f"{scheme}://127.0.0.1:{self.ports[variable]}"

    def headers(self) -> dict[str, str]:
        """The key as a header."""
        return {"Authorization": f"Bearer {self.key}"}

    def give_model(self, service: str) -> None:
        """Create the model on a node through its own API, as a pull would, and load it."""
        networks = self.container(service)["NetworkSettings"]["Networks"]
        url = f"http://{networks[f'{PROJECT}_nodes']['IPAddress']}:11434"
        models.install(url, threads=1)
        models.warm(url, MODEL, {})

    def knows(self, *nodes: str) -> None:
        """Wait until control has these nodes ready, with the model."""

        def there() -> bool:
            listed = {node["name"]: node for node in self.corral("status")["nodes"]}
            return all(listed[name]["state"] == "ready" and MODEL in listed[name]["models"] for name in nodes)

        until(there, f"{nodes} are ready with the model", SLOW, every=0.5)
        until(lambda: MODEL in self.tags(), "the gateways know the model", SLOW, every=0.2)

    def tags(self) -> list[str]:
        """The models that the edge lists."""
        answer = httpx.get(self.url() + "/api/tags", headers=self.headers(), timeout=30)
        return [model["name"] for model in answer.json().get("models", [])] if answer.status_code == 200 else []

    def load(self, name: str, clients: int = 3, tokens: Sequence[int] = (12, 24), think: float = 1.5) -> Load:
        """Light load at the edge, by all three APIs, whose callers wait for as long as some answers may take here."""
        return Load(self.url(), self.key, MODEL, clients, tokens=tokens, name=name, think=think, timeout=SLOW)

    def gateway(self, name: str) -> dict[str, str]:
        """What HAProxy counts of a gateway (or, for BACKEND, of all): its row of the statistics."""
        answer = httpx.get(self.url("CORRAL_STATS_PORT") + "/;csv", timeout=30)
        rows = csv.DictReader(answer.text.lstrip("# ").splitlines())
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("gateways", name))

    def pid(self, service: str) -> int:
        """A container's first process."""
        return int(self.container(service)["State"]["Pid"])

    def back(self, service: str, pid: int) -> None:
        """Wait until a container that was killed runs again and is healthy."""

        def healthy() -> bool:
            state = self.container(service)["State"]
            return bool(state["Pid"] not in (0, pid) and state["Health"]["Status"] == "healthy")

        until(healthy, f"{service} is back", SLOW, every=0.1)

    def audit(self) -> dict[str, dict[str, Any]]:
        """The audit records by request id, but for reads of the admin API."""
        found: dict[str, dict[str, Any]] = {}
        after = 0
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        while True:
            answer = httpx.get(f"{self.url()}/admin/audit?limit=1000&after={after}", headers=headers, timeout=60)
            page = answer.raise_for_status().json()["audit"]
            found |= {row["request_id"]: row for row in page if (row["api"], row["method"]) != ("admin", "GET")}
            # Each of these reads is a record too: a page that is not full is the last one.
            if len(page) < 1000:
                return found
            after = page[-1]["seq"]

    def recorded(self, ended: Sequence[str], admitted: Sequence[str] = (), seconds: float = SLOW) -> None:
        """Wait until these requests are on record, with their ends or at least their beginnings."""

        def there() -> bool:
            try:
                found = self.audit()
            except httpx.HTTPError:
                return False  # it is not control, or not its database, that is waited for
            done = {request_id for request_id, row in found.items() if row["outcome"] is not None}
            return done >= set(ended) and found.keys() >= set(admitted)

        until(there, f"the records of {len(ended)} requests", seconds, every=0.5)

    def all_recorded(self) -> dict[str, dict[str, Any]]:
        """The audit records, once each request has its end: what a killed gateway left open is settled later."""
        found: dict[str, dict[str, Any]] = {}

        def ended() -> bool:
            found.clear()
            found.update(self.audit())
            return all(row["outcome"] is not None for row in found.values())

        until(ended, "each record has its end", SLOW, every=0.5)
        return found

    def end(self) -> None:
        """Take it all down, volumes too."""
        self.shell("docker compose --profile '*' down -v -t 3 --remove-orphans")


def ask(site: Site, key: str | None = None) -> httpx.Response:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    headers = {"Authorization": f"Bearer {key or site.key}"}
    return httpx.post(site.url() + COMPLETIONS, json=body, headers=headers, timeout=SLOW / 2)


def serves(site: Site) -> None:
    """It answers, in the end through each gateway."""
    until(lambda: ask(site).status_code == 200, "it serves", SLOW, every=0.5)
