"""A model's options in corral.yaml: which exist, of what type, and what may be said of each."""

from __future__ import annotations

from typing import Any

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
"""Ollama's options, with the words that it has for their types."""

RELOADING = frozenset(("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread"))
"""Options that belong to the runner: another value reloads the model."""

BOUNDS = {
    "repeat_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
}
TEMPERATURE_MIN = 1e-20
"""Beyond these a token's score is no number, and the runner of all callers of the model ends (Ollama 0.17.4). A
temperature of 0 or less is none."""

REFUSE = "refuse"


def policy(options: dict[str, Any]) -> dict[str, Any]:
    """A model's ``options``, checked: per name `refuse`, a value of the option's type, or ``{min, max}``.

    Raises:
        ValueError: a name that is no option, a value of another type, or bounds that no value meets.
    """
    for name, rule in options.items():
        kind = TYPES.get(name)
        if kind is None:
            raise ValueError(f"{name!r} is no option of Ollama: expected one of {', '.join(sorted(TYPES))}")
        if rule == REFUSE and isinstance(rule, str):
            continue
        if isinstance(rule, dict):
            _bounds(name, kind, rule)
        elif not _fits(kind, rule):
            raise ValueError(f"{name}: expected refuse, {_words(kind)}")
        for value in rule.values() if isinstance(rule, dict) else [rule]:
            if ends_runner(name, value):
                raise ValueError(f"{name}: {value:g} ends Ollama's runner: expected {_harmless(name)}")
    return options


def ends_runner(name: str, value: float) -> bool:
    """Whether an option's value is beyond what a runner lives through."""
    if name == "temperature":
        return 0 < value < TEMPERATURE_MIN
    return name in BOUNDS and not BOUNDS[name][0] <= value <= BOUNDS[name][1]


def _bounds(name: str, kind: str, rule: dict[str, Any]) -> None:
    if kind not in (INT, FLOAT) or name in RELOADING:
        why = "another value would reload the model" if name in RELOADING else "it is no number"
        raise ValueError(f"{name} has no bounds, since {why}: expected refuse or a value")
    if not rule or not set(rule) <= {"min", "max"} or not all(_fits(kind, bound) for bound in rule.values()):
        raise ValueError(f"{name}: expected {_words(kind)}")
    if "min" in rule and "max" in rule and rule["min"] > rule["max"]:
        raise ValueError(f"{name}: min is above max")


def _fits(kind: str, value: Any) -> bool:
    if kind == BOOL:
        return isinstance(value, bool)
    if kind == STRINGS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, int if kind == INT else int | float) and not isinstance(value, bool)


def _harmless(name: str) -> str:
    if name == "temperature":
        return f"0, or {TEMPERATURE_MIN:g} and more"
    least, most = BOUNDS[name]
    return f"{least:g} to {most:g}"


def _words(kind: str) -> str:
    if kind == BOOL:
        return "true or false"
    if kind == STRINGS:
        return "or a list of texts"
    return f"a {'whole ' if kind == INT else ''}number, or {{min: …, max: …}}"
