"""Ollama's options: their types, and what a model's policy makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from corral.config.options import (
    BOOL,
    BOUNDS,
    FLOAT,
    INT,
    REFUSE,
    RELOADING,
    STRINGS,
    TEMPERATURE_MIN,
    TYPES,
    ends_runner,
)
from corral.wire.errors import bad_request

STOP_MAX: Final = 16
INT_MAX: Final = 2_147_483_647
SEED_MAX: Final = 1 << 53
FLOAT_MAX: Final = 3.4e38

_PLAIN: Final[dict[str, tuple[Any, float, float]]] = {
    name: ({INT: int, FLOAT: float}[kind], *BOUNDS.get(name, (-INT_MAX, INT_MAX)))
    for name, kind in TYPES.items()
    if kind in (INT, FLOAT) and name not in RELOADING
}
"""Options that need no closer look where their value has exactly this type, and is within these bounds."""


@dataclass(slots=True, frozen=True)
class ModelPolicy:
    """What a model's catalogue entry says of options.

    ``num_ctx`` is sent with every request; ``pinned`` options have that value whatever the caller asks;
    ``refused`` ones are a 400; ``clamped`` ones are moved to the nearest value within (lowest, highest).
    """

    num_ctx: int | None = None
    pinned: Mapping[str, Any] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    clamped: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> ModelPolicy:
        """The policy of an entry of corral.yaml's ``models``."""
        options: Mapping[str, Any] = entry.get("options") or {}
        return cls(
            num_ctx=entry.get("num_ctx"),
            pinned={name: rule for name, rule in options.items() if rule != REFUSE and not isinstance(rule, dict)},
            refused=frozenset(name for name, rule in options.items() if rule == REFUSE),
            clamped={
                name: (rule.get("min", -math.inf), rule.get("max", math.inf))
                for name, rule in options.items()
                if isinstance(rule, dict)
            },
        )


NO_POLICY: Final = ModelPolicy()


def check(options: dict[str, Any], policy: ModelPolicy, stop_max: int = STOP_MAX) -> dict[str, Any]:
    """The options to send: checked as Ollama checks them, then held to the policy.

    Unknown names are left out, as Ollama ignores them; a runner's option is left out too where it is not the
    policy's, since one caller's value would reload the model for all.

    Raises:
        ApiError: 400 for a wrong type, with Ollama's own words, or an option that the policy refuses.
    """
    if policy is NO_POLICY and _plain(options):
        return options
    checked: dict[str, Any] = {}
    for name, value in options.items():
        kind = TYPES.get(name)
        if kind is None or value is None:
            continue
        if name in policy.refused:
            raise bad_request(f'option "{name}" is refused for this model', f"options.{name}")
        if not _fits(name, kind, value, stop_max):
            word = "of type array" if kind is STRINGS else f"of type {kind}"
            raise bad_request(f'option "{name}" must be {word}', f"options.{name}")
        if name in RELOADING:
            continue
        checked[name] = int(value) if kind is INT else value
    if policy.num_ctx is not None:
        checked["num_ctx"] = policy.num_ctx
    if policy.clamped:
        _clamp(checked, policy)
    checked.update(policy.pinned)
    return checked


def _plain(options: dict[str, Any]) -> bool:
    value: Any
    for name, value in options.items():
        plain = _PLAIN.get(name)
        if plain is None or type(value) is not plain[0] or not plain[1] <= value <= plain[2]:
            return False
        if 0 < value < TEMPERATURE_MIN:
            return False
    return True


def _clamp(options: dict[str, Any], policy: ModelPolicy) -> None:
    for name, (lowest, highest) in policy.clamped.items():
        value = options.get(name)
        if name == "num_predict" and (value is None or value < 0):
            value = highest  # none and -1 are no bound, -2 is the rest of the context
        if value is not None:
            value = min(max(value, lowest), highest)
            if math.isfinite(value):
                options[name] = int(value) if TYPES[name] == INT else value


def _fits(name: str, kind: str, value: Any, stop_max: int) -> bool:
    if kind is BOOL:
        return isinstance(value, bool)
    if kind is STRINGS:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return False
        if len(value) > stop_max:
            raise bad_request(f"at most {stop_max} stop strings", "options.stop")
        return True
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    most = FLOAT_MAX if kind is FLOAT else SEED_MAX if name == "seed" else INT_MAX
    if not -most <= value <= most or ends_runner(name, value):
        raise bad_request(f'option "{name}" is out of range', f"options.{name}")
    return True
