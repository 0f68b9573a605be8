"""What `corral doctor` says of the processes."""

from __future__ import annotations

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
