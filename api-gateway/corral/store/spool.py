"""The spool: append-only segment files that hold what must not be lost until control has it.

A segment is a row of frames: payload length (u32, little endian), CRC-32 of the payload (u32, little endian),
payload (a record, as a JSON object). A frame holds one record, so that damage to it costs no other; earlier versions
put the records of a group into one, a line each, and that is still read. Segments are named by the millisecond they
were begun in, ``0001795452442490.seg``, so that a name never comes back while control remembers how far it has it; only
the last is written to.
A gateway appends, commits in groups, and ships whole frames to control from the offset that control last
confirmed; a segment that is shipped to its end and no longer written to is deleted. One that cannot be shipped on
is put aside under another name, so that what came after it is not held up: ``.torn`` ends within a frame that a
crash cut, ``.corrupt`` has a frame that is not what was written.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgspec

from corral.store.disk import sync_folder

HEADER: Final = struct.Struct("<II")
SEGMENT_BYTES: Final = 64 << 20
FRAME_MAX: Final = 1 << 20
SHIP_MAX: Final = 4 << 20
"""Most bytes of frames that are shipped at once."""

_BEGIN: Final = b'{"t":"'
"""How a payload begins."""

ASIDE = (".torn", ".corrupt")
_ASIDE_NAME: Final = re.compile(r"\d{16}\.(torn|corrupt)")

_SEGMENT_NAME: Final = re.compile(r"(\d{16})\.seg")
_LAST_NUMBER: Final = 10**16 - 1
_decode_lines: Final = msgspec.json.Decoder(dict[str, Any]).decode_lines
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encode: Final = msgspec.json.Encoder().encode
_pack: Final = HEADER.pack

log = logging.getLogger(__name__)


class SpoolCorrupt(ValueError):
    """A frame whose length or checksum is wrong.

    ``offset`` is the position of the bad frame's first byte.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"spool frame at byte {offset}: {reason}")
        self.offset = offset


def encode_frame(record: dict[str, Any]) -> bytes:
    """One record as a frame."""
    return framed(_encode(record))


def framed(payload: bytes) -> bytes:
    """A frame of encoded records, a line each."""
    return HEADER.pack(len(payload), crc32(payload)) + payload


