"""How many nodes may be out of use because they do not answer control: it may be control that sees wrongly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MOST = "as more than half of the nodes do not"
REACHED = "as HAProxy's checks reach it"


@dataclass(frozen=True, slots=True)
class Standing:
    """A node that is to serve. ``late``: it did not answer control the last time, ``missed``: so often that it is taken
    to be down; ``used``: it is in use until now.
    """

    name: str
    late: bool
    missed: bool
    used: bool
    models: frozenset[str] = frozenset()


def spared(nodes: Sequence[Standing], dead: Collection[str] | None) -> dict[str, str]:
    """The nodes that stay in use though they do not answer control, each with why.

    ``dead`` are those that HAProxy's own checks do not reach either; None where nobody can say. Where it can, only they
    go, however few do not answer: the rest is reached by requests, so it is control's way that fails, or a runner that
    gateways see hang. Of those that nobody reaches never more than half go, unless none is left: then nothing is served
    anyhow, and has to say so. Without HAProxy's word neither more than half of the nodes go, nor the last one with a
    model.
    """
    missed = [node for node in nodes if node.missed]
    if dead is not None:
        return _confirmed(nodes, missed, frozenset(dead))
    if len(nodes) == 1:
        return {}  # nothing to compare it with
    # Those that are about to be missed count: else some would be gone before it shows that too many are.
    if sum(node.late for node in nodes) * 2 > len(nodes):
        return {node.name: MOST for node in missed if node.used}
    answered = {model for node in nodes if not node.late for model in node.models}
    alone = {node.name: sorted(node.models - answered) for node in missed if node.used}
    return {name: f"as no other has {models[0]}" for name, models in alone.items() if models}


def _confirmed(nodes: Sequence[Standing], missed: Sequence[Standing], dead: Collection[str]) -> dict[str, str]:
    why = {node.name: REACHED for node in missed if node.name not in dead}
    # What is out of use already is used again only where somebody reaches it: it goes first.
    gone = sorted((node for node in missed if node.name in dead), key=lambda node: (node.used, node.name))
    if len(gone) < len(nodes):
        why |= {node.name: MOST for node in gone[len(nodes) // 2 :] if node.used}
    return why
