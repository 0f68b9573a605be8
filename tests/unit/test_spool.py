"""The spool: frames, groups, shipping, torn and flipped bytes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import decode, encode

from corral.store.spool import (
    FRAME_MAX,
    HEADER,
    SpoolCorrupt,
    SpoolReader,
    SpoolWriter,
    decode_frames,
    encode_frame,
    salvage,
    segments,
    whole_frames,
)
from corral.store.spool_lock import LOCK, held, hold

RECORDS = st.lists(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=20))),
    max_size=8,
)


@given(RECORDS, st.integers(0, 300))
def test_frames_round_trip_and_a_cut_tail_is_left_out(records: list[dict[str, object]], cut: int) -> None:
    data = b"".join(encode_frame(record) for record in records)
    assert [record for _, record in decode_frames(data)] == records
    part = data[:cut]
    read = list(decode_frames(part))
    assert [record for _, record in read] == records[: len(read)]
    assert (read[-1][0] if read else 0) == whole_frames(part)


def test_each_flipped_byte_is_found() -> None:
    data = encode_frame({"id": "a", "n": 1}) + encode_frame({"id": "b", "n": 2})
    for position in range(HEADER.size, len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x20
        try:
            assert [record for _, record in decode_frames(bytes(changed))] != [
                {"id": "a", "n": 1},
                {"id": "b", "n": 2},
            ]
        except SpoolCorrupt as error:
            assert error.offset in (0, whole_frames(data[: len(data) // 2 + 1]))


def test_a_group_is_one_write_and_nothing_is_there_before(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    writer.append(encode({"n": 1}))
    writer.append(encode({"n": 2}))
    assert writer.segment.read_bytes() == b""
    writer.flush()
    assert [record["n"] for _, record in decode_frames(writer.segment.read_bytes())] == [1, 2]
    writer.close()


def test_segments_roll_and_a_new_writer_never_appends_to_an_old_one(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=100)
    for number in range(10):
        writer.append(encode({"number": number, "text": "x" * 20}))
        writer.flush()
    writer.close()
    count = len(segments(tmp_path))
    assert count > 2
    SpoolWriter(tmp_path).close()
    assert len(segments(tmp_path)) == count
    assert oct(segments(tmp_path)[0].stat().st_mode)[-3:] == "600"


def test_a_full_disk_leaves_no_half_frame_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SpoolWriter(tmp_path)
    writer.append(encode({"n": 1}))
    writer.flush()
    real_write = os.write
    calls: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, bytes(data[:7]))

    writer.append(encode({"n": 2}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.flush()
    assert [record["n"] for _, record in decode_frames(writer.segment.read_bytes())] == [1]
    assert whole_frames(writer.segment.read_bytes()) == writer.segment.stat().st_size
    writer.append(encode({"n": 3}))
    writer.flush()
    assert [record["n"] for _, record in decode_frames(writer.segment.read_bytes())] == [1, 2, 3]
    writer.close()


def test_a_group_whose_disk_fails_as_its_segment_is_full_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=1, synced=True)
    writer.append(encode({"n": 1}))
    writer.flush()
    first = writer.segment

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    writer.append(encode({"n": 2}))
    for call in ("fdatasync", "fsync"):  # of the full segment, and of the folder with the next one
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            if call == "fdatasync":
                with pytest.raises(OSError, match="Input/output"):
                    writer.flush()
            else:
                with pytest.raises(OSError, match="Input/output"):
                    writer.roll()
        assert segments(tmp_path) == [first], "nothing is left of the next one"
    writer.append(encode({"n": 3}))
    writer.flush()
    assert writer.segment != first
    writer.close()
    got = [record["n"] for path in segments(tmp_path) for _, record in decode_frames(path.read_bytes())]
    assert got == [1, 2, 3]


def test_a_lock_that_was_removed_while_it_was_waited_for_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gateway-1"
    other, lock = hold(folder), fcntl.flock

    def ends(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        (folder / LOCK).unlink()  # who has adopted it ends between our opening of the file and our lock
        folder.rmdir()
        os.close(other)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", ends)
    mine = hold(folder)
    assert held(folder), "another one sees it"
    with pytest.raises(BlockingIOError):
        hold(folder)
    os.close(mine)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_is_removed_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Once it was found there, and once a lock is to be made in it."""
    folder = tmp_path / "gateway-1"
    folder.mkdir()
    real = getattr(os, call)

    def ends(path: Path, *more: Any, **named: Any) -> Any:
        monkeypatch.undo()
        if call == "open":
            folder.rmdir()
            return real(path, *more, **named)
        try:
            return real(path, *more, **named)
        finally:
            folder.rmdir()

    monkeypatch.setattr(os, call, ends)
    mine = hold(folder)
    assert held(folder)
    os.close(mine)


