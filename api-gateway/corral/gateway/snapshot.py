"""What the gateway knows of keys, nodes and models: fed by control, kept on disk for a cold start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from corral.fleet.node import Node, canonical_name
from corral.gateway.authenticate import Key, build_key
from corral.wire.options import ModelPolicy

POLL = 0.5
TOUCH = 10.0

log = logging.getLogger(__name__)


class Snapshot:
    """Keys, nodes and policies. ``confirmed`` is when control last confirmed it, in epoch seconds.

    ``known``: some node ever told its models; before that, nothing can be said to be missing.
    """

    def __init__(self, rpm: int | None, concurrency: int | None) -> None:
        self._defaults = rpm, concurrency
        self.version = ""
        self.confirmed = 0.0
        self.keys: dict[str, Key] = {}
        self.verified: dict[bytes, Key] = {}
        self.nodes: dict[str, Node] = {}
        self.policies: dict[str, ModelPolicy] = {}
        self.held: frozenset[str] = frozenset()
        self.known = False

    def apply(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; what runs on a node or counts on a key goes on."""
        keys: dict[str, Key] = {}
        for entry in data["keys"]:
            key = build_key(entry, *self._defaults)
            old = self.keys.get(key.id)
            if old is not None:
                if (old.budget.rpm, old.budget.concurrency) == (key.budget.rpm, key.budget.concurrency):
                    key.budget = old.budget
                else:
                    key.budget.in_flight, key.budget.arrival = old.budget.in_flight, old.budget.arrival
            keys[key.id] = key
        nodes: dict[str, Node] = {}
        for entry in data["nodes"]:
            node = self.nodes.get(entry["name"]) or Node(entry["name"], entry["url"], 1)
            node.update(entry)
            nodes[node.name] = node
        self.keys, self.nodes = keys, nodes
        self.verified = {}
        self.policies = {
            canonical_name(model["name"]): ModelPolicy.from_entry(model) for model in data.get("models") or []
        }
        self.held = frozenset(name for node in nodes.values() for name in node.held)
        self.known = any(node.version for node in nodes.values())
        self.version = data["version"]

    def policy(self, model: str) -> ModelPolicy | None:
        """The policy of a model by any of its names."""
        return self.policies.get(canonical_name(model))


class Feed:
    """Keeps a snapshot current from control's internal address; ``tell`` gives more headers for each question."""

    def __init__(
        self,
        snapshot: Snapshot,
        control_url: str,
        token: str,
        gateway: str,
        cache: Path,
        tell: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self._snapshot = snapshot
        self._file = cache / "snapshot.json"
        self._url = f"{control_url}/internal/snapshot"
        self._headers = {"Authorization": f"Bearer {token}", "X-Corral-Gateway": gateway}
        self._tell = tell
        self._wake = asyncio.Event()
        self._touched = 0.0

    def load(self) -> None:
        """Start from the file of an earlier run, where there is one."""
        try:
            data = msgspec.json.decode(self._file.read_bytes())
            confirmed = self._file.stat().st_mtime
            self._snapshot.apply(data)
            self._snapshot.confirmed = confirmed
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used: %s", self._file, error)

    def poke(self) -> None:
        """Control says that something changed: ask now."""
        self._wake.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        silent = False
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while True:
                try:
                    await self._poll(client)
                    silent = False
                except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
                    if not silent:
                        log.warning("control gives no snapshot, the last one holds: %r", error)
                    silent = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._wake.wait()
                self._wake.clear()

    async def _poll(self, client: httpx.AsyncClient) -> None:
        headers = self._headers | self._tell()
        response = await client.get(self._url, params={"since": self._snapshot.version}, headers=headers)
        now = time.time()
        if response.status_code == 200:
            self._snapshot.apply(msgspec.json.decode(response.content))
            self._keep(response.content)
            self._touched = now
        elif response.status_code != 304:
            raise ValueError(f"status {response.status_code}")
        elif now - self._touched > TOUCH:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._file)
            self._touched = now
        self._snapshot.confirmed = now

    def _keep(self, content: bytes) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._file.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(self._file)