def decode_frames(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of the whole frames of `data` as ``(offset of its frame's end, record)``; a cut tail is left out.

    Raises:
        SpoolCorrupt: a frame's checksum, length or payload is wrong.
    """
    position = 0
    while position + HEADER.size <= len(data):
        length, checksum = HEADER.unpack_from(data, position)
        if length > FRAME_MAX:
            raise SpoolCorrupt(position, f"a length of {length} bytes")
        end = position + HEADER.size + length
        if end > len(data):
            return
        payload = data[position + HEADER.size : end]
        if crc32(payload) != checksum:
            raise SpoolCorrupt(position, "wrong checksum")
        try:
            records = _decode_lines(payload)
        except _UNREADABLE as error:
            raise SpoolCorrupt(position, str(error)) from None
        for record in records:
            yield end, record
        position = end


def readable(payload: bytes) -> bool:
    """Whether a payload is what `decode_frames` can read: a good checksum says that it was written, not what."""
    try:
        _decode_lines(payload)
    except _UNREADABLE:
        return False
    return True


def whole_frames(data: bytes) -> int:
    """Length of the longest prefix of `data` that ends on a frame's end."""
    position, size = 0, len(data)
    while position + 8 <= size:
        # By hand: compiled, this is a tenth of an unpack, and each record passes here once more on its way to control.
        end = position + 8 + data[position] + (data[position + 1] << 8) + (data[position + 2] << 16)
        end += data[position + 3] << 24
        if end > size:
            break
        position = end
    return position


def salvage(data: bytes) -> Iterator[bytes]:
    """The payloads of the good frames of `data`, whatever stands between them."""
    position, size = 0, len(data)
    while position + HEADER.size <= size:
        length, checksum = HEADER.unpack_from(data, position)
        end = position + HEADER.size + length
        fits = length <= FRAME_MAX and end <= size
        if fits and crc32(data[position + HEADER.size : end]) == checksum:
            yield data[position + HEADER.size : end]
            position = end
        elif fits and _is_frame(data, end):
            position = end  # something within was damaged, not its length
        else:
            begin = data.find(_BEGIN, position + 1 + HEADER.size)
            if begin < 0:
                return
            position = begin - HEADER.size


def _is_frame(data: bytes, position: int) -> bool:
    if position + HEADER.size > len(data):
        return position == len(data)
    length, checksum = HEADER.unpack_from(data, position)
    payload = data[position + HEADER.size : position + HEADER.size + length]
    return bool(length <= FRAME_MAX and len(payload) == length and crc32(payload) == checksum)


def segments(folder: Path) -> list[Path]:
    """The segment files of a folder, oldest first."""
    # What has such a name and is no file, or leads to none, is nobody's record: reading it would hold up what is.
    return sorted(path for path in folder.iterdir() if _SEGMENT_NAME.fullmatch(path.name) and path.is_file())


def put_aside(folder: Path) -> list[str]:
    """The names of segments that were put aside in a folder: those with a corrupt frame first, then oldest first."""
    try:
        found = [path for path in folder.iterdir() if _ASIDE_NAME.fullmatch(path.name)]
    except OSError:  # no folder, or none of ours to read
        return []
    return [path.name for path in sorted(found, key=lambda path: (path.suffix, path.name))]


def opened(segment: str) -> float:
    """When a segment was opened, in epoch seconds: its name says so."""
    return int(segment.partition(".")[0]) / 1e3


class SpoolWriter:
    """Appends to the newest segment of a folder; not thread-safe, one writer per folder.

    ``append`` only buffers; ``flush`` hands the whole group to the kernel in one write (durability `written`: what
    was flushed survives the death of this process; `synced`: the caller syncs ``descriptor`` as well). A new writer
    always opens a new segment, so that a tail torn by a crash is never followed by good frames. ``refused``: since when
    the disk has not taken the group that waits (epoch seconds), 0 where none does.
    """

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, synced: bool = False) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._synced = synced
        self._folder = folder
        self._limit = segment_bytes
        self._frames: list[bytes] = []
        self.refused = 0.0
        if synced:
            sync_folder(folder.parent)
        existing = segments(folder)
        self._number = int(existing[-1].stem) if existing else 0
        self._fd = -1
        self._size = 0
        self._stuck = False
        self._open_next()

    @property
    def segment(self) -> Path:
        """The segment that is written to now."""
        return self._folder / f"{self._number:016d}.seg"

    def descriptor(self) -> int:
        """A descriptor of the segment for the caller to sync and to close."""
        return os.dup(self._fd)

    def append(self, payload: bytes) -> None:
        """Put an encoded record into the group that the next `flush` writes."""
        self._frames += (_pack(len(payload), crc32(payload)), payload)

    def flush(self) -> None:
        """Write the group.

        A segment that is full but has no successor yet is written on: what is written is never reported as lost.

        Raises:
            OSError: the disk is full or gone; the group is kept, and what was written of it is taken back.
        """
        if not self._frames:
            return
        try:
            self._write()
        except OSError:
            self.refused = self.refused or time.time()
            raise
        self.refused = 0.0

    def _write(self) -> None:
        # Before the group, not behind it: the caller syncs the segment that the group is in.
        if self._size >= self._limit:
            self._rotate()
        data = b"".join(self._frames)
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            # A partial frame in the middle of a segment would hide all that follows.
            os.ftruncate(self._fd, self._size)
            raise
        self._frames.clear()
        self._size += len(data)

    def roll(self) -> None:
        """Go on in a new segment.

        Raises:
            OSError: as `flush`, or there can be no new segment.
        """
        self.flush()
        self._sync()
        self._open_next()

    def close(self) -> None:
        """Flush and close; an empty last segment is removed."""
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            descriptor, self._fd = self._fd, -1
            os.close(descriptor)
            self.refused = 0.0  # what it did not take is not waited for any more
        if self._size == 0:
            self.segment.unlink(missing_ok=True)

    def _sync(self) -> None:
        if self._synced:
            os.fdatasync(self._fd)

    def _rotate(self) -> None:
        self._sync()
        try:
            self._open_next()
            self._stuck = False
        except OSError as error:
            if not self._stuck:
                log.error("no new spool segment, %s is written on: %s", self.segment, error)
            self._stuck = True

    def _open_next(self) -> None:
        number = max(self._number + 1, int(time.time() * 1000))
        if number > _LAST_NUMBER:  # under a longer name nobody would ship it
            raise OSError(errno.EINVAL, "no segment can come behind that: take it away", str(self.segment))
        path = self._folder / f"{number:016d}.seg"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        if self._synced:
            try:
                sync_folder(self._folder)
            except OSError:
                os.close(descriptor)
                path.unlink()
                raise
        # The old segment is closed after the new one is there: its number would soon be another file's or socket's.
        previous, self._fd = self._fd, descriptor
        self._number, self._size = number, 0
        if previous >= 0:
            with contextlib.suppress(OSError):  # what it held was written by then
                os.close(previous)


class SpoolReader:
    """Hands a folder's frames to `ship` in order, and deletes segments that are shipped to their end.

    ``ship(segment name, offset, frames)`` returns the offset that control confirmed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[str, int] = {}
        self._left: set[str] = set()

    def next_chunk(self, limit: int = SHIP_MAX) -> tuple[str, int, bytes] | None:
        """The next ``(segment name, offset, whole frames)`` that is not confirmed yet, or None."""
        for path in self._whole():
            offset = self._offsets.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(limit)
            length = whole_frames(data)
            if length:
                return path.name, offset, data[:length]
        return None

    def backlog(self) -> dict[str, int]:
        """Segment name → bytes that are not confirmed yet, where there are any."""
        waiting = {}
        for path in segments(self._folder):
            try:
                size = path.stat().st_size - self._offsets.get(path.name, 0)
            except FileNotFoundError:
                continue
            if size > 0:
                waiting[path.name] = size
        return waiting

    def confirm(self, segment: str, offset: int) -> None:
        """Note what control has of a segment."""
        self._offsets[segment] = offset

    def leave(self, segment: str) -> None:
        """Hand out no more of a segment, whose rest cannot be shipped, until it is forgotten."""
        self._left.add(segment)

    def forget(self, segment: str) -> None:
        """A segment is no longer there."""
        self._offsets.pop(segment, None)
        self._left.discard(segment)

    def _whole(self) -> list[Path]:
        return [path for path in segments(self._folder) if path.name not in self._left]

    def drop_shipped(self, current: Path, before: str = "") -> list[tuple[Path, int]]:
        """Delete each segment but `current` that is shipped to its end, up to one that is not, or that is `before`.

        Returns those whose rest is no whole frame, with their good length: torn by a crash, or, if it is `current`,
        whose groups are always written whole, damaged.
        """
        torn = []
        for path in self._whole():
            if path.name == before:
                break
            size, offset = path.stat().st_size, self._offsets.get(path.name, 0)
            if offset != size:
                if self._has_whole_frame(path, offset):
                    break
                torn.append((path, offset))
            elif path != current:
                path.unlink()
                self.forget(path.name)
        return torn

    @staticmethod
    def _has_whole_frame(path: Path, offset: int) -> bool:
        with path.open("rb") as file:
            file.seek(offset)
            head = file.read(HEADER.size)
            length = HEADER.unpack(head)[0] if len(head) == HEADER.size else FRAME_MAX + 1
            return length <= min(FRAME_MAX, path.stat().st_size - offset - HEADER.size)