def test_what_stands_in_the_way_of_a_spool_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing/volume")
    with pytest.raises(FileExistsError):
        hold(tmp_path / "file")
    with pytest.raises(OSError, match="nowhere"):
        hold(tmp_path / "nowhere/gateway-1")


def test_a_segment_without_a_successor_is_written_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "spool"
    writer = SpoolWriter(folder, segment_bytes=64)
    aside = folder.rename(tmp_path / "elsewhere")  # stands for any reason why no segment can be opened
    written = aside / writer.segment.name
    with (tmp_path / "theirs").open("wb") as theirs:
        for number in range(3):
            writer.append(encode({"n": number, "text": "x" * 60}))
            writer.flush()
        assert [record["n"] for _, record in decode_frames(written.read_bytes())] == [0, 1, 2]
        with pytest.raises(OSError, match="No such file"):
            writer.roll()
        assert os.fstat(theirs.fileno()).st_size == 0
        assert len([line for line in caplog.messages if "no new spool segment" in line]) == 1
        aside.rename(folder)
        writer.append(encode({"n": 3, "text": "x" * 60}))
        writer.flush()
        assert writer.segment.name != written.name
        writer.append(encode({"n": 4}))
        writer.close()
        writer.close()
        assert os.fstat(theirs.fileno()).st_size == 0
    got = [record["n"] for path in segments(folder) for _, record in decode_frames(path.read_bytes())]
    assert got == [0, 1, 2, 3, 4]


def test_the_reader_hands_out_each_record_once_and_deletes_what_is_shipped(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=200)
    reader = SpoolReader(tmp_path)
    got: list[int] = []

    def ship() -> None:
        while (piece := reader.next_chunk(limit=150)) is not None:
            segment, offset, frames = piece
            got.extend(record["n"] for _, record in decode_frames(frames))
            reader.confirm(segment, offset + len(frames))
        assert reader.drop_shipped(writer.segment) == []

    for number in range(40):
        writer.append(encode({"n": number, "text": "y" * 10}))
        writer.flush()
        if number % 7 == 0:
            ship()
    ship()
    assert got == list(range(40))
    assert segments(tmp_path) == [writer.segment]
    writer.close()


def test_a_torn_tail_is_put_aside_and_what_follows_is_shipped(tmp_path: Path) -> None:
    first = SpoolWriter(tmp_path)
    first.append(encode({"n": 1}))
    first.flush()
    with first.segment.open("ab") as file:
        file.write(encode_frame({"n": 2})[:-3])
    second = SpoolWriter(tmp_path)
    second.append(encode({"n": 3}))
    second.flush()
    reader = SpoolReader(tmp_path)
    got: list[int] = []
    while (piece := reader.next_chunk()) is not None:
        got.extend(record["n"] for _, record in decode_frames(piece[2]))
        reader.confirm(piece[0], piece[1] + len(piece[2]))
    assert got == [1, 3]
    assert reader.drop_shipped(second.segment, first.segment.name) == []
    assert reader.drop_shipped(second.segment) == [(first.segment, len(encode_frame({"n": 1})))]


