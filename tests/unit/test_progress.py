"""How far something is, as the command shows it: a bar that moves on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import re
import sys

import pytest

from corral.cli.progress import Bar


def test_elsewhere_than_on_a_terminal_it_has_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("verified", "records")
    for done in range(0, 2001, 50):
        bar.show(done, 2000)
    bar.show(2000, 2000)
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len("verified 100%")] for line in lines] == [f"verified {tenth * 10:3d}%" for tenth in range(11)]
    assert "1,000 of 2,000 records" in lines[5]
    assert "\x1b" not in "".join(lines)


def test_on_a_terminal_one_line_is_drawn_anew_and_its_bar_grows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Bar("checked", "checkpoints")
    for done in (0, 1, 15, 29, 30):
        bar.show(done, 30)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.endswith("\n"), "the line ends with the work"
    drawn = shown.rstrip("\n").split("\r\x1b[2K")[1:]
    bars = [re.match(r"\[(#*)(\.*)\] checked ", one) for one in drawn]
    assert [(len(one[1]), len(one[2])) for one in bars if one] == [(0, 30), (1, 29), (15, 15), (29, 1), (30, 0)]
    assert "50%  15 of 30 checkpoints" in drawn[2]


def test_nothing_to_do_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    Bar("verified", "records").show(0, 0)
    assert "verified 100%  0 of 0 records" in capsys.readouterr().err
