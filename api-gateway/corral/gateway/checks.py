"""HAProxy hears that this gateway goes before it does, and sends it nobody any more; the same of one that is cut off.

Else what is on its way while the listener and the idle connections close is refused or lost. HAProxy tries it once more
elsewhere, which is too little where another gateway went a moment ago, and has not been found up again. Its own checks
have a header that no caller can send through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from corral.gateway import catalogue

if TYPE_CHECKING:
    from corral.gateway.server import Gateway

TOLD: Final = 2
"""How often it must hear it: HAProxy's `fall`."""
SILENT: Final = 1.5
"""A HAProxy that asks no more for so long (seconds) has gone: it asks each second."""
LEAST: Final = 0.75
"""How long it stays for those who ask (seconds): a gateway that came up just now is found meanwhile (`downinter`)."""
MOST: Final = 3.0
"""For how long at most they are waited for (seconds)."""
CHECK: Final = b"x-corral-check"
"""The header of HAProxy's checks; of what a caller sends, HAProxy takes out all that begin so."""
HEALTHY: Final = b'{"status":"healthy"}'
CUT_OFF: Final = b'{"status":"unhealthy","reason":"others reach the store, and it does not"}'
STOPPING: Final = b'{"status":"unhealthy","reason":"it is being stopped"}'


class Checks:
    """The HAProxies that asked, by address, with the monotonic time; and how often each was told that it goes."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._told: dict[str, int] = {}
        self._until = 0.0

    def ask(self, peer: str, now: float) -> bool:
        """Somebody asks; whether this gateway stays."""
        self._asked[peer] = now
        if not self._until:
            return True
        self._told[peer] = self._told.get(peer, 0) + 1
        return False

    def anew(self, peer: str, now: float) -> bool:
        """Whether somebody who asks now did not do so for a while: a server that does not answer it has down."""
        return now - self._asked.get(peer, float("-inf")) > SILENT

    def leave(self, now: float) -> None:
        """From now on whoever asks is told that this gateway goes."""
        self._until = now + MOST

    def heard(self, now: float) -> bool:
        """Whether all who ask have heard it by now, or are not waited for any longer."""
        asking = [peer for peer, at in self._asked.items() if now - at <= SILENT]
        if not asking or now >= self._until:
            return True
        return now >= self._until - MOST + LEAST and all([self._told.get(peer, 0) >= TOLD for peer in asking])


def answer(gateway: Gateway, path: str, peer: str, headers: Mapping[bytes, bytes], now: float) -> tuple[int, bytes]:
    """Status and body of `/health`, and of `/health/ready`. ``now`` is monotonic seconds."""
    if CHECK in headers and path == "/health":
        anew = gateway.checks.anew(peer, now)
        if not gateway.checks.ask(peer, now):
            return 503, STOPPING
        # To HAProxy 404 is no failure: it sends nobody new, until this is 200 again (http-check disable-on-404). But
        # to one that has this down, as its way was broken, it would be none that is found again.
        return (404, CUT_OFF) if gateway.cut_off.alone(now) and not anew else (200, HEALTHY)
    if path == "/health":
        return 200, HEALTHY
    if gateway.stopping:
        return 503, STOPPING
    return catalogue.readiness(gateway.snapshot, now, gateway.stale_after)
