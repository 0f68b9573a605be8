"""Who asks whether this gateway is healthy hears that it goes before it does, and sends it nobody any more.

Else what is on its way while the listener and the idle connections close is refused or lost. HAProxy tries it once more
elsewhere, which is too little where another gateway went a moment ago, and has not been found up again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.gateway import catalogue

if TYPE_CHECKING:
    from corral.gateway.server import Gateway

TOLD: Final = 2
"""How often it must hear it: HAProxy's `fall`."""
SILENT: Final = 1.5
"""Who asks no more for so long (seconds) has gone: HAProxy asks each second."""
LEAST: Final = 0.75
"""How long it stays for those who ask (seconds): a gateway that came up just now is found meanwhile (`downinter`)."""
MOST: Final = 3.0
"""For how long at most they are waited for (seconds)."""
PEERS_MAX: Final = 64


class Checks:
    """Who asked, by address, with the monotonic time; and how often each was told that this gateway goes."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._told: dict[str, int] = {}
        self._until = 0.0

    def ask(self, peer: str, now: float) -> bool:
        """Somebody asks; whether this gateway stays."""
        if peer not in self._asked and len(self._asked) >= PEERS_MAX:
            self._asked = {other: at for other, at in self._asked.items() if now - at <= SILENT}
        self._asked[peer] = now
        if not self._until:
            return True
        self._told[peer] = self._told.get(peer, 0) + 1
        return False

    def leave(self, now: float) -> None:
        """From now on whoever asks is told that this gateway goes."""
        self._until = now + MOST

    def heard(self, now: float) -> bool:
        """Whether all who ask have heard it by now, or are not waited for any longer."""
        asking = [peer for peer, at in self._asked.items() if now - at <= SILENT]
        if not asking or now >= self._until:
            return True
        return now >= self._until - MOST + LEAST and all([self._told.get(peer, 0) >= TOLD for peer in asking])


def answer(gateway: Gateway, path: str, peer: str, now: float) -> tuple[int, bytes]:
    """Status and body of `/health`, and of `/health/ready`. ``now`` is monotonic seconds."""
    if not gateway.checks.ask(peer, now):
        return 503, b'{"status":"unhealthy","reason":"it is being stopped"}'
    if path == "/health":
        return 200, b'{"status":"healthy"}'
    return catalogue.readiness(gateway.snapshot, now, gateway.stale_after)
