"""What `corral doctor` says of the processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.stack import doctor, supervisor
from corral.stack.state import StateFolder


@pytest.mark.parametrize(
    ("state", "level"), [("RUNNING", "ok"), ("STARTING", "warning"), ("BACKOFF", "problem"), ("FATAL", "problem")]
)
def test_findings(state: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"statename": state, "pid": 7, "now": 9, "start": 5, "spawnerr": "", "name": "node-1"}
    monkeypatch.setattr(supervisor, "processes", lambda _: {"node-1": seen})
    (found,) = doctor._processes(StateFolder(tmp_path))
    assert (found.check, found.level) == ("node-1", level)
    assert found.advice or level == "ok"


def test_a_segment_that_is_removed_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(tmp_path)
    folder = state.spool / "gateway-1"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"000000000000000{number}.seg").write_bytes(b"x")
    stat = Path.stat

    def shipped(path: Path, **more: bool) -> os.stat_result:
        found = stat(path, **more)
        if path.suffix == ".seg":
            path.unlink()
            (folder / "0000000000000002.seg").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", shipped)
    (found,) = doctor._backlog(state)
    assert (found.check, found.level) == ("spool of gateway-1", "ok")
