"""Ships the spool to control, in order, from the offset that control confirmed."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import httpx

from corral.store.asking import http_client
from corral.store.spool import (
    SHIP_MAX,
    SpoolReader,
    SpoolWriter,
    framed,
    opened,
    put_aside,
    readable,
    salvage,
    whole_frames,
)

PAUSE = 0.2
PAUSE_BUSY = 0.5
BUSY = 1 << 20
"""Where so many bytes came in one pause, the next one is longer: each call has its price, on both sides."""

PAUSE_FAILED = 1.0

log = logging.getLogger(__name__)


class Damaged(NamedTuple):
    """A segment that is to be put aside: under which suffix, the bad frame's offset, how many records were rescued."""

    suffix: str
    offset: int
    rescued: int


class Shipper:
    """One gateway's spool on its way to control; ``backlog`` and ``behind`` tell what waits, and for how long."""

    def __init__(self, writer: SpoolWriter, folder: Path, control_url: str, token: str, gateway: str) -> None:
        self._writer = writer
        self._folder = folder
        self._reader = SpoolReader(folder)
        self._suffixes: dict[str, str] = {}
        self._damaged: dict[str, Damaged] = {}
        self._stuck = False
        # What an earlier process left waits since it was written.
        self._caught_up = min((opened(name) for name in self._reader.backlog()), default=time.time())
        self._url = f"{control_url}/internal/spool/{gateway}"
        self._headers = {"Authorization": f"Bearer {token}"}

    async def run(self) -> None:
        """Ship until cancelled."""
        silent = False
        async with http_client(10.0) as client:
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
            if segment != last:
                # Not only once all is shipped: the disk may hold so much once, not twice. And in order: what an earlier
                # life left behind damage has to be there before control hears that this one began.
                await self._finish(client, segment)
                last = segment
            confirmed, corrupt = await self._post(client, segment, offset, frames)
            shipped += confirmed - offset
            if corrupt:
                await self._put_aside(client, self._folder / segment, confirmed, ".corrupt")
            else:
                self._reader.confirm(segment, confirmed)
        await self._finish(client)
        self._caught_up = began
        return shipped

    async def _post(self, client: httpx.AsyncClient, segment: str, offset: int, frames: bytes) -> tuple[int, bool]:
        """Ship frames: up to where control has the segment, and whether the frame there is not what was written."""
        response = await client.post(
            f"{self._url}/{segment}", params={"offset": offset}, content=frames, headers=self._headers
        )
        corrupt = _is_corrupt(response)
        if response.status_code not in (200, 409) and not corrupt:
            raise ValueError(f"status {response.status_code}: {response.text[:200]}")
        return int(response.json()["offset"]), corrupt

    async def _finish(self, client: httpx.AsyncClient, before: str = "") -> None:
        """Delete what is shipped, and put aside what is torn, of the segments before one."""
        for path, offset in self._reader.drop_shipped(self._writer.segment, before):
            await self._put_aside(client, path, offset, ".torn")

    def backlog(self) -> int:
        """Bytes in the spool that control has not confirmed."""
        return sum(self._reader.backlog().values())

    def behind(self) -> float:
        """How long the oldest of them wait, or of those that the disk does not take, in seconds; 0 where there are
        none: control takes it that all else is there."""
        waits = [self._caught_up] if self._reader.backlog() else []
        if self._writer.refused:
            waits.append(self._writer.refused)
        return max(0.0, time.time() - min(waits)) if waits else 0.0

    def free(self) -> int:
        """Bytes that the spool's disk has left for it."""
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def put_aside(self) -> list[str]:
        """The names of segments that were put aside and are still there."""
        return put_aside(self._folder)

    async def drain(self) -> None:
        """Ship the rest before the process ends; what control does not take stays for the next start."""
        async with http_client(3.0) as client:
            try:
                await self.ship_all(client)
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                log.warning("the spool was not shipped to its end: %r", error)

    async def _put_aside(self, client: httpx.AsyncClient, path: Path, offset: int, suffix: str) -> None:
        """Put a segment aside whose rest cannot be shipped, once what is good of it is. ``offset``: up to there control
        has it."""
        if path == self._writer.segment:
            # What is still to be written must not follow what cannot be read.
            self._writer.roll()
            suffix = ".corrupt"
        suffix = self._suffixes.setdefault(path.name, suffix)  # it may take several turns
        rescued, count = _rescue(path, offset)
        # As a segment of its own: who is killed meanwhile makes and ships the same, and each record is taken once.
        await self._ship_rescued(client, f"{path.stem}.{offset}.{zlib.crc32(rescued):08x}", rescued)
        self._damaged[path.name] = Damaged(suffix, offset, count)
        self._reader.leave(path.name)
        self._rename()

    async def _ship_rescued(self, client: httpx.AsyncClient, segment: str, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            piece = data[offset : offset + SHIP_MAX]
            confirmed, corrupt = await self._post(client, segment, offset, piece[: whole_frames(piece)])
            if corrupt or confirmed == offset:
                raise ValueError(f"{segment}: no frame is taken at byte {offset}")
            offset = confirmed

    def _rename(self) -> None:
        """Rename the damaged segments: control has what is good of them. While that fails, nothing else is held up."""
        try:
            for name, damaged in list(self._damaged.items()):
                path = self._folder / name
                aside = path.with_suffix(damaged.suffix)
                try:
                    size = path.stat().st_size
                    path.replace(aside)
                except FileNotFoundError:  # somebody has taken it away
                    self._renamed(name)
                    continue
                self._renamed(name)
                what = "a corrupt frame" if damaged.suffix == ".corrupt" else "a torn frame"
                said = "%s has %s at byte %d of %d; kept as %s. %d records behind it were shipped all the same"
                log.error(said, path, what, damaged.offset, size, aside, damaged.rescued)
            self._stuck = False
        except OSError as error:
            if not self._stuck:
                log.error("damaged segments are not put aside yet, what is good of them was shipped: %s", error)
            self._stuck = True

    def _renamed(self, name: str) -> None:
        del self._damaged[name], self._suffixes[name]
        self._reader.forget(name)


def _rescue(path: Path, offset: int) -> tuple[bytes, int]:
    """The good records behind a bad frame, in frames, and how many. That an earlier life began is no news any more."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    frames, count = [], 0
    for payload in salvage(data):
        # What control could not read either would hold up what comes behind it.
        good = [one for one in payload.split(b"\n") if one and not one.startswith(b'{"t":"begin"') and readable(one)]
        if good:
            frames.append(framed(b"\n".join(good)))
            count += len(good)
    return b"".join(frames), count


def _is_corrupt(response: httpx.Response) -> bool:
    """Whether control refused frames because they are not what was once written: no retry mends them."""
    if response.status_code != 400:
        return False
    try:
        return bool(response.json()["error"]["code"] == "corrupt_frame")
    except (ValueError, KeyError, TypeError):
        return False
