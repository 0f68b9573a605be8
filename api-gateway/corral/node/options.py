"""Model options: Ollama's defaults, its type checks, and what of them needs a new runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from corral.node.errors import NodeError

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Options:
    """Every option of Ollama's API, with the value that holds when nobody sets it."""

    num_ctx: int = DEFAULT_CONTEXT
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int = 0
    use_mmap: bool | None = None
    num_thread: int = 0
    num_keep: int = 4
    seed: int = -1
    num_predict: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    temperature: float = 0.8
    repeat_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)

    @property
    def runner_key(self) -> tuple[object, ...]:
        """The options that are fixed when a runner starts: another value means another runner."""
        return (self.num_ctx, self.num_batch, self.main_gpu, self.use_mmap, self.num_thread)


_TYPES = {f.name: str(f.type) for f in fields(Options)}


def merge(base: Options, values: Mapping[str, object]) -> Options:
    """``base`` with ``values`` on top; unknown names and nulls are ignored, as Ollama does.

    Raises NodeError 500 with Ollama's text where a value has the wrong type.
    """
    changed: dict[str, object] = {}
    for name, value in values.items():
        kind = _TYPES.get(name)
        if kind is not None and value is not None:
            changed[name] = _checked(name, kind, value)
    return replace(base, **changed) if changed else base  # type: ignore[arg-type]


def _checked(name: str, kind: str, value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int":
        if not number:
            raise NodeError(500, f'option "{name}" must be of type integer')
        return int(value)  # type: ignore[call-overload]
    if kind == "float":
        if not number:
            raise NodeError(500, f'option "{name}" must be of type float32')
        return float(value)  # type: ignore[arg-type]
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise NodeError(500, f'option "{name}" must be of type boolean')
        return value
    if not isinstance(value, list):
        raise NodeError(500, f'option "{name}" must be of type array')
    if not all(isinstance(item, str) for item in value):
        raise NodeError(500, f'option "{name}" must be of an array of strings')
    return value
