"""What control has seen of a node since it started: residence of models, canaries, failed probes, decode rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Residence:
    """A model in a node's memory. Times are monotonic seconds, ``tried`` of its last canary, 0 for none.

    ``fresh``: it was seen to come, and may still be loading until it is ``proven`` by an answer. ``failing``: its
    last canary did not end well.
    """

    since: float
    fresh: bool
    tried: float = 0.0
    proven: bool = False
    failing: bool = False


@dataclass(slots=True)
class Measured:
    """By model, but for the canary's last duration (seconds), its last success (epoch seconds) and failed probes."""

    residents: dict[str, Residence] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    unloads: dict[str, int] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    canary_duration: float | None = None
    canary_success: float | None = None
    probe_failures: int = 0
    asked: bool = False

    def held(self, names: Iterable[str]) -> None:
        """Models that the node has on disk: they are counted from here on."""
        for name in names:
            self.loads.setdefault(name, 0)
            self.unloads.setdefault(name, 0)

    def resident(self, names: set[str], now: float) -> None:
        """The models in memory now; what came and went since the last time is counted, but for the first time."""
        self.held(names)
        for name in self.residents.keys() - names:
            del self.residents[name]
            self.unloads[name] += 1
        for name in names - self.residents.keys():
            self.residents[name] = Residence(now, self.asked)
            if self.asked:
                self.loads[name] += 1
        self.asked = True

    @property
    def canary_ok(self) -> bool | None:
        """Whether each resident model answered its last canary; None where none was asked."""
        if any(residence.failing for residence in self.residents.values()):
            return False
        return True if any(residence.proven for residence in self.residents.values()) else None
