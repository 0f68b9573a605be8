"""A node of the fleet as a gateway sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


class NodeState(StrEnum):
    """Whether a node may be given work: only READY may."""

    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DOWN = "down"


@dataclass(slots=True, eq=False)
class Node:
    """One Ollama server.

    ``tags`` and ``ps`` are the entries of its `/api/tags` and `/api/ps`, as it sent them; ``held`` and ``resident``
    are the model names in them, ``digests`` the SHA-256 (hex) of the manifest of each that it told one of, by name;
    ``header`` is the line of HTTP that names it. ``memory`` is bytes for models, 0 where it
    was not declared. ``in_flight`` counts this gateway's requests on it, and ``shunned_until`` (monotonic seconds) is
    set when it failed this gateway, ``gone_until`` when it did not answer to the end. ``suspects`` are models whose
    runners seem to hang there, ``lost`` those that it said not to hold, whatever control says, each until when it is
    not asked for them (monotonic seconds), ``failed`` how often it failed at a model since it last answered for it.
    ``on_cpu`` are models that run there on the CPU though a GPU is expected. ``loading`` are models that are loaded
    there now, and for how many seconds that excuses the silence of the others' runners. ``doubted`` are models whose
    runners gateways said to control that they suspect there, and those gateways.
    """

    name: str
    url: str
    slots: int
    state: NodeState = NodeState.READY
    version: str = ""
    tags: list[dict[str, Any]] = field(default_factory=list)
    ps: list[dict[str, Any]] = field(default_factory=list)
    held: frozenset[str] = frozenset()
    resident: frozenset[str] = frozenset()
    header: bytes = b""
    memory: int = 0
    in_flight: int = 0
    shunned_until: float = 0.0
    gone_until: float = 0.0
    suspects: frozenset[str] = frozenset()
    lost: dict[str, float] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    on_cpu: frozenset[str] = frozenset()
    loading: dict[str, float] = field(default_factory=dict)
    doubted: dict[str, list[str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.header = b"X-Corral-Node: %b\r\n" % self.name.encode()

    def update(self, entry: dict[str, Any]) -> None:
        """Take over what control says of the node (an entry of the snapshot's ``nodes``)."""
        self.url = entry["url"]
        self.slots = max(1, int(entry.get("slots") or 1))
        self.state = NodeState(entry["state"])
        self.memory = int(entry.get("memory") or 0)
        self.version = entry.get("version") or ""
        self.tags = entry.get("tags") or []
        self.held = frozenset(model["name"] for model in self.tags)
        told = {model["name"]: _DIGEST.fullmatch(str(model.get("digest"))) for model in self.tags}
        self.digests = {name: match[1] for name, match in told.items() if match is not None}
        self.holds(entry.get("ps") or [])
        self.on_cpu = frozenset(entry.get("on_cpu") or ())
        self.loading = {name: float(seconds) for name, seconds in (entry.get("loading") or {}).items()}
        self.doubted = entry.get("suspects") or {}

    def holds(self, ps: list[dict[str, Any]]) -> bool:
        """Take over what it has in memory (the entries of its `/api/ps`); whether these are other models than before.

        Raises KeyError or TypeError where an entry has no name.
        """
        before, self.ps = self.resident, ps
        self.resident = frozenset(model["name"] for model in ps)
        return self.resident != before

    def patience(self, model: str) -> float:
        """For how many seconds the loads of other models excuse a silence of this one's runner there."""
        return max([0.0, *[seconds for name, seconds in self.loading.items() if name != model]])


@lru_cache(4096)
def canonical_name(model: str) -> str:
    """Ollama's full name of a model: a missing tag is ``latest``."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"
