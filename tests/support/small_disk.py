"""A disk that is small enough to be filled: in memory, and seen by those alone who are started to see it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from support.process import Process


class SmallDisk:
    """A disk at `folder`, which is made; it is gone with the test run, however that ends. Only root can make one.

    ``seen`` is what a command begins with whose process is to have it.
    """

    def __init__(self, folder: Path, size: str, owner: str = "") -> None:
        """`size` as `mount` takes it (``24m``); `owner`: a user whose it is."""
        folder.mkdir()
        # Its mount is in the sight of a process of its own, and of those that enter it: none is left to be undone.
        mount = f"mount -t tmpfs -o size={size},mode=0700 small '{folder}' && exec sleep infinity"
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount]
        self._holder = Process(argv, folder.with_suffix(".log"))
        self._inside = Path(f"/proc/{self._holder.pid}/root{folder}")
        here = folder.stat().st_dev
        self._holder.wait_until(lambda: self._inside.stat().st_dev != here)
        if owner:
            shutil.chown(self._inside, owner, owner)
        self.seen = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        self._ballast = self._inside / "ballast"

    def fill(self) -> None:
        """Leave no byte of it. What somebody has made room of since is taken by the next call."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (65536, 64):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the disk up, with all that is on it, once those who see it have ended."""
        self._holder.end()
