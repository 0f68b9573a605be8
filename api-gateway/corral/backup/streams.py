"""The ends of the pipes between tar, age and the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, BinaryIO


class Sink:
    """A file to write to that remembers why it could not be."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


class Whole:
    """Writes all it is given: a pipe takes what it has room for."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            view = view[self._raw.write(view) :]
        return len(data)

    def flush(self) -> None:
        pass


class Bounded:
    """The next `size` bytes of a file; `progress` hears how many were read."""

    def __init__(self, file: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
        self._file, self._left, self._progress = file, size, progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self._progress(len(data))
        return data


class Hashing:
    """Reads at most `size` bytes of a source and hashes them; one that has fewer is an error."""

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source, self._left = source, size
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._source.read(wanted) if wanted else b""
        if wanted and not data:
            raise EOFError(f"{self._left} bytes are missing")
        self._left -= len(data)
        self.digest.update(data)
        return data
