"""Ships the spool to control, in order, from the offset that control confirmed."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import httpx

from corral.store.spool import SpoolReader, SpoolWriter, opened, put_aside, readable, salvage

PAUSE = 0.2
PAUSE_BUSY = 0.5
BUSY = 1 << 20
"""Where so many bytes came in one pause, the next one is longer: each call has its price, on both sides."""

PAUSE_FAILED = 1.0

log = logging.getLogger(__name__)


class Damaged(NamedTuple):
    """A segment that is to be put aside: under which suffix, the bad frame's offset, how many records are rescued."""

    suffix: str
    offset: int
    rescued: int


class Shipper:
    """One gateway's spool on its way to control; ``backlog`` and ``behind`` tell what waits, and for how long."""

    def __init__(self, writer: SpoolWriter, folder: Path, control_url: str, token: str, gateway: str) -> None:
        self._writer = writer
        self._folder = folder
        self._reader = SpoolReader(folder)
        self._damaged: dict[str, Damaged] = {}
        self._stuck = False
        # What an earlier process left waits since it was written.
        self._caught_up = min((opened(name) for name in self._reader.backlog()), default=time.time())
        self._url = f"{control_url}/internal/spool/{gateway}"
        self._headers = {"Authorization": f"Bearer {token}"}

    async def run(self) -> None:
        """Ship until cancelled."""
        silent = False
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            while True:
                try:
                    shipped = await self.ship_all(client)
                    silent = False
                    await asyncio.sleep(PAUSE_BUSY if shipped >= BUSY else PAUSE)
                except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                    if not silent:
                        log.warning("control takes no records, they stay in the spool: %r", error)
                    silent = True
                    await asyncio.sleep(PAUSE_FAILED)
                except Exception:  # a fault of ours, or of control's: requests go on, their records stay
                    log.exception("the spool was not shipped")
                    await asyncio.sleep(PAUSE_FAILED)

    async def ship_all(self, client: httpx.AsyncClient) -> int:
        """Ship what is in the spool at its start; how many bytes that was.

        What comes meanwhile waits for the next time: under load there would always be a little more, and each call
        costs more than all the records of its requests.

        Raises:
            httpx.HTTPError: control cannot be reached.
            ValueError: control refused the frames.
        """
        shipped, began, last = 0, time.time(), ""
        end = sum(self._reader.backlog().values())
        self._rename()
        while shipped < end and (piece := self._reader.next_chunk()) is not None:
            segment, offset, frames = piece
            response = await client.post(
                f"{self._url}/{segment}", params={"offset": offset}, content=frames, headers=self._headers
            )
            if response.status_code not in (200, 409) and not _is_corrupt(response):
                raise ValueError(f"status {response.status_code}: {response.text[:200]}")
            confirmed = int(response.json()["offset"])
            shipped += confirmed - offset
            if response.status_code == 400:
                self._put_aside(self._folder / segment, confirmed, ".corrupt")
            else:
                self._reader.confirm(segment, confirmed)
            if segment != last:  # not only once all is shipped: the disk may hold so much once, not twice
                self._reader.drop_shipped(self._writer.segment, self._put_aside)
                last = segment
        self._reader.drop_shipped(self._writer.segment, self._put_aside)
        if not self._damaged:
            self._caught_up = began
        return shipped

    def backlog(self) -> int:
        """Bytes in the spool that control has not confirmed."""
        return sum(self._reader.backlog().values())

    def behind(self) -> float:
        """How long the oldest of them wait, in seconds; 0 where there are none."""
        return max(0.0, time.time() - self._caught_up) if self._reader.backlog() else 0.0

    def free(self) -> int:
        """Bytes that the spool's disk has left for it."""
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def put_aside(self) -> list[str]:
        """The names of segments that were put aside and are still there."""
        return put_aside(self._folder)

    async def drain(self) -> None:
        """Ship the rest before the process ends; what control does not take stays for the next start."""
        async with httpx.AsyncClient(timeout=3.0, trust_env=False) as client:
            try:
                await self.ship_all(client)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                log.warning("the spool was not shipped to its end: %r", error)

    def _put_aside(self, path: Path, offset: int, suffix: str = ".torn") -> None:
        """Put a segment aside whose rest cannot be shipped. ``offset``: up to there control has it."""
        if path == self._writer.segment:
            # What is still to be written must not follow what cannot be read.
            self._writer.roll()
            suffix = ".corrupt"
        self._damaged[path.name] = Damaged(suffix, offset, self._rescue(path, offset))
        self._reader.leave(path.name)
        self._rename()

    def _rename(self) -> None:
        """Rename the damaged segments whose good records are in the spool anew, not before: nobody reads them there.

        Who is killed between the two ships those records twice, and control takes each once. While the disk takes
        nothing the segments stay as they are, and what came after them is shipped: that makes room.
        """
        if not self._damaged:
            return
        try:
            self._writer.flush()
            self._writer.sync()
            for name, damaged in list(self._damaged.items()):
                path = self._folder / name
                aside = path.with_suffix(damaged.suffix)
                del self._damaged[name]
                try:
                    size = path.stat().st_size
                    path.replace(aside)
                except FileNotFoundError:  # somebody has taken it away, and what was behind is in the spool anew
                    self._reader.forget(name)
                    continue
                except OSError:
                    self._damaged[name] = damaged
                    raise
                self._reader.forget(name)
                what = "a corrupt frame" if damaged.suffix == ".corrupt" else "a torn frame"
                said = "%s has %s at byte %d of %d; kept as %s. %d records behind it are shipped all the same"
                log.error(said, path, what, damaged.offset, size, aside, damaged.rescued)
            self._stuck = False
        except OSError as error:
            if not self._stuck:
                log.error("damaged segments are not put aside yet, what is behind them is shipped: %s", error)
            self._stuck = True

    def _rescue(self, path: Path, offset: int) -> int:
        """Write the good records behind a bad frame anew; how many. That an earlier life began is no news any more."""
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        records = [one for payload in salvage(data) for one in payload.split(b"\n")]
        # What control could not read either would be put aside again and again.
        records = [one for one in records if not one.startswith(b'{"t":"begin"') and readable(one)]
        for record in records:
            self._writer.append(record)
        return len(records)


def _is_corrupt(response: httpx.Response) -> bool:
    """Whether control refused frames because they are not what was once written: no retry mends them."""
    if response.status_code != 400:
        return False
    try:
        return bool(response.json()["error"]["code"] == "corrupt_frame")
    except (ValueError, KeyError, TypeError):
        return False
