"""What one turn of the shipper sends, and what it leaves on the disk."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from msgspec.json import encode

from corral.gateway.shipper import Shipper
from corral.store.spool import SpoolCorrupt, SpoolWriter, decode_frames, encode_frame, segments

Answer = Callable[[httpx.Request], httpx.Response]


class Control:
    """Takes frames as control does; ``took`` has their numbers."""

    def __init__(self) -> None:
        self.took: list[int] = []
        self._known: dict[str, int] = {}
        self._asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        segment, offset = request.url.path, int(request.url.params["offset"])
        self._asked += 1
        assert self._asked < 100, "it asks again and again"
        known = self._known.setdefault(segment, 0)
        if offset != known:
            return httpx.Response(409, json={"offset": known})
        try:
            for end, record in decode_frames(request.content):
                self.took.append(record["n"])
                self._known[segment] = offset + end
        except SpoolCorrupt:
            if self._known[segment] == offset:
                return httpx.Response(400, json={"error": {"code": "corrupt_frame"}, "offset": offset})
        return httpx.Response(200, json={"offset": self._known[segment]})


def ship(shipper: Shipper, answer: Answer) -> int:
    async def all_of_it() -> int:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await shipper.ship_all(client)

    return asyncio.run(all_of_it())


def record(number: int) -> bytes:
    return encode({"t": "settle", "n": number})


def damaged(*numbers: int) -> bytes:
    """Frames; the first of them is not what was written."""
    first, *rest = [encode_frame({"t": "settle", "n": number}) for number in numbers]
    return first[:-3] + b"?" + first[-2:] + b"".join(rest)


def test_what_comes_while_it_ships_waits_for_the_next_time(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    posted: list[int] = []

    def control(request: httpx.Request) -> httpx.Response:
        posted.append(len(request.content))
        assert len(posted) < 10, "it does not end while records come"
        writer.append(b'{"n":2}')
        writer.flush()
        return httpx.Response(200, json={"offset": int(request.url.params["offset"]) + len(request.content)})

    async def ship() -> int:
        async with httpx.AsyncClient(transport=httpx.MockTransport(control)) as client:
            return await Shipper(writer, tmp_path, "http://control", "token", "g").ship_all(client)

    writer.append(b'{"n":1}')
    writer.flush()
    assert (asyncio.run(ship()), posted) == (15, [15])
    assert (asyncio.run(ship()), posted) == (30, [15, 30]), "the second record, once more the first"
    writer.close()


def test_what_is_shipped_leaves_the_disk_before_all_is(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=1)
    for number in range(4):
        writer.append(record(number))
        writer.flush()
    control = Control()

    def ends(request: httpx.Request) -> httpx.Response:
        if len(control.took) == 3:
            raise httpx.ConnectError("gone")
        return control(request)

    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")
    with pytest.raises(httpx.ConnectError):
        ship(shipper, ends)
    assert [next(decode_frames(path.read_bytes()))[1]["n"] for path in segments(tmp_path)[:-1]] == [3]
    ship(shipper, control)
    assert (control.took, segments(tmp_path)) == ([0, 1, 2, 3], [writer.segment])
    writer.close()


def test_a_disk_that_is_full_holds_up_nothing_behind_a_damaged_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "0000000000000001.seg"
    bad.write_bytes(damaged(1, 2, 3))
    good = tmp_path / "0000000000000002.seg"
    good.write_bytes(encode_frame({"n": 4}))
    writer, control = SpoolWriter(tmp_path), Control()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(3):
            ship(shipper, control)
        assert (control.took, bad.exists(), good.exists()) == ([4], True, False)
        assert shipper.backlog() > 0 and shipper.behind() > 1e6, "since the segment was opened"
    assert len(caplog.messages) == 1
    ship(shipper, control)
    assert (control.took, bad.exists(), shipper.put_aside()) == ([4, 2, 3], False, ["0000000000000001.corrupt"])
    assert shipper.backlog() == 0
    writer.close()


def test_a_damaged_segment_that_somebody_took_away_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"000000000000000{number}.seg" for number in (1, 2)]
    for number, path in enumerate(paths):
        path.write_bytes(damaged(number * 2, number * 2 + 1))
    writer, control = SpoolWriter(tmp_path), Control()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")

    def busy(path: Path, target: Path) -> Path:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", busy)
        ship(shipper, control)
    paths[0].unlink()
    ship(shipper, control)
    ship(shipper, control)
    assert (sorted(control.took), shipper.put_aside()) == ([1, 3], ["0000000000000002.corrupt"])
    assert (shipper.backlog(), shipper.behind()) == (0, 0.0)
    writer.close()


@pytest.mark.parametrize("synced", [True, False])
def test_what_was_rescued_is_on_the_disk_before_the_rename_where_that_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    (tmp_path / "0000000000000001.seg").write_bytes(damaged(1, 2))
    writer = SpoolWriter(tmp_path, synced=synced)
    done: list[str] = []
    sync, replace = os.fdatasync, Path.replace

    def synchronised(descriptor: int) -> None:
        done.append(f"sync of {os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fdatasync", synchronised)
    monkeypatch.setattr(Path, "replace", renamed)
    ship(Shipper(writer, tmp_path, "http://control", "token", "g"), Control())
    size = len(encode_frame({"t": "settle", "n": 2}))
    assert done == [*([f"sync of {size} bytes"] if synced else []), "rename"]
    writer.close()
