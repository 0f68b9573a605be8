"""`corral logs`: the lines of all programs, what is added to them, and files that are rotated meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from threading import Timer

import pytest
from support.servers import python_env

from corral.cli.logs import Tail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "gateway-1.access.log"
    made.write_bytes(b"one\ntwo\n")
    return made


@pytest.fixture
def tail(path: Path) -> Iterator[Tail]:
    made = Tail(path, 10)
    yield made
    made.close()


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_it_begins_with_the_last_lines(path: Path, tail: Tail) -> None:
    assert [line for _, line in tail.last()] == ["one", "two"]
    for lines, told in ((1, ["two"]), (0, [])):
        other = Tail(path, lines)
        assert [line for _, line in other.last()] == told
        other.close()


def test_lines_come_once_and_whole(path: Path, tail: Tail) -> None:
    assert tail.fresh() == []
    add(path, b"three\nfo")
    assert tail.fresh() == ["three"]
    add(path, "ur ü".encode()[:-1])
    assert tail.fresh() == []
    add(path, "ü".encode()[1:] + b"\nfive\n")
    assert tail.fresh() == ["four ü", "five"]
    assert tail.fresh() == []


def test_a_line_that_is_not_ended_yet_is_there_when_it_is(path: Path) -> None:
    add(path, b"thr")
    tail = Tail(path, 10)
    assert [line for _, line in tail.last()] == ["one", "two"]
    add(path, b"ee\n")
    assert tail.fresh() == ["three"]
    tail.close()


def test_a_rotated_file_is_read_to_its_end_and_the_new_one_from_its_beginning(path: Path, tail: Tail) -> None:
    add(path, b"three\nfo")
    path.replace(path.with_name(path.name + ".1"))
    path.write_bytes(b"ur\nfive\n")
    assert tail.fresh() == ["three", "four", "five"]
    add(path, b"six\n")
    assert tail.fresh() == ["six"]


def test_between_two_files_nothing_is_lost(path: Path, tail: Tail) -> None:
    add(path, b"three\n")
    path.replace(path.with_name(path.name + ".1"))
    assert tail.fresh() == ["three"]
    assert tail.fresh() == []
    path.write_bytes(b"four\n")
    assert tail.fresh() == ["four"]


class Meanwhile(PosixPath):
    """A path to which something happens just before somebody looks at it by name."""

    happens: Callable[[], object] | None = None

    def __fspath__(self) -> str:
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return super().__fspath__()


def test_what_is_written_while_it_looks_is_not_lost(path: Path) -> None:
    """A gateway writes a group of lines and rotates at once: between a read of the old file and a look for the new."""
    named = Meanwhile(path)
    tail = Tail(named, 0)

    def rotate() -> None:
        add(path, b"three\n")
        path.replace(path.with_name(path.name + ".1"))
        path.write_bytes(b"four\n")

    named.happens = rotate
    assert tail.fresh() == ["three", "four"]
    tail.close()


def test_of_a_new_file_all_is_told(path: Path) -> None:
    tail = Tail(path, None)
    assert (list(tail.last()), tail.fresh()) == ([], ["one", "two"])
    tail.close()


def test_a_file_that_is_emptied_is_read_anew(path: Path, tail: Tail) -> None:
    os.truncate(path, 0)
    assert tail.fresh() == []
    add(path, b"three\n")
    assert tail.fresh() == ["three"]


def test_follow_shows_what_comes_of_new_files_too_until_it_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    access, control = folder / "gateway-1.access.log", folder / "control.log"
    access.write_text('{"ts":2.0,"n":0}\n')
    argv = [sys.executable, "-m", "corral", "logs", "--follow", "--json", "--state", str(tmp_path)]
    with subprocess.Popen(argv, env=os.environ | python_env(), stdout=subprocess.PIPE, text=True) as following:
        late = Timer(60, following.kill)
        late.start()

        def told() -> tuple[str, object]:
            assert following.stdout is not None
            line = json.loads(following.stdout.readline() or '"nothing more comes"')
            return line["program"], line["line"]

        assert told() == ("gateway-1", {"ts": 2.0, "n": 0})
        add(access, b'{"ts":3.0,"n":1}\n')
        assert told() == ("gateway-1", {"ts": 3.0, "n": 1})
        access.replace(folder / "gateway-1.access.log.1")
        access.write_text('{"ts":4.0,"n":2}\n')
        assert told() == ("gateway-1", {"ts": 4.0, "n": 2})
        control.write_bytes(b"a start\x1b[2J\n")
        assert told() == ("control", "a start?[2J")
        following.send_signal(signal.SIGINT)
        assert (following.communicate()[0], following.returncode) == ("", 0)
        late.cancel()
