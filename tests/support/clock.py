"""A wall clock that a test sets, for every process of a stack: a small library before libc's (clock.c)."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The wall clock of what is started while the block of `jumping` runs."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared

    def set(self, seconds: float) -> None:
        """Have it be so much ahead of this machine's (or behind it), from now on."""
        self._shared[:8] = struct.pack("q", int(seconds * 1e9))


@contextmanager
def jumping(folder: Path) -> Iterator[tuple[Clock, dict[str, str]]]:
    """A clock, and the environment of those that go by it. Skips where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler makes the clock that jumps")
    library, file = folder / "clock.so", folder / "clock"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, _SOURCE], check=True, timeout=60)
    file.write_bytes(bytes(8))
    descriptor = os.open(file, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 8) as shared:
            yield Clock(shared), {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(file)}
    finally:
        os.close(descriptor)
