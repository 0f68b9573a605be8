"""Ollama's options: their types, and what a model's policy makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.wire.errors import bad_request

INT, FLOAT, BOOL, STRINGS = "integer", "float32", "boolean", "array"

TYPES: dict[str, str] = {
    "num_keep": INT,
    "seed": INT,
    "num_predict": INT,
    "top_k": INT,
    "top_p": FLOAT,
    "min_p": FLOAT,
    "typical_p": FLOAT,
    "repeat_last_n": INT,
    "temperature": FLOAT,
    "repeat_penalty": FLOAT,
    "presence_penalty": FLOAT,
    "frequency_penalty": FLOAT,
    "stop": STRINGS,
    "num_ctx": INT,
    "num_batch": INT,
    "num_gpu": INT,
    "main_gpu": INT,
    "use_mmap": BOOL,
    "num_thread": INT,
}
RELOADING = frozenset(("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread"))
"""Options that belong to the runner: another value reloads the model."""

STOP_MAX = 16

_PLAIN = {
    name: {INT: int, FLOAT: float}[kind]
    for name, kind in TYPES.items()
    if kind in (INT, FLOAT) and name not in RELOADING
}
"""Options that need no closer look where their value has exactly this type."""


@dataclass(slots=True, frozen=True)
class ModelPolicy:
    """What a model's catalogue entry says of options.

    ``num_ctx`` is sent with every request; ``pinned`` options have that value whatever the caller asks;
    ``refused`` ones are a 400.
    """

    num_ctx: int | None = None
    pinned: Mapping[str, Any] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> ModelPolicy:
        """The policy of an entry of corral.yaml's ``models``."""
        options: Mapping[str, Any] = entry.get("options") or {}
        return cls(
            num_ctx=entry.get("num_ctx"),
            pinned={name: value for name, value in options.items() if value != "refuse"},
            refused=frozenset(name for name, value in options.items() if value == "refuse"),
        )


NO_POLICY = ModelPolicy()


def check(options: dict[str, Any], policy: ModelPolicy) -> dict[str, Any]:
    """The options to send: checked as Ollama checks them, then held to the policy.

    Unknown names are left out, as Ollama ignores them; a runner's option is left out too where it is not the
    policy's, since one caller's value would reload the model for all.

    Raises:
        ApiError: 400 for a wrong type, with Ollama's own words, or an option that the policy refuses.
    """
    if policy is NO_POLICY and all(type(value) is _PLAIN.get(name) for name, value in options.items()):
        return options
    checked: dict[str, Any] = {}
    for name, value in options.items():
        kind = TYPES.get(name)
        if kind is None or value is None:
            continue
        if name in policy.refused:
            raise bad_request(f'option "{name}" is refused for this model', f"options.{name}")
        if not _fits(kind, value):
            word = "of type array" if kind is STRINGS else f"of type {kind}"
            raise bad_request(f'option "{name}" must be {word}', f"options.{name}")
        if name in RELOADING:
            continue
        checked[name] = int(value) if kind is INT else value
    if policy.num_ctx is not None:
        checked["num_ctx"] = policy.num_ctx
    checked.update(policy.pinned)
    return checked


def _fits(kind: str, value: Any) -> bool:
    if kind is BOOL:
        return isinstance(value, bool)
    if kind is STRINGS:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return False
        if len(value) > STOP_MAX:
            raise bad_request(f"at most {STOP_MAX} stop strings", "options.stop")
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)
