"""What one turn of the shipper sends, and what it leaves on the disk."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from msgspec.json import encode

from corral.gateway import shipper as shipping
from corral.gateway.shipper import Shipper
from corral.store.spool import FRAME_MAX, SpoolCorrupt, SpoolWriter, decode_frames, encode_frame, segments

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
    assert [next(decode_frames(path.read_bytes()))[1]["n"] for path in segments(tmp_path)] == [3]
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
        assert (control.took, good.exists(), shipper.put_aside()) == ([2, 3, 4], False, ["0000000000000001.corrupt"])
    assert (len(caplog.messages), shipper.backlog()) == (1, 0)
    writer.close()


def test_what_the_disk_does_not_take_is_behind_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, control = SpoolWriter(tmp_path), Control()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")
    began = time.time()

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.append(record(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                writer.flush()
            ship(shipper, control)
            patch.setattr(time, "time", lambda: began + 90)
        assert (shipper.backlog(), 80 < shipper.behind() <= 90) == (0, True), "since it was refused first"
    writer.flush()
    ship(shipper, control)
    assert (control.took, shipper.behind()) == ([1], 0.0)
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


def cut(*numbers: int) -> bytes:
    """Frames; the length of the first of them is not what was written."""
    data = bytearray(b"".join(encode_frame({"t": "settle", "n": number}) for number in numbers))
    data[:4] = (FRAME_MAX - 1).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("bad", [damaged, cut], ids=["a frame", "its length"])
def test_what_is_behind_damage_comes_before_what_was_written_after_it(
    tmp_path: Path, bad: Callable[..., bytes]
) -> None:
    frame = encode_frame({"t": "settle", "n": 1})
    for number, data in enumerate((frame + bad(2, 3, 4), encode_frame({"n": 5}) + bad(6, 7), encode_frame({"n": 8}))):
        (tmp_path / f"{number:016d}.seg").write_bytes(data)
    writer, control = SpoolWriter(tmp_path), Control()
    writer.append(record(9))
    writer.flush()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")
    ship(shipper, control)
    assert control.took == [1, 3, 4, 5, 7, 8, 9]
    assert (len(shipper.put_aside()), segments(tmp_path)) == (2, [writer.segment])
    writer.close()


@pytest.mark.parametrize("killed", [True, False])
def test_what_control_has_taken_of_it_is_not_shipped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    (tmp_path / "0000000000000001.seg").write_bytes(damaged(1, 2, 3, 4))
    (tmp_path / "0000000000000002.seg").write_bytes(encode_frame({"n": 5}))
    monkeypatch.setattr(shipping, "SHIP_MAX", len(encode_frame({"t": "settle", "n": 2})))
    writer, control = SpoolWriter(tmp_path), Control()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")

    def ends(request: httpx.Request) -> httpx.Response:
        if len(control.took) == 2:
            raise httpx.ConnectError("gone")
        return control(request)

    for _ in range(3):
        with pytest.raises(httpx.ConnectError):
            ship(shipper, ends)
    assert (control.took, shipper.put_aside()) == ([2, 3], []), "in order: what comes after it waits"
    assert shipper.behind() > 1e6, "since the segment was opened"
    if killed:
        shipper = Shipper(writer, tmp_path, "http://control", "token", "g")
    ship(shipper, control)
    assert (control.took, shipper.put_aside()) == ([2, 3, 4, 5], ["0000000000000001.corrupt"])
    writer.close()


def test_a_disk_that_tells_something_else_the_next_time_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "0000000000000001.seg"
    bad.write_bytes(damaged(1, 22, 3, 4))
    monkeypatch.setattr(shipping, "SHIP_MAX", len(encode_frame({"t": "settle", "n": 22})))
    writer, control = SpoolWriter(tmp_path), Control()
    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")

    def ends(request: httpx.Request) -> httpx.Response:
        if control.took:
            raise httpx.ConnectError("gone")
        return control(request)

    with pytest.raises(httpx.ConnectError):
        ship(shipper, ends)
    assert control.took == [22]
    bad.write_bytes(damaged(1) + damaged(22, 3, 4))
    ship(shipper, control)
    assert (control.took, bad.with_suffix(".corrupt").exists()) == ([22, 3, 4], True)
    writer.close()


def test_a_damaged_segment_that_was_written_to_is_told_as_corrupt_however_long_that_takes(tmp_path: Path) -> None:
    writer, control = SpoolWriter(tmp_path), Control()
    path = writer.segment
    path.write_bytes(cut(1, 2))

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    shipper = Shipper(writer, tmp_path, "http://control", "token", "g")
    with pytest.raises(httpx.ConnectError):
        ship(shipper, away)
    writer.append(record(3))
    writer.flush()
    ship(shipper, control)
    assert (control.took, shipper.put_aside()) == ([2, 3], [f"{path.stem}.corrupt"])
    writer.close()
