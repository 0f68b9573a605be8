"""What control knows of a gateway: when it asked for a snapshot last, and what it says of itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

JUST_NOW, PRESENT, LATELY = 1.5, 3.0, 30.0
"""Seconds. A gateway asks each half second: what it said of itself holds, it is there, it shares the limits."""


class Told(NamedTuple):
    """What a gateway says of itself: see `Gateway`; ``suspects`` are runners that it suspects, ``crowded`` those that
    run fewer requests at once than they have slots, models by node."""

    metrics: str = ""
    behind: float = 0.0
    as_of: float = 0.0
    suspects: Mapping[str, frozenset[str]] = MappingProxyType({})
    crowded: Mapping[str, frozenset[str]] = MappingProxyType({})
    queues: Mapping[str, list[float]] = MappingProxyType({})
    aside: int = 0
    aside_names: tuple[str, ...] = ()
    store: bool | None = None


NOTHING = Told()


@dataclass
class Gateway:
    """A gateway that asks for snapshots. ``seen`` is epoch seconds, ``at`` the same in monotonic ones, ``version`` what
    it said it has, ``left`` whether it said that it ends.

    ``metrics`` is where its metrics are ("": nowhere), ``behind`` how long its oldest unshipped record waits (seconds),
    ``as_of`` control's time (epoch seconds) in the last answer that it had by then, 0 where it had none: its words held
    then, however long its question has waited since. ``queues`` who waits there, by model: how many, the oldest's wait
    (seconds), slots, seconds of a load, seconds that a request takes. ``aside`` damaged segments lie in its spool, of
    which ``aside_names`` has the first, those with a corrupt frame before torn ones. ``store``: whether it
    reaches Valkey; None where it serves nobody, not yet or no more.
    """

    name: str
    seen: float
    version: str
    metrics: str = ""
    behind: float = 0.0
    as_of: float = 0.0
    queues: Mapping[str, list[float]] = field(default_factory=dict)
    left: bool = False
    aside: int = 0
    aside_names: tuple[str, ...] = ()
    store: bool | None = None
    at: float = field(default_factory=time.monotonic)

    @property
    def present(self) -> bool:
        """Whether it was heard lately."""
        return time.monotonic() - self.at < PRESENT
