"""Checkpoints as `verify` reads them, those too that are signed while it reads: retention may be at work beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from corral.store.chain import ZERO, Older, Signed, key_id, read_checkpoint, signed_by

SAY = 500
"""After so many checkpoints somebody hears of them: a second's work at most."""


class Records(Protocol):
    """Where records and checkpoints come from, page by page (`corral.store.verify.Source`)."""

    def records(self, stream: str, after: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """The next records of a stream behind a place."""

    def checkpoints(self, after: int) -> Iterable[bytes]:
        """The checkpoints behind the first `after`, as they were signed until now."""


class Checkpoints:
    """Checkpoints that come in order; whatever is wrong with one is told in ``problems``, a list that others share."""

    def __init__(self, publics: Sequence[str], problems: list[str]) -> None:
        self.number = 0
        self._keys = {key_id(public): public for public in publics}
        self._previous = ZERO.hex()
        self._problems = problems
        self._lines = 0

    def take(self, lines: Iterable[bytes], say: Callable[[int], None] = lambda done: None) -> list[Signed]:
        """Read the next ones; those that are signed as they should be. `say` hears now and then how many were read."""
        good: list[Signed] = []
        for line in lines:
            self._lines += 1
            if not self._lines % SAY:
                say(self._lines)
            try:
                signed = read_checkpoint(line)
            except ValueError:
                self._problems.append(f"line {self._lines} of the checkpoints is none")
                continue
            checkpoint, number = signed.checkpoint, self.number
            name = f"checkpoint {checkpoint.number}"
            if checkpoint.number != number + 1:
                missing = f"{number + 1} to {checkpoint.number - 1}" if checkpoint.number > number + 1 else "an order"
                self._problems.append(f"{name} follows {number}: {missing} is missing")
            elif checkpoint.previous != self._previous:
                self._problems.append(f"{name} does not continue checkpoint {number}")
            self.number, self._previous = checkpoint.number, signed.digest()
            public = self._keys.get(checkpoint.key)
            if public is None:
                self._problems.append(f"{name} is signed by another key ({checkpoint.key})")
            elif not signed_by(signed, public):
                self._problems.append(f"{name} has a wrong signature: it was changed")
            else:
                good.append(signed)
        return good


class Beside:
    """The records of a source, and what retention has removed of them since its checkpoints were read.

    That records go is signed before the first of them is gone: what a page lacks is in a checkpoint by then.
    """

    def __init__(self, source: Records, checkpoints: Checkpoints) -> None:
        self._source, self._checkpoints = source, checkpoints
        self._dropped: dict[str, int] = {}
        self._older: Older | None = None
        self._asked = False

    def records(self, stream: str, after: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """As the source has them."""
        found = self._source.records(stream, after, limit)
        self._asked = False
        return found

    def dropped(self, stream: str, wanted: int) -> int:
        """Up to which place records of a stream were removed, as far as is known; asked where it is before `wanted`."""
        if self._dropped.get(stream, 0) < wanted:
            self._ask()
        return self._dropped.get(stream, 0)

    def older(self) -> Older | None:
        """What was signed last of the records older than the chain, None where nothing was meanwhile."""
        self._ask()
        return self._older

    def _ask(self) -> None:
        # Once for each page: who dropped every second record is not to be asked about for each of them.
        if self._asked:
            return
        self._asked = True
        for signed in self._checkpoints.take(self._source.checkpoints(self._checkpoints.number)):
            for span in signed.checkpoint.streams:
                self._dropped[span.stream] = max(span.dropped, self._dropped.get(span.stream, 0))
            self._older = signed.checkpoint.older or self._older
