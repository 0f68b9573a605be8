"""What `corral doctor` says of the processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.stack import doctor, http, status, supervisor
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


def test_a_gateway_that_runs_and_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"statename": "RUNNING", "pid": 7, "now": 9, "start": 5, "spawnerr": "", "name": "gateway-1"}
    monkeypatch.setattr(supervisor, "processes", lambda _: {"gateway-1": seen})
    monkeypatch.setattr(StateFolder, "stack", lambda _: {"gateways": [{"name": "gateway-1", "url": "http://there"}]})
    for answers, level in ((True, "ok"), (False, "problem")):
        monkeypatch.setattr(status, "http_ok", lambda url, path, answers=answers: answers)
        (found,) = doctor._processes(StateFolder(tmp_path))
        assert (found.check, found.level) == ("gateway-1", level)
    assert "kill -9 7" in found.advice


def test_an_edge_that_does_not_answer_is_waited_for_once() -> None:
    asked: list[str] = []

    def ask(path: str) -> None:
        asked.append(path)
        raise http.Unreachable("it is frozen")

    once = doctor._once(ask)
    for path in ("/status", "/nodes"):
        with pytest.raises(http.Unreachable):
            once(path)
    assert asked == ["/status"]


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
