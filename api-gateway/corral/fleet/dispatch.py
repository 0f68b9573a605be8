"""Which nodes a request prefers: those whose cache holds the start of its prompt. And how fast nodes are, as measured.

A node keeps what it computed of the last prompt of each slot, so the next turn of a conversation costs only what is new
where the last one ran. Prompts are compared by hashes of their beginnings, salted with the tenant's name: no request
finds out by its latency what another tenant asked.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

BLOCK: Final = 4096
"""A text is told apart every so many bytes."""
LEAST: Final = 512
"""A beginning of fewer bytes is not worth a node: it is read as fast as it is found."""
CHAIN_MAX: Final = 64
PRIME: Final = 1099511628211
MASK: Final = (1 << 60) - 1
"""What a hash is joined to those before it by: a product of 60 bits."""
PREFERRED_MAX: Final = 3
REMEMBERED: Final = 20_000
SAMPLE_MIN: Final = 16
_MESSAGE: Final = b'{"role":'
_LAST: Final = b"}]"
_NEXT: Final = b"},"
TRIES: Final = 16
_SHARE: Final = 0.1


def messages(body: bytes) -> list[bytes]:
    """The body of a request to a node, cut into its messages; of one without messages, all of it.

    What looks like the beginning of a message can be none of a text's: quotes in texts are escaped.
    """
    found = body.split(_MESSAGE)
    if len(found) > 1:
        del found[0]
        last = found[-1]
        end = _end(last)
        found[-1] = (last if end < 0 else last[:end]) + _NEXT  # as it will be in the next turn
    return found


def chain(tenant: str, model: str, texts: list[bytes], least: int = LEAST) -> list[int]:
    """A hash of each beginning of a prompt of `least` bytes or more, the shortest first; `texts` are its messages.

    Hashes are this process's own (Python's, keyed by what no caller knows): they are compared here and told nobody.
    """
    value = salt(tenant, model)
    found: list[int] = []
    size = 0
    for text in texts:
        for at in range(0, len(text) or 1, BLOCK):
            if len(found) >= CHAIN_MAX:
                return found
            piece = text[at : at + BLOCK]
            value = ((value ^ hash(piece)) * PRIME) & MASK
            size += len(piece)
            if size >= least:
                found.append(value)
        value = (value * PRIME) & MASK
    return found


def salt(tenant: str, model: str) -> int:
    """What a chain begins with."""
    return hash(f"{tenant}\0{model}") & MASK


def _native() -> Callable[[int, bytes, int], list[int]] | None:
    """What does the whole in one pass (`_beginnings.c`), where that is compiled."""
    try:
        return import_module("corral.fleet._beginnings").beginnings  # type: ignore[no-any-return]
    except ImportError:
        return None


_C: Final = _native()


def beginnings(tenant: str, model: str, body: bytes) -> list[int]:
    """The chain of a request's body, as it goes to a node."""
    if _C is not None:
        return _C(salt(tenant, model), body, LEAST)
    return chain(tenant, model, messages(body))


def _end(text: bytes) -> int:
    """Where `_LAST` stands first, -1 if nowhere. One byte is found many times faster than two, if it is rare."""
    at = text.find(b"}")
    for _ in range(TRIES):
        if at < 0 or text.startswith(_LAST, at):
            return at
        at = text.find(b"}", at + 1)
    return at if at < 0 else text.find(_LAST, at)


class Affinity:
    """Where prompts ran lately; at most `limit` beginnings are remembered, those used last."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._nodes: dict[int, str] = {}

    def preferred(self, chain: list[int]) -> tuple[str, ...]:
        """Nodes that know a beginning of the prompt, that of the longest first."""
        found: list[str] = []
        nodes = self._nodes
        for value in reversed(chain):
            node = nodes.get(value)
            if node is not None and node not in found:
                found.append(node)
                if len(found) == PREFERRED_MAX:
                    break
        return tuple(found)

    def note(self, chain: list[int], node: str) -> None:
        """A prompt runs on a node."""
        nodes = self._nodes
        for value in chain:
            nodes.pop(value, None)
            nodes[value] = node
        while len(nodes) > self.limit:
            del nodes[next(iter(nodes))]

    def forget(self, node: str) -> None:
        """A node has lost what it knew: it started anew, or unloaded the model."""
        self._nodes = {value: name for value, name in self._nodes.items() if name != node}


class Speeds:
    """Tokens/s of a stream on each (node, model), as streams that ended show it; 0.0 is not known."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[str, str], float] = {}

    def note(self, node: str, model: str, tokens: int, seconds: float) -> None:
        """A stream has made `tokens` in `seconds` after its first."""
        if tokens < SAMPLE_MIN or seconds <= 0:
            return
        speed = tokens / seconds
        old = self._speeds.get((node, model))
        self._speeds[node, model] = speed if old is None else old + _SHARE * (speed - old)

    def of(self, node: str, model: str) -> float:
        """What was measured there."""
        return self._speeds.get((node, model), 0.0)

    def best(self) -> dict[str, float]:
        """The best node's, of each model."""
        found: dict[str, float] = {}
        for (_, model), speed in self._speeds.items():
            if speed > found.get(model, 0.0):
                found[model] = speed
        return found
