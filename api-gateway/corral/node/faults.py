"""Faults that a simulated node shows on request, and the control of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from corral.node.errors import NodeError

KINDS = ("hang", "fail", "reset", "slow", "nonsense", "no_done", "cut_after", "no_http", "endless_head", "cpu")
SCOPES = ("inference", "all", "listings")
GETS = ("hang", "fail", "reset", "slow")
LISTINGS = ("/api/ps", "/api/tags")


@dataclass(slots=True)
class Fault:
    """One fault. ``count`` requests show it (None: all); it starts after ``after_tokens`` tokens of an answer.

    - hang: nothing comes any more, until the client leaves or the fault is removed
    - fail: HTTP ``status`` with ``message`` before the first token, Ollama's error line after it
    - reset: the connection is reset (RST)
    - slow: each token, or each GET route of its scope, takes ``delay`` seconds more
    - nonsense: a line that is no JSON
    - no_done: the answer ends well-formed but without its last line
    - cut_after: the connection is closed in the middle of the answer
    - no_http: bytes that are no HTTP, where the answer's head or a chunk's length is due
    - endless_head: one header after the other, ``delay`` seconds apart, until the client leaves
    - cpu: the model is in main memory, by /api/ps, and each token takes ``delay`` seconds more

    ``model`` limits it to one model. ``scope`` "all" has hang, fail, reset and slow meet GET routes too; "listings" has
    them meet those alone that list models, which are not what HAProxy asks a node for.
    """

    id: int
    kind: str
    count: int | None = None
    after_tokens: int = 0
    status: int = 503
    message: str = "simulated failure"
    delay: float = 1.0
    model: str | None = None
    scope: str = "inference"


class Faults:
    """The faults of a node, in order of arrival; the first that fits a request is shown."""

    def __init__(self) -> None:
        self._active: dict[int, Fault] = {}
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()

    def add(self, request: Any) -> Fault:
        """Add what POST /simulated/faults asks for. Raises NodeError 400 naming the field."""
        if not isinstance(request, dict) or request.get("kind") not in KINDS:
            raise NodeError(400, f"kind must be one of {', '.join(KINDS)}")
        kinds = {"count": int, "after_tokens": int, "status": int, "delay": int | float, "message": str}
        kinds |= {"model": str, "scope": str, "kind": str}
        for name, value in request.items():
            if name not in kinds:
                raise NodeError(400, f"unknown field {name}")
            if value is not None and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
                raise NodeError(400, f"{name} has the wrong type")
        if request.get("scope", SCOPES[0]) not in SCOPES:
            raise NodeError(400, f"scope must be one of {', '.join(SCOPES)}")
        fault = Fault(next(self._ids), **{k: v for k, v in request.items() if v is not None})
        if fault.kind in ("cut_after", "no_done", "nonsense") and "after_tokens" not in request:
            fault.after_tokens = 1
        self._active[fault.id] = fault
        return fault

    def listing(self) -> list[dict[str, Any]]:
        return [asdict(fault) for fault in self._active.values()]

    def clear(self) -> None:
        """Remove every fault; requests that hang go on."""
        self._active.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    def take(self, model: str | None, path: str = "") -> Fault | None:
        """The fault that a request meets now, counted down; ``model`` None is a GET route, of this ``path``."""
        for fault in list(self._active.values()):
            if model is None:
                meets = fault.scope == "all" or (fault.scope == "listings" and path in LISTINGS)
                if not meets or fault.kind not in GETS:
                    continue
            elif fault.scope == "listings" or fault.model not in (None, model):
                continue
            if fault.count is not None:
                fault.count -= 1
                if fault.count <= 0:
                    del self._active[fault.id]
            return fault
        return None

    def on_cpu(self, model: str) -> bool:
        """Whether a model is to be in main memory."""
        return any(fault.kind == "cpu" and fault.model in (None, model) for fault in self._active.values())

    async def hang(self) -> None:
        """Wait until the faults are cleared (or the caller is cancelled)."""
        await self._changed.wait()


class Disconnect(Exception):
    """The connection is to end now: ``reset`` with an RST, else by closing it."""

    def __init__(self, reset: bool) -> None:
        super().__init__("simulated disconnect")
        self.reset = reset


class NoHttp(Exception):
    """The connection is to carry ``pieces``, ``delay`` seconds apart, where HTTP is due, and to be closed."""

    def __init__(self, pieces: Iterator[bytes], delay: float = 0.0) -> None:
        super().__init__("simulated garbage")
        self.pieces = pieces
        self.delay = delay


def endless_head() -> Iterator[bytes]:
    """The head of an answer, header by header, without end."""
    yield b"HTTP/1.1 200 OK\r\n"
    for number in itertools.count():
        yield b"X-Simulated-%d: header\r\n" % number


class EndWithoutDone(Exception):
    """The answer is to end here, well-formed, without its last line."""
