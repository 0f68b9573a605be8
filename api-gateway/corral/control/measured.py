"""What control has seen of a node since it started: residence of models, canaries, failed probes, decode rates."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from corral.fleet.dispatch import SAMPLE_MIN
from corral.fleet.fallback import Pace, Streams
from corral.fleet.hanging import patience
from corral.fleet.node import canonical_name

GLANCE = 2.0
"""So much later than it happened may be seen what becomes resident."""
HEARD = 3.0
"""For so long what a gateway said of runners holds (seconds)."""


@dataclass(slots=True)
class Residence:
    """A model in a node's memory. Times are monotonic seconds, ``tried`` of its last canary, 0 for none.

    ``fresh``: it was seen to come (at ``appeared``, epoch seconds), and may still be loading until it is ``proven`` by
    an answer. ``failing``: its last canary did not end well. ``load``: seconds, the longest that a request waited.
    """

    since: float
    fresh: bool
    appeared: float = 0.0
    load: float = 0.0
    tried: float = 0.0
    proven: bool = False
    failing: bool = False


@dataclass(slots=True)
class Measured:
    """By model, but for the canary's last duration (seconds), its last success (epoch seconds) and failed probes.

    ``on_gpu`` is the largest share of a model's memory that was seen on an accelerator.
    """

    residents: dict[str, Residence] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    unloads: dict[str, int] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    unseen: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By model, of the last request to one that was not seen in memory yet: when it was sent, its first token."""
    told: set[str] = field(default_factory=set)
    """Resident models whose load control has timed itself."""
    rates: dict[str, float] = field(default_factory=dict)
    on_gpu: dict[str, float] = field(default_factory=dict)
    paces: dict[str, Pace] = field(default_factory=dict)
    """Of models that were on an accelerator, by the node's word."""
    streams: Streams = field(default_factory=Streams)
    canary_duration: float | None = None
    canary_success: float | None = None
    probe_failures: int = 0
    asked: bool = False
    begun: dict[str, float] = field(default_factory=dict)
    """Models that this control loads there now, and for how long that excuses other runners (seconds)."""
    elsewhere: dict[str, float] = field(default_factory=dict)
    """The same, of other controls."""

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
            self.told.discard(name)
            self.unloads[name] += 1
            if name in self.paces:
                self.paces[name].restart()
        for name in names - self.residents.keys():
            self.residents[name] = Residence(now, self.asked, time.time())
            if self.asked:
                self.loads[name] += 1
            if name in self.unseen:
                self.waited(name, *self.unseen.pop(name))
        self.asked = True

    def holds(self, ps: Iterable[Mapping[str, Any]]) -> None:
        """The entries of an `/api/ps`: what is on an accelerator now, and of what its speed is."""
        ps = list(ps)
        shares = gpu_shares(ps)
        for name, share in shares.items():
            self.on_gpu[name] = max(share, self.on_gpu.get(name, 0.0))
        # An older version may stand beside the new one for a moment.
        for name, version in {one["name"]: (one.get("digest"), one.get("size")) for one in reversed(ps)}.items():
            pace = self.paces.get(name)
            if (pace is None and shares.get(name, 0.0) > 0.0) or (pace is not None and pace.version != version):
                self.paces[name] = Pace(version)

    def decoded(self, model: str, tokens: int, began: float, ended: float) -> None:
        """A stream has made so many tokens between these (epoch seconds)."""
        beside = self.streams.note(began, ended)
        pace = self.paces.get(model)
        if pace is None or tokens < SAMPLE_MIN or ended <= began or self._loaded_since(began):
            return
        pace.note(tokens / (ended - began), beside, ended)

    def _loaded_since(self, moment: float) -> bool:
        """Whether something was loaded there since (epoch seconds): streams were slow beside that."""
        came = [residence.appeared for residence in self.residents.values() if residence.fresh]
        return bool(self.loading) or max(came, default=0.0) > moment

    @property
    def slow(self) -> dict[str, str]:
        """Resident models that are as slow as on a CPU though the node says that they are not there; how slow."""
        return {
            name: f"{name} gives {pace.last:.3g} tokens/s there and gave {pace.good:.3g}, as if it ran on its CPU"
            for name, pace in self.paces.items()
            if pace.fallen and name in self.residents
        }

    @contextmanager
    def loads_now(self, model: str, seconds: float = 0.0) -> Iterator[None]:
        """Control loads a model there, which should take so many seconds (0: as long as it took the last time)."""
        name = canonical_name(model)
        self.begun[name] = round(patience(seconds or self.load_seconds.get(name, 0.0)), 1)
        try:
            yield
        finally:
            self.begun.pop(name, None)

    @property
    def loading(self) -> dict[str, float]:
        """Models that are loaded there now, and for how long that excuses the silence of other runners (seconds)."""
        return self.elsewhere | self.begun

    def loaded(self, model: str, seconds: float) -> None:
        """Control has loaded a model, and knows how long that took."""
        self.load_seconds[model] = seconds
        self.told.add(model)

    def waited(self, model: str, begun: float, first: float) -> None:
        """A request that was sent at `begun` had its first token at `first`: did it wait for the model's load?

        Ollama lists a model once it is loaded, and control looks each second: that is how exact the load's time is.
        Epoch seconds.
        """
        if model in self.told:
            return
        residence = self.residents.get(model)
        if residence is None:
            self.unseen[model] = begun, first  # its record may be here before control looks again
            return
        if not residence.fresh or not begun < residence.appeared < first + GLANCE:
            return
        residence.load = max(residence.load, min(residence.appeared, first) - begun)
        self.load_seconds[model] = residence.load

    @property
    def canary_ok(self) -> bool | None:
        """Whether each resident model answered its last canary; None where none was asked."""
        if any(residence.failing for residence in self.residents.values()):
            return False
        return True if any(residence.proven for residence in self.residents.values()) else None


def gpu_shares(ps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """By model of an `/api/ps`, the share of its memory that is an accelerator's."""
    sizes = {entry["name"]: (number(entry.get("size")), number(entry.get("size_vram"))) for entry in ps}
    return {name: vram / size for name, (size, vram) in sizes.items() if size > 0}


def number(value: object) -> float:
    """What a node sent as a number; 0 where it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def overbooked(crowded: Mapping[str, tuple[float, frozenset[str]]], slots: int) -> str | None:
    """What is wrong with a node whose runners run fewer requests at once than it has slots, as gateways said lately."""
    since = time.monotonic() - HEARD
    models = {model for at, models in crowded.values() if at >= since for model in models}
    if not models:
        return None
    waits = f"requests for {', '.join(sorted(models))} wait at it though they have a slot"
    return f"{waits}: it runs fewer at once than its {slots} slots; set OLLAMA_NUM_PARALLEL there, or nodes[].slots"
