"""Nodes that run fewer requests at once than they have slots: Ollama does not say so, but who waits there shows it.

A request that has a slot waits for its first token while others of its model go on: it is in the node's own queue.
"""

from __future__ import annotations

from typing import Final

WITHIN: Final = 600.0
"""Seconds for which it is remembered."""
LEAST: Final = 3
"""So many requests say more than one with a prompt that was hard to guess."""
REMEMBERED: Final = 16

Runner = tuple[str, str]


class Crowding:
    """Which requests waited at a node, by runner (node and model)."""

    def __init__(self) -> None:
        self._waited: dict[Runner, dict[str, float]] = {}

    def note(self, runner: Runner, request: str, now: float) -> None:
        """A request waits there. `now` is monotonic seconds."""
        waited = self._waited.setdefault(runner, {})
        waited[request] = now
        if len(waited) > REMEMBERED:
            del waited[next(iter(waited))]

    def crowded(self, now: float) -> list[Runner]:
        """Runners at which several did lately."""
        for runner, waited in list(self._waited.items()):
            kept = {request: at for request, at in waited.items() if at > now - WITHIN}
            if kept:
                self._waited[runner] = kept
            else:
                del self._waited[runner]
        return [runner for runner, waited in self._waited.items() if len(waited) >= LEAST]
