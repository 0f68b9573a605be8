"""What a simulated node does, as it sees it: a test holds to this what those who ask it believe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Of:
    """A model's: requests that run, the most at once, tokens written, loads that were begun."""

    running: int = 0
    most: int = 0
    tokens: int = 0
    loads: int = 0


class Work:
    """By model. Requests for one token are left out: they are canaries, which need no slot."""

    def __init__(self) -> None:
        self._of: dict[str, Of] = {}

    def of(self, model: str) -> Of:
        """A model's."""
        return self._of.setdefault(model, Of())

    @contextmanager
    def request(self, model: str, tokens: int) -> Iterator[Of]:
        """A request for so many tokens runs; what it writes is added to what is yielded."""
        if tokens == 1:
            yield Of()
            return
        found = self.of(model)
        found.running += 1
        found.most = max(found.most, found.running)
        try:
            yield found
        finally:
            found.running -= 1

    def listing(self) -> dict[str, dict[str, Any]]:
        return {model: asdict(of) for model, of in self._of.items()}

    def clear(self) -> None:
        """Count anew; what runs goes on."""
        for of in self._of.values():
            of.most, of.tokens, of.loads = of.running, 0, 0
