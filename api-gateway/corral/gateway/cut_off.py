"""This gateway has lost the store, and others have it: HAProxy is to send it nobody until it is back.

It would admit its share of each limit beside the whole, which the others go on to admit, and give away slots that they
give too. Where most have lost the store nobody leaves: each has its share then, and callers who serves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from corral.store.valkey import Valkey

LASTING: Final = 2.0
"""So long (seconds) it is elsewhere, by each word of control's, before this gateway leaves.

Who asks little sees after half a second that the store is gone, and tells control of it within another: for a second
others seem to have what is lost for all.
"""
CURRENT: Final = 1.5
"""For so long (seconds) control's word holds; gateways ask for it each half second."""


class CutOff:
    """What control says of the others' store, beside this gateway's own; times are monotonic seconds."""

    def __init__(self, store: Valkey) -> None:
        self._store = store
        self._since = 0.0
        self._said = 0.0
        self._then = 0

    def heard(self, elsewhere: bool, now: float) -> None:
        """Control says whether of the gateways that it heard just now as many have the store as have not."""
        if not elsewhere or self._store.connected:
            self._since = 0.0
            return
        if not self._since or self._store.connections != self._then or now - self._said > CURRENT:
            self._since, self._then = now, self._store.connections
        self._said = now

    def alone(self, now: float) -> bool:
        """Whether others have had the store for a while, and have it, and this one has not: it is to be left alone."""
        lasting = self._since > 0.0 and self._said - self._since >= LASTING and now - self._said <= CURRENT
        return lasting and not self._store.connected and self._store.connections == self._then