def test_a_damaged_length_in_the_segment_that_is_written_to_is_found_at_once(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    for number in (1, 2):
        writer.append(encode({"n": number}))
        writer.flush()
    damaged, first = writer.segment, len(encode_frame({"n": 1}))
    data = bytearray(damaged.read_bytes())
    data[first : first + 4] = (1000).to_bytes(4, "little")
    damaged.write_bytes(data)
    reader = SpoolReader(tmp_path)
    piece = reader.next_chunk()
    assert piece is not None
    reader.confirm(piece[0], len(piece[2]))
    assert reader.next_chunk() is None
    assert reader.drop_shipped(writer.segment) == [(damaged, first)]
    writer.roll()
    assert writer.segment != damaged
    writer.append(encode({"n": 3}))
    writer.close()
    assert [record["n"] for _, record in decode_frames(segments(tmp_path)[-1].read_bytes())] == [3]


def test_the_largest_frame_there_may_be_is_handed_out(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    writer.append(encode({"text": "x" * (FRAME_MAX - len(encode({"text": ""})))}))
    writer.flush()
    piece = SpoolReader(tmp_path).next_chunk()
    writer.close()
    assert piece is not None
    assert len(piece[2]) == FRAME_MAX + HEADER.size


def test_what_stands_behind_a_bad_frame_is_found() -> None:
    frames = [encode_frame({"t": "settle", "id": f"r{number}", "text": '{"t":"no frame"}'}) for number in range(4)]
    whole = b"".join(frames)
    assert [decode(payload)["id"] for payload in salvage(whole)] == ["r0", "r1", "r2", "r3"]
    for position in range(len(frames[0]), len(frames[0]) + len(frames[1])):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        found = [decode(payload)["id"] for payload in salvage(bytes(changed))]
        assert found == ["r0", "r2", "r3"], position
    assert [decode(payload)["id"] for payload in salvage(whole[5:-3])] == ["r1", "r2"]
    assert list(salvage(b"\0" * 100)) == [b""] * 12


def test_a_flipped_byte_costs_no_other_record_of_its_group(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    for number in range(3):
        writer.append(encode({"t": "settle", "id": f"r{number}"}))
    writer.flush()
    writer.close()
    whole = segments(tmp_path)[0].read_bytes()
    size = len(whole) // 3
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x01
        expected = [f"r{number}" for number in range(3) if number != position // size]
        assert [decode(payload)["id"] for payload in salvage(bytes(changed))] == expected, position


def test_a_spool_has_one_owner(tmp_path: Path) -> None:
    first = hold(tmp_path)
    with pytest.raises(BlockingIOError):
        hold(tmp_path)
    os.close(first)
    os.close(hold(tmp_path))


def test_a_spool_is_held_as_long_as_somebody_has_it(tmp_path: Path) -> None:
    assert not held(tmp_path)
    first = hold(tmp_path)
    assert held(tmp_path)
    os.close(first)
    assert not held(tmp_path), "its file stays where a gateway ended in order"


def test_a_writer_that_cannot_write_the_rest_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SpoolWriter(tmp_path)
    opened = len(os.listdir("/proc/self/fd"))
    writer.append(b'{"n":1}')

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert len(os.listdir("/proc/self/fd")) == opened - 1


def test_what_is_called_a_segment_and_is_none_holds_nothing_up(tmp_path: Path) -> None:
    (tmp_path / f"{1:016d}.seg").mkdir()
    os.mkfifo(tmp_path / f"{2:016d}.seg")
    (tmp_path / f"{3:016d}.seg").symlink_to(tmp_path / "nowhere")
    writer, reader = SpoolWriter(tmp_path), SpoolReader(tmp_path)
    writer.append(encode({"n": 1}))
    writer.flush()
    assert reader.next_chunk() == (writer.segment.name, 0, encode_frame({"n": 1}))
    assert reader.drop_shipped(writer.segment) == []
    writer.close()


def test_there_is_no_writer_whose_segments_nobody_would_ship(tmp_path: Path) -> None:
    last = tmp_path / f"{10**16 - 1}.seg"
    last.touch()
    with pytest.raises(OSError, match=f"take it away: '{last}'"):
        SpoolWriter(tmp_path)
    assert list(tmp_path.iterdir()) == [last]
    last.unlink()
    SpoolWriter(tmp_path).close()
