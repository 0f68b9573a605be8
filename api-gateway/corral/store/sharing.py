"""Which gateways share limits and slots while the store is away, and who says so."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Sharing:
    """The gateways that share, ``names`` of them, this one among them.

    The store says it, as long as it is there. Until it was read once (``read``) others do: control, and the file of an
    earlier run. Who starts while the store is away would else take itself for the only one. ``began`` is when this one
    did (monotonic seconds): what its minute holds is not known before one has passed. ``forgot`` is when the
    store was there but found to have forgotten what was used; 0: it knows. ``told`` are the scopes whose use it told of
    since that was read: it does not tell when requests end.
    """

    def __init__(self, gateway: str) -> None:
        self.names: list[str] = [gateway]
        self.count = 1
        self.read = False
        self.began = time.monotonic()
        self.forgot = 0.0
        self.told: set[str] = set()

    def said(self, names: list[str]) -> None:
        """What the store says."""
        self.names, self.count, self.read = sorted(names), max(1, len(names)), True

    def heard(self, names: Iterable[str]) -> None:
        """What others say. Rather too many than too few share: none of them knows of all."""
        if not self.read:
            self.names = sorted({*self.names, *names})
            self.count = len(self.names)
