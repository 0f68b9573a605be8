"""The webhook of checkpoints: gets each one until it takes it, to be kept where nobody here can change it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from corral.store.asking import http_client
from corral.store.checkpoints import last_checkpoint, lines_after
from corral.store.database import Database

TIMEOUT = 10.0
PAGE = 100


class Webhook:
    """Sends checkpoints to `url`, if there is one. ``delivered``: the last that it took; `place` keeps that number.

    It may get one twice, the same bytes: where it took it and this process ended before that was noted, or where what
    `place` says is lost or is of another database. Controls that share a database send each of theirs.
    """

    def __init__(self, database: Database, url: str | None, place: Path) -> None:
        self._database, self._place = database, place
        self.url = url
        self.delivered = 0 if url is None else _read(place)

    async def deliver(self, last: int) -> None:
        """Send what was not taken yet, oldest first, a line in each call, up to the checkpoint `last`.

        Raises:
            httpx.HTTPError, OSError: it was not taken, or that could not be noted.
        """
        if self.url is None:
            return
        if self.delivered > await self._database.read(last_checkpoint):
            self.delivered = 0  # the database was replaced by an older one
        async with http_client(TIMEOUT) as client:
            while lines := await self._database.read(
                lines_after, self.delivered, min(PAGE, max(0, last - self.delivered))
            ):
                for line in lines:
                    headers = {"Content-Type": "application/json"}
                    (await client.post(self.url, content=line, headers=headers)).raise_for_status()
                    self.delivered += 1
                    await asyncio.to_thread(_write, self._place, self.delivered)


def _read(place: Path) -> int:
    """0 where there is no number that can be read: all are sent once more."""
    try:
        return max(0, int(place.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return 0


def _write(place: Path, number: int) -> None:
    """Replace the file: after a crash or on a full disk it has the old number or this one."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.fresh")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(f"{number}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, place)
