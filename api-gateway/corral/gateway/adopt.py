"""Spools of gateways that are gone: who shares the folder with them ships what they left, under their name.

A gateway holds its spool's lock as long as it lives, and ends with an empty spool if it can. One that was killed and is
not started again leaves segments: after GONE seconds without a write they are shipped as they are, and then that its
requests will not be settled any more (store/recovery.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from pathlib import Path

import httpx
import msgspec

from corral.gateway.records import Begun
from corral.gateway.shipper import Shipper
from corral.store.asking import http_client
from corral.store.spool import SpoolWriter, put_aside, segments
from corral.store.spool_lock import LOCK, held, hold

EVERY = 15.0
GONE = 60.0
PATIENCE = 15.0
"""How long a gateway waits at its start for who adopts its spool just then."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

log = logging.getLogger(__name__)


def own(folder: Path) -> int:
    """Hold the spool of this gateway; the lock's descriptor.

    Raises:
        OSError: another process holds it.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return hold(folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(f"{folder} is the spool of another process that runs: gateway.name is unique") from None
        time.sleep(0.1)


class Adopter:
    """Looks for spools in `root` that nobody writes to any more, and ships them."""

    def __init__(self, root: Path, name: str, control_url: str, token: str) -> None:
        self._root, self._name, self._control_url, self._token = root, name, control_url, token

    def put_aside(self) -> list[str]:
        """Segments that were put aside in spools that nobody has any more, as FOLDER/NAME."""
        found: list[str] = []
        for folder in _others(self._root, self._name):
            with contextlib.suppress(OSError):  # not ours to read
                if not held(folder):
                    found += [f"{folder.name}/{name}" for name in put_aside(folder)]
        return found

    async def run(self) -> None:
        """Look each EVERY seconds, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            for folder in _others(self._root, self._name):
                try:
                    await _adopt(folder, self._control_url, self._token)
                except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                    log.warning("%s, which nobody writes to any more, is not shipped yet: %r", folder, error)
                except Exception:
                    log.exception("%s was not shipped", folder)


def _others(root: Path, name: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in root.iterdir() if path.name != name and _NAME.fullmatch(path.name))
    return []


async def _adopt(folder: Path, control_url: str, token: str) -> None:
    try:
        if not _is_left(folder):
            return
        lock = hold(folder)
    except (BlockingIOError, FileNotFoundError, NotADirectoryError):
        return
    try:
        if not _is_left(folder):
            # Another one has adopted it since that look, or its gateway was back.
            if not segments(folder):
                _remove(folder)
            return
        writer = SpoolWriter(folder)
        shipper = Shipper(writer, folder, control_url, token, folder.name)
        try:
            async with http_client(10.0) as client:
                await shipper.ship_all(client)
                # Only now: it says that all before it is there.
                writer.append(msgspec.json.encode(Begun(folder.name, time.time(), gone=True)))
                writer.flush()
                await shipper.ship_all(client)
        finally:
            writer.close()
        writer.segment.unlink(missing_ok=True)
        log.warning("the spool of %s, which is gone, was shipped: %s", folder.name, folder)
        _remove(folder)
    finally:
        os.close(lock)


def _is_left(folder: Path) -> bool:
    """Whether a spool has something in it that was written a while ago."""
    written = [path.stat().st_mtime for path in segments(folder)]
    return bool(written) and time.time() - max(written) >= GONE


def _remove(folder: Path) -> None:
    (folder / LOCK).unlink()
    with contextlib.suppress(OSError):  # what was put aside stays
        folder.rmdir()
