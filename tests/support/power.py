"""A disk whose power can be cut: what it was given by then is left, what only the kernel's memory had is not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.process import Process

# The disk is a file on a file system of its own, which alone can be made to stand still: an image that is copied while
# it is written to would be of no moment that there was.
MADE = """
set -e
mount -t tmpfs -o size=256m,mode=0700 power "$1"
cd "$1"
mkdir below
truncate -s 96m below.img
mkfs.ext4 -q -F below.img
mount -o loop below.img below
truncate -s 32m below/disk.img
mkfs.ext4 -q -F below/disk.img
mount -o loop below/disk.img "$2"
exec sleep infinity
"""
# Whoever began it may be killed: then it hears the end of its input.
CUT = """
fsfreeze --freeze below
cp --sparse=always below/disk.img "$1.img" && echo kept
read -r _
fsfreeze --unfreeze below
"""


class PowerDisk:
    """An ext4 disk at `at`, seen as a `SmallDisk` is; `folder`, which is made, holds it and what its cuts left.

    It has no cache of its own: what was not flushed, but given to it, is on it. Only root can make one.
    """

    def __init__(self, folder: Path, at: Path) -> None:
        folder.mkdir()
        at.mkdir(exist_ok=True)
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MADE, "sh", str(folder), str(at)]
        self._holder = Process(argv, folder.with_suffix(".log"))
        self._folder, self._at = folder, at
        self._root = f"/proc/{self._holder.pid}/root"
        here = at.stat().st_dev
        self._holder.wait_until(lambda: self.now.stat().st_dev != here)
        self.seen = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]

    @property
    def now(self) -> Path:
        """The disk as who writes to it sees it."""
        return Path(f"{self._root}{self._at}")

    def _argv(self, script: str, *arguments: str) -> list[str]:
        return [*self.seen, "sh", "-c", f"cd '{self._folder}'\n{script}", "sh", *arguments]

    def _run(self, script: str, *arguments: str) -> None:
        subprocess.run(self._argv(script, *arguments), check=True, timeout=60)

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Keep what a power cut at this moment would leave. While the block runs nothing reaches the disk, so whoever
        waits for it waits; then all go on."""
        argv = self._argv(CUT, name)
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeps:
            assert keeps.stdout is not None
            assert keeps.stdout.readline() == b"kept\n"
            yield

    @contextmanager
    def left(self, name: str) -> Iterator[Path]:
        """The disk as that cut left it, its journal recovered."""
        self._run('set -e; mkdir "$1"; mount -o loop "$1.img" "$1"', name)
        try:
            yield Path(f"{self._root}{self._folder}/{name}")
        finally:
            self._run('umount "$1"', name)

    def back(self, name: str) -> None:
        """The power is back after that cut: the disk is what it left. Nobody may have a file of it open."""
        self._run('set -e; umount "$2"; mount -o loop "$1.img" "$2"', name, str(self._at))

    def close(self) -> None:
        """Give the disk up, once those who see it have ended."""
        self._holder.end()
