"""How many nodes may be out of use because they do not answer control: it may be control that sees wrongly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MOST = "as more than half of the nodes do not"


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

    ``dead`` are those that HAProxy's own checks do not reach either; None where nobody can say. Such a second word
    puts a node out of use, but never more than half of them, unless none is left: then nothing is served anyhow, and
    has to say so. Without it, neither more than half of the nodes go, nor the last one with a model.
    """
    missed = [node for node in nodes if node.missed]
    # Those that are about to be missed count: else some would be gone before it shows that too many are.
    late = [node for node in nodes if node.late]
    known = frozenset(dead or ())
    if dead is None and len(nodes) == 1:
        return {}  # nothing to compare it with
    if len(late) * 2 <= len(nodes):
        answered = {model for node in nodes if not node.late for model in node.models}
        alone = {node.name: sorted(node.models - answered) for node in missed if node.name not in known}
        why = {name: f"as no other has {models[0]}" for name, models in alone.items() if models}
    else:
        confirmed = sorted((node for node in missed if node.name in known), key=lambda node: (node.used, node.name))
        if len(confirmed) == len(nodes):
            return {}
        gone = {node.name for node in confirmed[: len(nodes) // 2]}
        why = {node.name: MOST for node in missed if node.name not in gone}
    # What is out of use already is used again only where somebody reaches it.
    reached = {node.name for node in missed if node.used or (dead is not None and node.name not in known)}
    return {name: text for name, text in why.items() if name in reached}
