"""Which nodes are counted together: those that serve the same tenants, and those that are nobody's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

MARK: Final = "|"
"""Between a model and the group of nodes whose slots of it are counted; no model's name has it."""


def groups(dedicated: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The group of each node that some tenant has to itself; the others are in the group "".

    `dedicated` is tenant → nodes. Tenants that share a node are of one group, which is named by its first node.
    """
    found: dict[str, str] = {}
    for names in dedicated.values():
        met = {found.get(name, name) for name in names}
        if not met:
            continue
        first = min(met)
        for name in names:
            found[name] = first
        for name, group in found.items():
            if group in met:
                found[name] = first
    return found


def counted(model: str, group: str) -> str:
    """What a model is called where its slots on a group of nodes are counted."""
    return f"{model}{MARK}{group}" if group else model


def model_of(name: str) -> str:
    """The model of what is counted under a name."""
    return name.partition(MARK)[0]
