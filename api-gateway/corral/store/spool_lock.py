"""Whose a spool is: the one process that holds its lock writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

LOCK: Final = "lock"
"""The file of a spool that its owner has locked."""

_MISSED: Final = 100
"""How often it may be gone again while it is made, before that is no race any more."""


def hold(folder: Path) -> int:
    """Be the one process that writes to a spool, until the descriptor is closed or the process ends.

    Raises:
        OSError: another one is (BlockingIOError), or there can be no such file.
    """
    missed = 0
    while True:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (FileExistsError, FileNotFoundError):
            # Who has adopted it may remove the folder between these two.
            missed += 1
            if missed > _MISSED:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        # Who had it until now may have removed the file: nobody would see a lock on that.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        os.close(descriptor)


def held(folder: Path) -> bool:
    """Whether a process writes to a spool."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
