"""Slots: how many requests may run at once where a model is, and how long one that was freed early stays taken."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final
from zlib import crc32

STEP: Final = 1_000_000.0
FULL: Final = 1e12
"""Added to the load of a place without a free slot, so that those with one come first in the order of loads."""

ABORTED: Final = 0.25
ABORTED_MAX: Final = 5.0


class PlaceState(StrEnum):
    """Where a model stands on a node. Slots are given on RESIDENT alone."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


class Place:
    """A model on a node.

    ``generation`` grows with each change of state: a word of an older one is not heeded. ``step`` is what a request
    adds to the load (`step_of`), ``in_use`` the slots that are held, whatever the state.
    """

    __slots__ = ("generation", "in_use", "model", "node", "slots", "state", "step")

    def __init__(self, node: str, model: str, slots: int = 1, step: float = STEP) -> None:
        self.node = node
        self.model = model
        self.slots = slots
        self.step = step
        self.state = PlaceState.ABSENT
        self.generation = 0
        self.in_use = 0

    def __repr__(self) -> str:
        return f"<{self.node} {self.model} {self.state} {self.in_use}/{self.slots} generation {self.generation}>"

    @property
    def free(self) -> int:
        """Slots that may be given now."""
        if self.state is not PlaceState.RESIDENT:
            return 0
        return max(0, self.slots - self.in_use)

    @property
    def load(self) -> float:
        """What places are ordered by: the least loaded first, those without a free slot last."""
        load = self.in_use * self.step
        return load if self.in_use < self.slots else load + FULL


def step_of(slots: int, speed: float, fastest: float) -> float:
    """What one request adds to the load of a place: less on a faster one, less on one with more slots.

    `speed` and `fastest` are measured tokens/s of this place and of the model's best; 0 is not measured yet, and taken
    for the best. A whole number, so that sums of it are exact.
    """
    share = 1.0 if speed <= 0 or fastest <= 0 else min(1.0, max(0.05, speed / fastest))
    return float(round(STEP / (max(1, slots) * share)))


def cool_down(decoding: bool, prompt_left: float, prefill: float) -> float:
    """Seconds for which a slot stays taken after its request was aborted.

    A node looks for a caller that left between two tokens, and before the first one only between two batches of the
    prompt: `prompt_left` is the tokens it has still to read, `prefill` the tokens/s at which it does (0: unknown).
    """
    if decoding:
        return ABORTED
    if prefill <= 0:
        return ABORTED_MAX
    return min(ABORTED_MAX, max(ABORTED, prompt_left / prefill))


def own_slots(gateways: Iterable[str], gateway: str, node: str, model: str, slots: int) -> int:
    """How many slots of a place a gateway may give away by itself, while the store that counts for all is away.

    Whole slots, as many to each; those left over go to the gateways that rank highest for this place (rendezvous
    hashing: Thaler and Ravishankar, 1998), so that all agree without a word as long as they know of the same gateways,
    and together they have no more than there are. But one at least, or else a gateway could serve no request for the
    model at all: where there are fewer slots than gateways, some are given twice.
    """
    names = sorted({gateway, *gateways})
    each, over = divmod(slots, len(names))
    ranks = [(crc32(f"{name} {node} {model}".encode()) * 2654435761 & 0xFFFFFFFF, name) for name in names]
    mine = each + (gateway in [name for _, name in sorted(ranks, reverse=True)[:over]])
    return max(1, mine)
