"""The access log: groups, rotation, a disk that takes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.gateway.access import AccessLog


def test_lines_are_written_in_order_and_the_file_is_rotated_by_size(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def write() -> None:
        access = AccessLog(str(path), asyncio.get_running_loop(), bytes_max=40, keep=2)
        for number in range(12):
            access.line(b'{"number":%02d}' % number)
            access.flush()
        access.close()

    asyncio.run(write())
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["access.log", "access.log.1", "access.log.2"]
    kept = [line for name in reversed(names) for line in (tmp_path / name).read_text().splitlines()]
    assert kept == [f'{{"number":{number:02d}}}' for number in range(12)][-len(kept) :]
    assert len(kept) >= 6
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in names)


def test_what_was_there_counts(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b"x" * 39 + b"\n")

    async def write() -> None:
        access = AccessLog(str(path), asyncio.get_running_loop(), bytes_max=40)
        access.line(b"y")
        access.close()

    asyncio.run(write())
    assert path.read_bytes() == b""
    assert (tmp_path / "access.log.1").read_bytes().endswith(b"\ny\n")


@pytest.mark.parametrize("path", ["", "/dev/full"])
def test_a_log_that_takes_nothing_is_no_error_of_a_request(path: str) -> None:
    async def write() -> None:
        access = AccessLog(path, asyncio.get_running_loop())
        access.line(b"y")
        access.close()

    asyncio.run(write())
