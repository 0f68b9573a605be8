"""What the scheduler and the routes need from a runner: one loaded model that completes and embeds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from corral.node.errors import NodeError
from corral.node.models import Model
from corral.node.options import Options

# Ollama's texts for a runner that died before, and after, the first token.
STOPPED = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details"
)
BROKEN = "an error was encountered while running the model: unexpected EOF"
TOO_LONG = "the input length exceeds the context length"


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion: ``schema`` is a JSON schema the answer must match, ``logprobs`` None if not wanted."""

    prompt: str
    options: Options
    schema: dict[str, Any] | None = None
    truncate: bool = True
    shift: bool = True
    logprobs: int | None = None


@dataclass(slots=True)
class Piece:
    """A step of an answer. The last one has ``done``, a reason ("stop" or "length") and the counts.

    Durations are in nanoseconds; ``logprobs`` are in the form of Ollama's API. ``raw`` replaces the line that
    would be sent (a simulated fault).
    """

    text: str = ""
    done: bool = False
    reason: str = ""
    prompt_tokens: int = 0
    prompt_ns: int = 0
    tokens: int = 0
    eval_ns: int = 0
    logprobs: list[dict[str, Any]] | None = None
    raw: bytes | None = None


class Runner(Protocol):
    """A model in memory of ``size`` bytes, ``vram`` of them on a GPU, that works on ``slots`` requests at once.

    Every method may raise NodeError; ``start`` is called once, before all others.
    """

    size: int
    slots: int

    @property
    def vram(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    async def start(self) -> None: ...

    def complete(self, request: Completion) -> AsyncIterator[Piece]: ...

    async def embed(self, text: str) -> tuple[list[float], int]:
        """The vector of ``text`` and its number of tokens. Raises NodeError 400 TOO_LONG."""

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, tokens: list[int]) -> str: ...

    async def close(self) -> None: ...


# (model, options, requests at once) -> a runner that has not started yet
Factory = Callable[[Model, Options, int], Runner]


def truncated(tokens: list[int], context: int, keep: int, allowed: bool) -> list[int]:
    """``tokens`` cut to ``context`` as Ollama does: the first ``keep`` stay, then the oldest go.

    Raises NodeError 400 if they do not fit and cutting is not allowed.
    """
    if not tokens:
        raise NodeError(500, "Failed to create new sequence: no input provided")
    if len(tokens) <= context:
        return tokens
    if not allowed:
        raise NodeError(400, TOO_LONG)
    keep = min(len(tokens) if keep < 0 else keep, context - 1)
    return tokens[:keep] + tokens[len(tokens) - (context - keep) :]
